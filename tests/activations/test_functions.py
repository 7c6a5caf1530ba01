"""Ready-made functions of an ActivationSparsifier, against the formulas over all samples, and element by element."""

from __future__ import annotations

import copy
import pickle
from math import floor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gossamer as gs
from gossamer.activations.functions import (
    FUNCTIONS,
    Aggregate,
    Max,
    Mean,
    Quantile,
    RowByRow,
    batch_mean,
    channel_mean,
    magnitude,
    quantile,
    top_fraction,
)

SIZES = st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=3)
"""Sizes of the batches that each of some processes sees."""


def batches(sizes: list[list[int]], seed: int, dtype: torch.dtype = torch.float64) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(n, 2, 3, generator=generator, dtype=dtype) for n in each] for each in sizes]


def aggregated(aggregate: Aggregate, ranks: list[list[torch.Tensor]]) -> torch.Tensor:
    """As an ActivationSparsifier does it."""
    kept = []
    for seen in ranks:
        state = aggregate.start(seen[0])
        for x in seen[1:]:
            state = aggregate.update(state, x)
        kept.append(state)
    whole = kept[0]
    for part in kept[1:]:
        whole = aggregate.join(whole, part)
    return aggregate.finish(whole)


@settings(max_examples=30, deadline=None)
@given(sizes=SIZES, seed=st.integers(0, 100), absolute=st.booleans(), q=st.floats(0, 1))
def test_aggregates_are_those_of_all_samples_however_they_come(
    sizes: list[list[int]], seed: int, absolute: bool, q: float
) -> None:
    ranks = batches(sizes, seed)
    samples = torch.cat([x for seen in ranks for x in seen])
    samples = samples.abs() if absolute else samples
    expected = {
        Mean(absolute=absolute): samples.mean(0, keepdim=True),
        Max(absolute=absolute): samples.amax(0, keepdim=True),
        Quantile(q, absolute=absolute): torch.quantile(samples, q, 0, keepdim=True),
    }
    for aggregate, values in expected.items():
        torch.testing.assert_close(aggregated(aggregate, ranks), values)


@settings(max_examples=30, deadline=None)
@given(sizes=SIZES, seed=st.integers(0, 100), decay=st.floats(0.1, 1))
def test_the_running_mean_weighs_samples_by_the_batches_after_them(
    sizes: list[list[int]], seed: int, decay: float
) -> None:
    ranks = batches(sizes, seed)
    total, weights = torch.zeros(1, 2, 3, dtype=torch.float64), 0.0
    for seen in ranks:
        for place, x in enumerate(seen):
            for sample in x:
                weight = decay ** (len(seen) - 1 - place)
                total, weights = total + weight * sample, weights + weight
    torch.testing.assert_close(aggregated(Mean(decay), ranks), total / weights)


@pytest.mark.parametrize("aggregate", FUNCTIONS["aggregate_fn"].values(), ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_aggregated_in_single(aggregate: Aggregate, dtype: torch.dtype) -> None:
    x = torch.full((50, 2), 1.0, dtype=dtype)
    x[0] = 3.0
    found = aggregated(aggregate, [[x] * 100])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, aggregated(aggregate, [[x.double()] * 100]).float())


@pytest.mark.parametrize("aggregate", FUNCTIONS["aggregate_fn"].values(), ids=str)
def test_what_is_kept_is_no_view_of_the_inputs(aggregate: Aggregate) -> None:
    x = torch.randn(1, 3)
    kept = aggregate.start(x)
    before = kept.clone()
    x.zero_()
    assert kept.equal(before)


def test_a_function_of_two_batches_leaves_rows_that_one_lacks() -> None:
    large, small = torch.randn(4, 3), torch.randn(2, 3)
    for pair in ((large, small), (small, large)):
        found = RowByRow(torch.maximum).update(RowByRow(torch.maximum).start(pair[0]), pair[1])
        assert found.equal(torch.cat([torch.maximum(large[:2], small), large[2:]]))


