"""Choices of exactly k groups against a sort, for generated values with many ties."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gossamer.choice import largest, largest_in_cells, sample, smallest
from gossamer.errors import NonFiniteError
from gossamer.groups import Groups
from gossamer.masks import MaskedTensor
from gossamer.structure import Element
from gossamer.targets import Target

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def vectors(*sizes):
    """The groups of weights of so many elements."""
    found = []
    for i, size in enumerate(sizes):
        owner = nn.Module()
        owner.weight = nn.Parameter(torch.ones(size, 1))
        found.append(Groups(MaskedTensor(Target(f"layer.{i}.weight", ((owner, "weight"),), 1)), Element()))
    return found


# -- largest and smallest -------------------------------------------------------------------------------------------

VALUES = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, math.inf, -math.inf, 0.5, 6.0e-8, -6.0e-8]),
    st.floats(-100, 100, width=16),
)


@st.composite
def rankings(draw):
    """Scores of several tensors, of one or several dtypes, and the dtype's rounding applied."""
    tensors = draw(st.lists(st.lists(VALUES, max_size=30), min_size=1, max_size=4))
    dtype = st.sampled_from(DTYPES)
    dtypes = draw(st.one_of(dtype.map(lambda one: [one] * len(tensors)), st.lists(dtype, min_size=4, max_size=4)))
    return [torch.tensor(values, dtype=dtype) for values, dtype in zip(tensors, dtypes, strict=False)]


def by_sorting(scores, count, descending=True):
    """Global indices of the `count` best by a stable sort: equal scores from the lowest index."""
    flat = torch.cat([score.double() for score in scores]).numpy()
    return set(np.argsort(-flat if descending else flat, kind="stable")[:count].tolist())


def chosen_globally(scores, chosen):
    offsets = itertools.accumulate([0, *(len(score) for score in scores)])
    listed = [first + i for first, index in zip(offsets, chosen, strict=False) for i in index.tolist()]
    assert len(listed) == len(set(listed))
    return set(listed)


@given(rankings(), st.data(), st.booleans())
def test_choice_over_all_tensors_is_that_of_a_stable_sort(scores, data, descending):
    groups = vectors(*map(len, scores))
    count = data.draw(st.integers(0, sum(map(len, scores))))
    chosen = (largest if descending else smallest)(groups, [score.clone() for score in scores], count)
    assert chosen_globally(scores, chosen) == by_sorting(scores, count, descending)


@given(rankings(), st.data(), st.booleans())
def test_choice_within_each_tensor_is_that_of_a_stable_sort(scores, data, descending):
    groups = vectors(*map(len, scores))
    counts = [data.draw(st.integers(0, len(score))) for score in scores]
    chosen = (largest if descending else smallest)(groups, [score.clone() for score in scores], counts)
    for score, index, count in zip(scores, chosen, counts, strict=True):
        assert set(index.tolist()) == by_sorting([score], count, descending)
        assert len(index) == count


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [0, 1, 499, 20_000, 39_999, 40_000])
def test_many_distinct_scores_are_chosen_as_a_sort_does(dtype, count):
    generator = torch.Generator().manual_seed(count)
    scores = [torch.randn(n, generator=generator, dtype=torch.float64).to(dtype) for n in (25_000, 0, 15_000)]
    chosen = largest(vectors(25_000, 0, 15_000), [score.clone() for score in scores], count)
    assert chosen_globally(scores, chosen) == by_sorting(scores, count)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_neighbouring_numbers_are_told_apart(dtype):
    # One unit in the last place, around zero (subnormals), around a power of two and at the largest number.
    ends = torch.tensor([0.0, 1.0, 2.0, torch.finfo(dtype).max, -1.0, -torch.finfo(dtype).max], dtype=dtype)
    up, down = (torch.nextafter(ends, torch.tensor(sign * math.inf, dtype=dtype)) for sign in (1, -1))
    scores = torch.cat([ends, up, down]).unique()
    assert len(scores) == 18
    shuffled = torch.randperm(18, generator=torch.Generator().manual_seed(0))
    for count in range(19):
        (chosen,) = largest(vectors(18), [scores[shuffled].clone()], [count])
        assert sorted(shuffled[chosen].tolist()) == list(range(18 - count, 18))


def test_scores_of_several_types_are_ranked_without_rounding():
    tiny = 2.0**-40
    scores = [torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([1 - tiny, 1.0, 1 + tiny], dtype=torch.float64)]
    for count in range(5):
        chosen = largest(vectors(1, 3), [score.clone() for score in scores], count)
        assert chosen_globally(scores, chosen) == set([3, 0, 2, 1][:count])


