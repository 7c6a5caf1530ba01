"""Running counts of one site's activations; they take the same memory however many batches there are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.activations.lossy import CHILD
from gossamer.activations.measurements import fraction
from gossamer.nn.lossy import FATReLU, LossyHardSparsifier, LossySparsifier

THRESHOLDS = (LossySparsifier, LossyHardSparsifier, FATReLU)
"""The modules with thresholds `|eps|`."""

SAMPLE_BINS = 20
"""Bins of samples' fractions of zeros."""

_BINS = 1024
"""Bins of magnitudes: by the exponent and the first two bits of the mantissa of a number of single precision."""

_FINITE = 1020
"""The first bin of infinity and NaN."""

_MOST = torch.finfo(torch.float32).max

_CHUNK = 1 << 18
"""Elements that are counted at a time on the CPU: few enough to stay in the cache."""


class SiteCounter:
    """Counts what one module gives, over its calls.

    All is summed on the device of the activations, in 64 bits, and read when a row is asked for.

    Args:
        module: The module.

    Attributes:
        calls: How often it was called.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.calls = self.elements = self.samples = 0
        self.channels: int | None = 0
        self._l1: Tensor | float = 0.0
        self._bins: Tensor | int = 0
        self._nonzero: Tensor | int = 0
        self._of_channels: Tensor | int = 0
        self._of_samples: Tensor | int = 0
        # Mean and squared deviations of samples' fractions of zeros, the least and the largest.
        self._mean: Tensor | float = 0.0
        self._squares: Tensor | float = 0.0
        self._least: Tensor | float = 1.0
        self._most: Tensor | float = 0.0

    def add(self, x: Tensor, dim: int) -> None:
        """Count a call's output: samples along the first dimension, and channels along `dim`."""
        self.calls += 1
        if not x.numel():
            return
        x = x.reshape(-1, 1) if x.dim() < 2 else x.movedim(dim, 1)
        if self.channels != x.shape[1]:
            self.channels = None if self.elements else x.shape[1]
        for part in split_samples(x):
            nonzero = (part != 0).reshape(*part.shape[:2], -1).sum(2)
            if self.channels is not None:
                self._of_channels = self._of_channels + nonzero.sum(0)
            self._add_samples(nonzero.sum(1), part[0].numel())
            self._l1 = self._l1 + part.abs().nan_to_num_(0, 0, 0).sum(dtype=torch.float64)
            if part.dtype == torch.float64:  # what is finite stays so
                part = torch.where(part.isinf(), part, part.clamp(-_MOST, _MOST))
            bits = part.float().flatten().add(0.0).view(torch.int32)  # without negative zeros
            self._bins = self._bins + _count(bits.bitwise_right_shift(21).add_(_BINS), 2 * _BINS)
            self.elements += part.numel()

    def _add_samples(self, nonzero: Tensor, size: int) -> None:
        """Mean and squared deviations by the update of Chan et al. (1979), which loses no digits."""
        before, count = self.samples, len(nonzero)
        self.samples += count
        self._nonzero = self._nonzero + nonzero.sum()
        zeros = size - nonzero
        bins = zeros.mul(SAMPLE_BINS).div(size, rounding_mode="floor").clamp_(max=SAMPLE_BINS - 1)
        self._of_samples = self._of_samples + _count(bins, SAMPLE_BINS)
        sparsity = zeros.double() / size
        mean = sparsity.mean()
        change = mean - self._mean
        self._squares = (
            self._squares + (sparsity - mean).square().sum() + change.square() * before * count / self.samples
        )
        self._mean = self._mean + change * count / self.samples
        self._least = sparsity.min().clamp(max=self._least)
        self._most = sparsity.max().clamp(min=self._most)

    def row(self) -> dict[str, Any]:
        """See `ActivationMeasurements.sites`."""
        # Negative values come first: their sign is the highest bit.
        negative, positive = torch.as_tensor(self._bins).expand(2 * _BINS).view(2, _BINS).tolist()
        non_finite = sum(negative[_FINITE:] + positive[_FINITE:])
        zeros, l1 = self.elements - int(self._nonzero), float(self._l1)
        alive = None
        if self.channels is not None:
            alive = torch.as_tensor(self._of_channels).expand(self.channels).tolist()
            of_channel = self.elements // max(1, self.channels)
        moments = (self._mean, (self._squares / max(1, self.samples)) ** 0.5, self._least, self._most)
        values = map(float, moments) if self.samples else [None] * len(moments)
        return {
            "elements": self.elements,
            "zeros": zeros,
            "sparsity": fraction(zeros, self.elements),
            "l0": self.elements - zeros,
            "l1": l1,
            "mean_magnitude": fraction(l1, self.elements - non_finite),
            "non_finite": non_finite,
            "channels": self.channels,
            "dead_channels": None if alive is None else [i for i, count in enumerate(alive) if not count],
            "channel_sparsity": None if alive is None else [1 - count / of_channel for count in alive],
            "samples": {"count": self.samples}
            | dict(zip(("mean", "std", "min", "max"), values, strict=True))
            | {"histogram": torch.as_tensor(self._of_samples).expand(SAMPLE_BINS).tolist()},
            "thresholds": thresholds(self.module),
            "histogram": _histogram(negative[:_FINITE], positive[:_FINITE], zeros),
        }


def split_samples(x: Tensor) -> Iterator[Tensor]:
    """A tensor in parts along its first dimension: on the CPU of about `_CHUNK` elements, elsewhere as it is."""
    rows = _CHUNK // max(1, x.shape[1:].numel()) if x.device.type == "cpu" else len(x)
    return iter(torch.split(x, max(1, rows)))


def thresholds(module: nn.Module) -> list[float]:
    """Those of a learned threshold, or of the one that a module has; else none."""
    for each in (module, module._modules.get(CHILD)):
        if isinstance(each, THRESHOLDS):
            found: list[float] = each.eps.detach().abs().tolist()
            return found
    return []


def _count(index: Tensor, bins: int) -> Tensor:
    """How often each number from 0 to `bins − 1` occurs, int64 `(bins,)`."""
    if index.device.type == "cpu":
        return torch.bincount(index, minlength=bins)
    return _scattered(index, bins)


def _scattered(index: Tensor, bins: int) -> Tensor:
    """`_count` without waiting for the device."""
    ones = torch.ones((), dtype=torch.int64, device=index.device).expand(len(index))
    return torch.zeros(bins, dtype=torch.int64, device=index.device).scatter_add_(0, index.long(), ones)


def _histogram(negative: list[int], positive: list[int], zeros: int) -> dict[str, list[Any]]:
    """Bins of magnitudes from the first that has a value to the last, without zeros, which are in the first of all."""
    positive[0] -= zeros
    filled = [i for i in range(_FINITE) if positive[i] or negative[i]]
    if not filled:
        return {"edges": [], "negative": [], "positive": []}
    inside = slice(filled[0], filled[-1] + 1)
    bits = torch.arange(inside.start, inside.stop + 1, dtype=torch.int32) << 21
    edges = bits.view(torch.float32).clamp(max=_MOST).tolist()
    return {"edges": edges, "negative": negative[inside], "positive": positive[inside]}
