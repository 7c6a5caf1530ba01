"""Strengths of connections are what loops over samples, positions and taps count."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import gossamer as gs
from gossamer.scores import coactivation, correlation
from gossamer.strengths import occasions

CONVOLUTIONS = {
    (1, False): nn.Conv1d,
    (2, False): nn.Conv2d,
    (3, False): nn.Conv3d,
    (1, True): nn.ConvTranspose1d,
    (2, True): nn.ConvTranspose2d,
    (3, True): nn.ConvTranspose3d,
}


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    """A convolution of any kind, and an input of it."""
    rank, transposed = draw(st.integers(1, 3)), draw(st.booleans())
    groups = draw(st.integers(1, 2))
    sides = [draw(st.integers(1, 2)) * groups for _ in "io"]
    sizes = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(rank))  # noqa: E731
    kernel, stride, dilation = sizes(1, 3), sizes(1, 2), sizes(1, 2)
    options: dict[str, Any] = {"groups": groups, "stride": stride, "dilation": dilation}
    if transposed:
        options["padding"] = sizes(0, 1)
        options["output_padding"] = tuple(
            draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)
        )
        image = tuple(draw(st.integers(2, 3)) + p for p in options["padding"])
    else:
        options["padding_mode"] = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
        options["padding"] = sizes(0, 1)
        if stride == (1,) * rank:
            options["padding"] = draw(st.sampled_from([options["padding"], "same", "valid"]))
        # As large as the taps reach, and more than what reflection puts around it.
        image = tuple(d * (k - 1) + draw(st.integers(2, 3)) for k, d in zip(kernel, dilation, strict=True))
    layer = CONVOLUTIONS[rank, transposed](*sides, kernel, **options)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    x = torch.randn(draw(st.integers(2, 4)), sides[0], *image, generator=generator)
    return layer, x


def pairs(layer: Any, x: Tensor, y: Tensor) -> Any:
    """For every weight and position it is applied at: the place in the weight, and the tap and output of all samples.

    Read off what the layer does: the output at one position with one weight alone is the tap, times that weight.
    """
    weight = layer.weight.detach()
    bias, layer.bias = layer.bias, None
    try:
        for place in itertools.product(*map(range, weight.shape)):
            with torch.no_grad():
                layer.weight.zero_()
                layer.weight[place] = 1.0
                taps = layer(x)
            transposed = getattr(layer, "transposed", False)
            per_group = weight.shape[1] if transposed else weight.shape[0] // layer.groups
            if transposed:
                output = place[0] // (weight.shape[0] // layer.groups) * per_group + place[1]
                # Where a weight puts nothing: positions that the image of ones leaves at 0.
                with torch.no_grad():
                    there = layer(torch.ones_like(x))[0, output].flatten() > 0
                yield place, taps[:, output].flatten(1)[:, there], y[:, output].flatten(1)[:, there]
            else:
                yield place, taps[:, place[0]].flatten(1), y[:, place[0]].flatten(1)
    finally:
        with torch.no_grad():
            layer.weight.copy_(weight)
        layer.bias = bias


def brute_correlation(layer: Any, x: Tensor, y: Tensor, absolute: bool) -> Tensor:
    found = torch.zeros(layer.weight.shape, dtype=torch.float64)
    positions = math.prod((x if layer.transposed else y).shape[2:])
    for place, taps, out in pairs(layer, x, y):
        total = 0.0
        for a, b in zip(taps.double().numpy().T, out.double().numpy().T, strict=True):
            if a.min() < a.max() and b.min() < b.max():
                value = float(np.corrcoef(a, b)[0, 1])
                total += abs(value) if absolute else value
        found[place] = total / positions
    return found


@given(convolutions(), st.sampled_from([0.0, 0.5, -0.3]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_counts_are_those_of_a_loop_over_weights_and_positions_to_the_bit(
    case: tuple[nn.Module, Tensor], threshold: float, sigmoid: bool
) -> None:
    layer, x = case
    y = layer(x).detach()
    threshold = 0.5 + threshold / 4 if sigmoid else threshold
    expected = torch.zeros(layer.weight.shape)
    for place, taps, out in pairs(layer, x, y):
        a, b = (torch.sigmoid(taps), torch.sigmoid(out)) if sigmoid else (taps, out)
        expected[place] = ((a > threshold) & (b > threshold)).sum()
    assert coactivation(x, y, layer, threshold=threshold, sigmoid=sigmoid).equal(expected)
    assert float(expected.max()) <= occasions(x, y, layer)


@given(convolutions(), st.booleans())
@settings(max_examples=40, deadline=None)
def test_correlations_are_those_of_double_precision(case: tuple[nn.Module, Tensor], absolute: bool) -> None:
    layer, x = case
    y = layer(x).detach()
    found = correlation(x, y, layer, absolute=absolute)
    torch.testing.assert_close(
        found, brute_correlation(layer, x, y, absolute).float(), rtol=0, atol=1e-5, check_dtype=False
    )


@given(st.integers(0, 999), st.sampled_from([(5, 3), (2, 4, 3), (3,)]))
@settings(max_examples=30, deadline=None)
def test_linear_layers_take_all_leading_dimensions_as_samples(seed: int, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(seed)
    layer, x = nn.Linear(3, 2), torch.randn(shape, generator=generator)
    y = layer(x).detach()
    rows, outs = x.reshape(-1, 3), y.reshape(-1, 2)
    expected = [
        [sum(bool(r[i] > 0 and o[j] > 0) for r, o in zip(rows, outs, strict=True)) for i in range(3)] for j in (0, 1)
    ]
    assert coactivation(x, y, layer).tolist() == expected
    if len(rows) > 1:
        whole = np.corrcoef(np.concatenate([rows.double().numpy(), outs.double().numpy()], 1).T)[3:, :3]
        torch.testing.assert_close(correlation(x, y, layer).double(), torch.tensor(whole), rtol=0, atol=1e-5)
        torch.testing.assert_close(
            correlation(x, y, layer, absolute=True).double(), torch.tensor(abs(whole)), rtol=0, atol=1e-5
        )


def test_deviations_are_above_the_mean_of_each_channel() -> None:
    x = torch.tensor([[0.0, 10.0], [1.0, 10.0], [2.0, 10.0], [9.0, 14.0]])
    y = torch.tensor([[-4.0], [-3.0], [-2.0], [5.0]])
    layer = nn.Linear(2, 1)
    assert coactivation(x, y, layer, deviations=1.0).tolist() == [[1.0, 1.0]]
    assert coactivation(x, y, layer, deviations=-0.5).tolist() == [[2.0, 1.0]]  # above 1.2 and 10.1, and above -2.8
    layer = nn.Conv1d(1, 1, 2, padding=1)
    x, y = torch.tensor([[[-4.0, -2.0]]]), torch.tensor([[[1.0, 2.0, 3.0]]])
    # What is padded is 0, and above the mean of the channel, -3; the outputs above theirs are the last.
    assert coactivation(x, y, layer, deviations=0.0).tolist() == [[[1.0, 1.0]]]


def test_what_does_not_vary_is_correlated_with_nothing() -> None:
    layer = nn.Linear(3, 2)
    x = torch.full((7, 3), 0.1)
    x[:, 1] = torch.tensor([1e6 + step for step in range(7)])
    y = torch.stack([torch.arange(7.0), torch.full((7,), 1 / 3)], 1)
    assert correlation(x, y, layer).tolist() == [[0.0, pytest.approx(1.0, abs=1e-5), 0.0], [0.0, 0.0, 0.0]]
    assert correlation(x[:1], y[:1], layer).eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_type_of_number_is_counted_exactly(dtype: torch.dtype) -> None:
    layer, x = nn.Conv2d(2, 3, 3), torch.randn(64, 2, 9, 9)
    y = layer(x).detach()
    expected = coactivation(x.to(dtype).double(), y.to(dtype).double(), layer)
    found = coactivation(x.to(dtype), y.to(dtype), layer)
    assert found.dtype == torch.float32
    assert found.equal(expected.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wide = nn.Linear(8, 4)
        x, y = torch.ones(1000, 8), torch.ones(1000, 4)
        assert coactivation(x, y, wide).eq(1000).all()


def test_an_image_without_a_batch_is_one_sample() -> None:
    layer, x = nn.Conv2d(2, 3, 3, padding=1), torch.randn(2, 5, 5)
    y = layer(x).detach()
    assert coactivation(x, y, layer).equal(coactivation(x[None], y[None], layer))
    assert occasions(x, y, layer) == 25


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(3, 2), (0, 3)),
        (nn.Linear(3, 2), (4, 0, 3)),
        (nn.Conv2d(2, 4, 3, groups=2), (0, 2, 5, 5)),
        (nn.ConvTranspose1d(2, 4, 3, groups=2), (0, 2, 5)),
    ],
)
def test_without_samples_all_strengths_are_zero(layer: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape)
    y = layer(x).detach()
    expected = torch.zeros(layer.weight.shape)
    for options in ({}, {"deviations": 1.0}):
        assert coactivation(x, y, layer, **options).equal(expected)
    for absolute in (False, True):
        assert correlation(x, y, layer, absolute=absolute).equal(expected)
    assert occasions(x, y, layer) == 0


def test_many_positions_are_worked_on_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = nn.Conv2d(2, 3, 3), torch.randn(6, 2, 8, 8)
    y = layer(x).detach()
    whole = correlation(x, y, layer, absolute=True)
    monkeypatch.setattr("gossamer.strengths._CHUNK", 30)
    torch.testing.assert_close(correlation(x, y, layer, absolute=True), whole)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, y, c: coactivation(x, y, nn.ReLU()), r"layer: got a ReLU; .*Linear, Conv1d"),
        (
            lambda x, y, c: coactivation(y, x, c),
            r"Conv2d of 2 inputs and 3 outputs: got an input of shape \(4, 3, 3, 3\)",
        ),
        (lambda x, y, c: correlation(x[:2], y, c), r"Conv2d of 2 inputs and 3 outputs: got an input of shape \(2, 2, "),
        (lambda x, y, c: coactivation(x.int(), y, c), r"torch\.int32"),
        (lambda x, y, c: coactivation(x, y, c, threshold="0"), r"threshold: expected a number"),
        (lambda x, y, c: coactivation(x, y, c, sigmoid=1), r"sigmoid: expected True or False, got 1"),
        (lambda x, y, c: coactivation(x, y, c, threshold=0.1, deviations=1), r"deviations=1 beside a threshold"),
    ],
)
def test_what_cannot_be_measured_is_refused(call: Any, message: str) -> None:
    layer, x = nn.Conv2d(2, 3, 3), torch.randn(4, 2, 5, 5)
    with pytest.raises(gs.ConfigurationError, match=message):
        call(x, layer(x).detach(), layer)