def test_all_scores_equal_are_taken_from_the_first_tensor_on():
    chosen = largest(vectors(3, 4, 5), [torch.zeros(3), -torch.zeros(4), torch.zeros(5)], 5)
    assert [sorted(index.tolist()) for index in chosen] == [[0, 1, 2], [0, 1], []]
    chosen = smallest(vectors(3, 4, 5), [torch.zeros(3), -torch.zeros(4), torch.zeros(5)], [1, 2, 3])
    assert [sorted(index.tolist()) for index in chosen] == [[0], [0, 1], [0, 1, 2]]


@pytest.mark.parametrize("count", [0, 3, [1, 2]])
def test_nan_score_stops_the_choice_and_names_the_layer(count):
    scores = [torch.ones(4), torch.tensor([1.0, math.nan, 2.0])]
    with pytest.raises(NonFiniteError, match=r"layer.1.weight: its scores contain NaN"):
        largest(vectors(4, 3), scores, count)


def test_negative_nan_is_found_too():
    negative = torch.tensor([-4194304], dtype=torch.int32).view(torch.float32)  # sign bit set: sorts below everything
    assert negative.isnan().all()
    with pytest.raises(NonFiniteError, match=r"layer.0.weight"):
        smallest(vectors(1), [negative], [1])


# -- sample ---------------------------------------------------------------------------------------------------------


@given(st.integers(1, 200), st.integers(0, 1000), st.data())
def test_sample_takes_exactly_so_many_eligible_groups(size, seed, data):
    generator = torch.Generator().manual_seed(seed)
    eligible = torch.rand(size, generator=generator) < data.draw(st.sampled_from([0.02, 0.3, 0.9, 1.1]))
    available = int(eligible.sum())
    count = data.draw(st.integers(0, available))
    (groups,) = vectors(size)
    (index,) = sample([groups], [eligible.clone()], [available], [count], generator)
    assert index.dtype == torch.int64
    assert len(index.unique()) == len(index) == count
    assert eligible[index].all()


def test_sample_is_determined_by_the_generator_and_advances_it():
    groups = vectors(500, 300)

    def draw(generator):
        eligible = [torch.ones(500, dtype=torch.bool), torch.ones(300, dtype=torch.bool)]
        return [index.sort().values.tolist() for index in sample(groups, eligible, [500, 300], [50, 200], generator)]

    first, second = (torch.Generator().manual_seed(7) for _ in range(2))
    assert draw(first) == draw(second)
    assert draw(first) != draw(torch.Generator().manual_seed(7))
    assert draw(first) != draw(torch.Generator().manual_seed(8))


@pytest.mark.parametrize(("count", "size"), [(2, 5), (3, 5), (2, 400), (3, 400)])
def test_every_choice_is_equally_likely(count, size):
    # Five groups are eligible, so there are ten choices of two and of three; a rare group takes several draws.
    places = torch.linspace(0, size - 1, 5).long()
    generator = torch.Generator().manual_seed(size + count)
    (groups,) = vectors(size)
    trials = 4000
    seen = dict.fromkeys(itertools.combinations(places.tolist(), count), 0)
    for _ in range(trials):
        eligible = torch.zeros(size, dtype=torch.bool).index_fill_(0, places, True)
        (index,) = sample([groups], [eligible], [5], [count], generator)
        seen[tuple(sorted(index.tolist()))] += 1
    expected = trials / len(seen)
    chi_square = sum((n - expected) ** 2 / expected for n in seen.values())
    assert len(seen) == 10
    assert chi_square < 27.88  # the 0.999 quantile for nine degrees of freedom


def test_sample_refuses_more_than_there_is():
    with pytest.raises(ValueError, match=r"layer.0.weight: cannot choose 4 of 3 groups"):
        sample(vectors(5), [torch.ones(5, dtype=torch.bool)], [3], [4], torch.Generator())


# -- cells ----------------------------------------------------------------------------------------------------------


@given(st.integers(2, 8), st.lists(VALUES, max_size=64), st.booleans(), st.sampled_from(DTYPES), st.data())
def test_largest_in_cells_is_a_stable_sort_of_each(size, values, one_count, dtype, data):
    values = values[: len(values) // size * size]
    scores = torch.tensor(values, dtype=dtype)
    cells = len(values) // size
    counts = data.draw(
        st.lists(st.integers(0, size), min_size=1 if one_count else cells, max_size=1 if one_count else cells)
    )
    found = largest_in_cells(scores, torch.tensor(counts, dtype=torch.int64), size).view(-1, size).tolist()
    for cell, (row, chosen) in enumerate(zip(scores.view(-1, size).tolist(), found, strict=True)):
        order = sorted(range(size), key=lambda i: (-row[i], i))
        assert {i for i, taken in enumerate(chosen) if taken} == set(order[: counts[0 if one_count else cell]])
