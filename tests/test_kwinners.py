"""k-winners, against loops over samples, positions and channels."""

from __future__ import annotations

import copy
import io
from math import exp, floor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import gossamer as gs
from gossamer.nn import KWinners


def by_hand(x: torch.Tensor, duty: list[float], density: float, boost: float, local: bool) -> torch.Tensor:
    """The winners one by one: float64, of the shape of `x`."""
    samples = x.double().reshape(*x.shape[:2], -1)
    keep = torch.zeros_like(samples)
    for n, sample in enumerate(samples):
        factors = [exp(boost * (density - each)) for each in duty]
        places = [(c, p) for c in range(sample.shape[0]) for p in range(sample.shape[1])]
        groups = [[each for each in places if each[1] == p] for p in range(sample.shape[1])] if local else [places]
        for group in groups:
            # `sorted` is stable, so that of equal ones the first win.
            order = sorted(group, key=lambda each: -float(sample[each]) * factors[each[0]])
            for each in order[: floor(density * len(group) + 1e-9)]:
                keep[n, *each] = sample[each]
    return keep.view(x.shape)


def frequencies(y: torch.Tensor) -> torch.Tensor:
    return y.ne(0).transpose(0, 1).flatten(1).double().mean(1)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.sampled_from([(3, 7), (1, 5), (2, 4, 3), (3, 5, 2, 3), (2, 3, 2, 2, 2)]),
    density=st.floats(0.05, 1),
    boost=st.sampled_from([0.0, 1.0, 30.0]),
    local=st.booleans(),
    ties=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_winners_and_duty_cycles_are_those_found_one_by_one(
    shape: tuple[int, ...], density: float, boost: float, local: bool, ties: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    layer = KWinners(shape[1], density, local=local, boost=boost, period=10)
    size = shape[1] if local else torch.Size(shape[1:]).numel()
    count = floor(density * size + 1e-9)
    if not count:
        with pytest.raises(gs.ConfigurationError, match="lets none win; give at least"):
            layer(torch.randn(shape))
        return
    duty, seen = torch.zeros(shape[1], dtype=torch.float64), 0
    for _ in range(5):
        x = torch.randn(shape).double()
        x = x.mul(2).round() if ties and not boost else x  # with boosting, equal activations are not equal any more
        y = layer(x)
        expected = by_hand(x, layer.duty_cycle_in_use.tolist(), density, boost, local)
        assert y.equal(expected)
        torch.testing.assert_close(layer.duty_cycle_in_use.double(), duty, rtol=1e-5, atol=1e-6)
        seen += len(x)
        weight = min(1.0, len(x) / min(seen, 10))
        duty = duty + weight * (frequencies(y) - duty)
    torch.testing.assert_close(layer.duty_cycle.double(), duty, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_exactly_so_many_win_also_where_all_are_equal(local: bool, dtype: torch.dtype) -> None:
    layer = KWinners(10, 0.3, local=local).to(dtype)
    y = layer(torch.ones(4, 10, 3, 5, dtype=dtype))
    assert y.dtype == dtype
    won = y.ne(0)
    assert (won.sum(1).eq(3).all() if local else won.flatten(1).sum(1).eq(45).all()).item()


def test_evaluation_has_more_winners_and_learns_nothing() -> None:
    layer = KWinners(20, 0.2, inference_factor=1.5)
    layer(torch.randn(8, 20))
    before = copy.deepcopy(layer.state_dict())
    layer.eval()
    x = torch.randn(8, 20)
    y = layer(x)
    assert y.ne(0).sum(1).tolist() == [6] * 8
    expected = by_hand(x, layer.duty_cycle.tolist(), 0.3, 1.0, False)  # boosted in evaluation too
    assert y.double().equal(expected)
    assert all(value.equal(before[key]) for key, value in layer.state_dict().items())
    assert KWinners(20, 0.8, inference_factor=1.5).eval()(x).equal(x)


def test_gradients_go_through_winners_alone_and_unboosted() -> None:
    layer = KWinners(6, 0.5, boost=5.0)
    layer(torch.randn(4, 6))
    x = torch.randn(4, 6, requires_grad=True)
    y = layer(x)
    (y * 3).sum().backward()
    assert x.grad.equal(torch.where(y != 0, 3.0, 0.0))
    assert y[y != 0].equal(x[y != 0])


def test_boosting_brings_in_units_that_win_seldom() -> None:
    means = torch.linspace(0, 1, 16)  # unboosted, the last ones would win always
    used = {}
    for boost in (0.0, 20.0):
        torch.manual_seed(0)
        layer = KWinners(16, 0.25, boost=boost)
        for _ in range(300):
            layer(means + 0.05 * torch.randn(10, 16))
        used[boost] = int((layer.duty_cycle > 0.05).sum())
    assert used[0.0] <= 5
    assert used[20.0] >= 10


def test_boosting_weakens_by_the_epoch() -> None:
    layer = KWinners(4, 0.5, boost=2.0, boost_decay=0.5)
    for expected in (1.0, 0.5):
        layer.decay_boost()
        assert float(layer.boost) == expected
    other = KWinners(4, 0.5)
    other.load_state_dict(layer.state_dict())
    assert float(other.boost) == 0.5


def test_the_largest_win_whatever_the_boost_where_duty_cycles_are_equal() -> None:
    layer = KWinners(4, 0.5, boost=1e4)
    layer.duty_cycle.fill_(0.5)
    assert layer(torch.tensor([[1.0, 2.0, 3.0, 4.0]])).tolist() == [[0, 0, 3, 4]]


@pytest.mark.parametrize("local", [False, True])
def test_the_memory_format_stays(local: bool) -> None:
    x = torch.randn(2, 4, 3, 3)
    y = KWinners(4, 0.5, local=local)(x.to(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert y.equal(KWinners(4, 0.5, local=local)(x))


def test_zeros_do_not_win() -> None:
    layer = KWinners(4, 0.5)
    layer(torch.tensor([[0.0, 0.0, 0.0, 1.0]]))
    assert layer.duty_cycle.tolist() == [0, 0, 0, 1]


def test_nan_is_not_hidden() -> None:
    x = torch.tensor([[1.0, 2.0, torch.nan, 3.0]])
    assert KWinners(4, 0.5)(x).isnan().tolist() == [[False, False, True, False]]


def test_an_empty_batch_teaches_nothing() -> None:
    layer = KWinners(4, 0.5)
    layer(torch.randn(3, 4))
    before = layer.duty_cycle.clone()
    assert layer(torch.empty(0, 4)).shape == (0, 4)
    assert layer.duty_cycle.equal(before)


def test_half_precision_modules_keep_duty_cycles_in_single() -> None:
    layer = KWinners(8, 0.25, boost=1 / 3)
    layer(torch.randn(3, 8))
    before = copy.deepcopy(layer)
    for each in (layer.half(), layer.bfloat16(), layer.double()):
        assert each.duty_cycle.equal(before.duty_cycle)
        assert each.boost.equal(before.boost)
    layer = KWinners(8, 0.25).half()
    for _ in range(50):
        layer(torch.randn(100, 8).half())
    assert layer.duty_cycle.dtype == layer.boost.dtype == torch.float32
    torch.testing.assert_close(layer.duty_cycle.mean(), torch.tensor(0.25))


def test_it_goes_on_after_saving_and_copying() -> None:
    torch.manual_seed(0)
    layer = KWinners(6, 0.4, boost=10.0)
    for _ in range(3):
        layer(torch.randn(4, 6, 2, 2))
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other, third = KWinners(6, 0.4), copy.deepcopy(layer)
    other.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(3):
        x = torch.randn(4, 6, 2, 2)
        y = layer(x)
        assert y.equal(other(x))
        assert y.equal(third(x))


def test_a_pass_that_is_computed_again_has_the_same_winners() -> None:
    torch.manual_seed(0)
    linear, layer = nn.Linear(5, 12), KWinners(12, 0.3, boost=30.0)
    plain = copy.deepcopy((linear, layer))
    for _ in range(4):
        x = torch.randn(6, 5)
        checkpoint(lambda x: layer(linear(x)).square(), x, use_reentrant=False).sum().backward()
        plain[1](plain[0](x)).square().sum().backward()
    assert linear.weight.grad.equal(plain[0].weight.grad)
    assert layer.duty_cycle.equal(plain[1].duty_cycle)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("local", [False, True])
def test_compiled_in_one_graph_once(local: bool) -> None:
    plain, other = (KWinners(5, 0.3, local=local, boost=10.0) for _ in range(2))
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for step in range(4):
        x = torch.randn(2, 5, 4, 3)
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            assert compiled(x).equal(plain(x))
        for each in (plain, other):
            each.decay_boost()
    torch.testing.assert_close(other.duty_cycle, plain.duty_cycle)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: KWinners(0, 0.5), "channels: expected an integer of at least 1, got 0"),
        (lambda: KWinners(4, 0.0), "density: must be above 0"),
        (lambda: KWinners(4, 1.5), r"density: expected a number in \[0, 1\], got 1.5"),
        (lambda: KWinners(4, 0.5, inference_factor=0), "inference_factor: must be above 0"),
        (lambda: KWinners(4, 0.5, local=1), "local: expected True or False"),
        (lambda: KWinners(4, 0.5, boost=-1), "boost: expected a number"),
        (lambda: KWinners(4, 0.5, boost_decay=1.5), "boost_decay: expected a number"),
        (lambda: KWinners(4, 0.5, period=0), "period: expected an integer of at least 1"),
        (lambda: KWinners(4, 0.5)(torch.ones(2, 3)), r"\(N, 4, …\), got torch.float32, \(2, 3\)"),
        (lambda: KWinners(4, 0.5)(torch.ones(4)), r"\(N, 4, …\), got torch.float32, \(4,\)"),
        (lambda: KWinners(4, 0.5)(torch.ones(2, 4, dtype=torch.int64)), "floating point .* got torch.int64"),
        (lambda: KWinners(4, 0.2)(torch.ones(2, 4)), "density 0.2 of 4 activations lets none win; give at least 0.25"),
    ],
)
def test_bad_arguments_are_named(call: object, message: str) -> None:
    with pytest.raises(gs.ConfigurationError, match=message):
        call()


def test_a_refused_input_teaches_nothing() -> None:
    layer = KWinners(4, 0.2)
    with pytest.raises(gs.ConfigurationError):
        layer(torch.ones(2, 4))
    assert not layer.samples
    assert not layer.duty_cycle.any()
