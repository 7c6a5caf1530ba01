"""When updates are due, against loops that count; and the two formulas."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossamer.checks import check_integer, check_number
from gossamer.errors import ConfigurationError
from gossamer.schedule import (
    EpochPeriods,
    Periodic,
    as_schedule,
    cosine_decay,
    cubic_ramp,
)


@given(st.integers(1, 12), st.integers(0, 20), st.one_of(st.none(), st.integers(1, 60)))
def test_periodic_is_due_every_so_many_steps_after_its_beginning(every, begin, span):
    until = None if span is None else begin + span
    expected = []
    step = begin + every
    while step <= 100:
        if until is None or step <= until:
            expected.append(step)
        step += every
    schedule = Periodic(every, begin, until)
    assert [step for step in range(101) if schedule.due(step)] == expected


@given(
    st.dictionaries(st.integers(1, 10), st.integers(1, 9), max_size=4),
    st.integers(1, 9),
    st.integers(1, 15),
    st.one_of(st.none(), st.integers(1, 12)),
)
def test_epoch_periods_are_due_as_a_loop_over_epochs_finds(later, first, steps_per_epoch, until):
    periods = {0: first, **later}
    expected = []
    step, period = 0, None
    for epoch in range(14):
        period = periods.get(epoch, period)
        for _ in range(steps_per_epoch):
            step += 1
            if step % period == 0 and (until is None or epoch < until):
                expected.append(step)
    schedule = EpochPeriods(periods, steps_per_epoch, until)
    assert [n for n in range(step + 1) if schedule.due(n)] == expected


def test_epoch_periods_of_the_paper_change_where_it_says():
    # 500 steps an epoch, WRN-28-2: 100, then 200 from epoch 25, 400 from 80, 800 from 140, none from 190.
    schedule = EpochPeriods({0: 100, 25: 200, 80: 400, 140: 800}, 500, until=190)
    due = [step for step in range(1, 200 * 500 + 1) if schedule.due(step)]
    gaps = [later - earlier for earlier, later in zip([0, *due], due, strict=False)]
    assert set(gaps) == {100, 200, 400, 800}
    assert due[:3] == [100, 200, 300]
    assert due[125:127] == [12_600, 12_800]  # epoch 25 starts after step 12,500
    assert due[-1] == 94_400  # the last multiple of 800 within epoch 189


def test_order_of_periods_does_not_matter():
    mixed, sorted_ = (EpochPeriods(periods, 3) for periods in ({5: 2, 0: 1}, {0: 1, 5: 2}))
    assert [mixed.due(n) for n in range(60)] == [sorted_.due(n) for n in range(60)]


def test_as_schedule_makes_a_period_of_a_number_and_keeps_a_schedule():
    assert as_schedule(5, begin=1, until=9) == Periodic(5, 1, 9)
    schedule = EpochPeriods({0: 1}, 10)
    assert as_schedule(schedule) is schedule
    with pytest.raises(ConfigurationError, match=r"until=9: give the end in the schedule itself, EpochPeriods"):
        as_schedule(schedule, until=9)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Periodic(0), "every: expected an integer of at least 1, got 0"),
        (lambda: Periodic(2.0), "every: expected an integer of at least 1, got 2.0"),
        (lambda: Periodic(True), "every: expected an integer of at least 1, got True"),
        (lambda: Periodic(5, begin=-1), "begin: expected an integer of at least 0, got -1"),
        (lambda: Periodic(5, begin=7, until=7), "until: expected an integer of at least 8, got 7"),
        (lambda: EpochPeriods({}, 10), "periods: must say the period from epoch 0"),
        (lambda: EpochPeriods({1: 5}, 10), r"periods: must say the period from epoch 0, got \{1: 5\}"),
        (lambda: EpochPeriods({0: 0}, 10), "the period from epoch 0: expected an integer of at least 1, got 0"),
        (lambda: EpochPeriods({0: 1, -2: 1}, 10), "an epoch: expected an integer of at least 0, got -2"),
        (lambda: EpochPeriods({0: 1, "x": 1}, 10), "an epoch: expected an integer of at least 0, got 'x'"),
        (lambda: EpochPeriods({0: 1}, 0), "steps_per_epoch: expected an integer of at least 1, got 0"),
        (lambda: EpochPeriods({0: 1}, 5, until=0), "until: expected an integer of at least 1, got 0"),
    ],
)
def test_schedule_out_of_range_is_refused(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()


@given(st.integers(0, 50), st.integers(1, 50), st.integers(-10, 120), st.floats(0, 0.5), st.floats(0.5, 0.99))
def test_cubic_ramp_is_the_published_formula(begin, span, step, initial, final):
    end = begin + span
    clipped = min(max(step, begin), end)
    expected = final + (initial - final) * (1 - (clipped - begin) / (end - begin)) ** 3
    assert cubic_ramp(step, begin, end, initial, final) == pytest.approx(expected, rel=1e-12)


def test_cubic_ramp_reaches_its_ends_exactly():
    assert cubic_ramp(3, 3, 10, 0.25, 0.9) == 0.25
    assert cubic_ramp(10, 3, 10, 0.25, 0.9) == cubic_ramp(99, 3, 10, 0.25, 0.9) == 0.9
    assert cubic_ramp(50, 0, 100, 0.0, 0.8) == pytest.approx(0.7)


@given(st.integers(0, 200), st.integers(1, 100), st.floats(0, 1))
def test_cosine_decay_is_the_published_formula(step, end, initial):
    expected = initial / 2 * (1 + math.cos(step * math.pi / end)) if step < end else 0.0
    assert cosine_decay(step, end, initial) == pytest.approx(expected, abs=1e-12)


def test_cosine_decay_is_half_way_down_in_the_middle_and_exactly_zero_from_the_end():
    assert cosine_decay(0, 100, 0.3) == 0.3
    assert cosine_decay(50, 100, 0.3) == pytest.approx(0.15)
    assert cosine_decay(100, 100, 0.3) == cosine_decay(101, 100, 0.3) == 0.0
    assert cosine_decay(12345, None, 0.3) == 0.3


@pytest.mark.parametrize(
    ("value", "high", "open_high", "interval"),
    [
        (1.0, 1, True, r"\[0, 1\)"),
        (1.01, 1, False, r"\[0, 1\]"),
        (-0.01, 1, True, r"\[0, 1\)"),
        (math.nan, 1, False, r"\[0, 1\]"),
        (math.inf, math.inf, True, r"\[0, inf\)"),
        ("1", 1, False, r"\[0, 1\]"),
        (False, 1, False, r"\[0, 1\]"),
        (None, 1, False, r"\[0, 1\]"),
    ],
)
def test_number_out_of_range_names_the_interval(value, high, open_high, interval):
    with pytest.raises(ConfigurationError, match=rf"x: expected a number in {interval}, got "):
        check_number("x", value, 0, high, open_high=open_high)


def test_number_at_a_closed_end_is_accepted():
    check_number("x", 0, 0, 1, open_high=True)
    check_number("x", 1, 0, 1)
    check_number("p", math.inf, 0, math.inf)
    check_integer("n", 3, at_least=3)