def test_reductions_keep_the_number_of_dimensions() -> None:
    x = torch.randn(5, 3, 2, 4)
    torch.testing.assert_close(batch_mean(x), x.mean(0)[None])
    by_hand = torch.stack([x[:, c].abs().mean() for c in range(3)])
    torch.testing.assert_close(channel_mean(x), by_hand.view(1, 3, 1, 1))
    by_hand = torch.stack([x[..., c].abs().mean() for c in range(4)])
    torch.testing.assert_close(channel_mean(x, dim=-1), by_hand.view(1, 1, 1, 4))


def largest_by_hand(values: list[float], count: int) -> list[bool]:
    order = sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))
    return [i in order[:count] for i in range(len(values))]


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 4), st.integers(1, 3), st.integers(1, 4)),
    fraction=st.floats(0.01, 1),
    dim=st.sampled_from([None, 0, 1, 3, -1]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int64]),
    seed=st.integers(0, 100),
)
def test_the_top_fraction_is_exact_and_takes_the_first_of_equals(
    shape: tuple[int, ...], fraction: float, dim: int | None, dtype: torch.dtype, seed: int
) -> None:
    x = torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    slices = [x] if dim is None else x.unbind(dim)
    count = floor(fraction * slices[0].numel() + 1e-9)
    if not count:
        with pytest.raises(gs.ConfigurationError, match="lets none pass; give at least"):
            top_fraction(x, fraction, dim)
        return
    mask = top_fraction(x, fraction, dim)
    assert (mask.shape, mask.dtype) == (x.shape, torch.bool)
    for part, chosen in zip(slices, [mask] if dim is None else mask.unbind(dim), strict=True):
        assert chosen.flatten().tolist() == largest_by_hand(part.flatten().tolist(), count)


@settings(max_examples=40, deadline=None)
@given(q=st.floats(0, 1), dim=st.sampled_from([None, 1]), seed=st.integers(0, 100))
def test_the_quantile_mask_is_that_of_torch(q: float, dim: int | None, seed: int) -> None:
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    slices = [x] if dim is None else x.unbind(dim)
    masks = [quantile(x, q, dim)] if dim is None else quantile(x, q, dim).unbind(dim)
    for part, mask in zip(slices, masks, strict=True):
        sizes = part.abs()
        least = torch.quantile(sizes, q)
        near = torch.isclose(sizes, least, rtol=1e-12)  # interpolation may round to either side of a value
        assert mask[~near].equal((sizes >= least)[~near])


def test_magnitudes_above_the_threshold_pass() -> None:
    assert magnitude(torch.tensor([-2.0, -1.0, 0.0, 1.0, 1.5]), 1.0).tolist() == [True, False, False, False, True]


@pytest.mark.parametrize("aggregate", FUNCTIONS["aggregate_fn"].values(), ids=str)
def test_aggregates_are_copied_and_pickled(aggregate: Aggregate) -> None:
    assert copy.deepcopy(aggregate) == pickle.loads(pickle.dumps(aggregate)) == aggregate


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Mean(0.0), "decay: must be above 0"),
        (lambda: Mean(1.5), r"decay: expected a number in \[0, 1\], got 1.5"),
        (lambda: Mean(absolute=1), "absolute: expected True or False, got 1"),
        (lambda: Quantile(2), r"q: expected a number in \[0, 1\], got 2"),
        (lambda: top_fraction(torch.ones(3), 1.5), r"fraction: expected a number in \[0, 1\], got 1.5"),
        (lambda: top_fraction(torch.ones(3), 0.3), "fraction=0.3 of 3 lets none pass; give at least 0.3333"),
        (lambda: top_fraction(torch.ones(3), 1.0, dim=1), r"dim=1: what was reduced has shape \(3,\)"),
        (lambda: quantile(torch.ones(3), -0.1), r"q: expected a number in \[0, 1\], got -0.1"),
    ],
)
def test_bad_arguments_are_named(call: object, message: str) -> None:
    with pytest.raises(gs.ConfigurationError, match=message):
        call()
