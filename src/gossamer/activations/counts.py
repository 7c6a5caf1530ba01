"""Running counts of one site's activations; they take the same memory however many batches there are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gossamer.activations.lossy import CHILD
from gossamer.activations.measurements import fraction
from gossamer.nn.lossy import LossyHardSparsifier, LossySparsifier

SAMPLE_BINS = 20
"""Bins of samples' fractions of zeros."""

_BINS = 1024
"""Bins of magnitudes: the exponent and the first two bits of the mantissa of a number of single precision."""

_FINITE = 1020
"""The first bin of infinity and NaN."""

_CHUNK = 1 << 18
"""Elements that are binned at a time on the CPU: few enough to stay in the cache."""


class SiteCounter:
    """Counts what one module gives, over its calls.

    Args:
        module: The module.

    Attributes:
        calls: How often it was called.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.calls = self.elements = 0
        self._samples = 0
        self._channels: int | None = 0  # `None` where calls differ
        self._channel_elements = 0
        self._sums: _Sums | None = None

    def add(self, x: Tensor, dim: int) -> None:
        """Count a call's output, whose channels run along `dim`."""
        self.calls += 1
        if not x.numel():
            return
        x = x.reshape(-1, 1) if x.dim() < 2 else x.movedim(dim, 1)
        if self._sums is None:
            self._sums = _Sums(x)
            self._channels = x.shape[1]
        elif self._channels != x.shape[1]:
            self._channels = None
        nonzero = (x != 0).flatten(2).sum(2) if x.dim() > 2 else (x != 0).long()  # (samples, channels)
        self._sums.add(x, nonzero, self._samples, self._channels is not None)
        self.elements += x.numel()
        self._samples += len(x)
        self._channel_elements += x.numel() // x.shape[1]

    def row(self) -> dict[str, Any]:
        """See `ActivationMeasurements.sites`."""
        row: dict[str, Any] = {"elements": self.elements}
        if self._sums is None:
            bins, channels, sample_bins = [0] * (2 * _BINS), [], [0] * SAMPLE_BINS
            nonzero, l1, mean, squares, least, most = 0, 0.0, 0.0, 0.0, 0.0, 0.0
        else:
            bins, channels, sample_bins = (each.tolist() for each in self._sums.counts())
            nonzero = int(self._sums.nonzero)
            l1, mean, squares, least, most = self._sums.moments()
        zeros = self.elements - nonzero
        known = self._channels is not None
        some = bool(self._samples)
        non_finite = sum(bins[_FINITE:_BINS]) + sum(bins[_BINS + _FINITE :])
        return row | {
            "zeros": zeros,
            "sparsity": fraction(zeros, self.elements),
            "l0": nonzero,
            "l1": l1,
            "mean_magnitude": fraction(l1, self.elements - non_finite),
            "non_finite": non_finite,
            "channels": self._channels,
            "dead_channels": [i for i, count in enumerate(channels) if not count] if known else None,
            "channel_sparsity": [1 - count / self._channel_elements for count in channels] if known else None,
            "samples": {
                "count": self._samples,
                "mean": mean if some else None,
                "std": (squares / self._samples) ** 0.5 if some else None,
                "min": least if some else None,
                "max": most if some else None,
                "histogram": sample_bins,
            },
            "thresholds": thresholds(self.module),
            "histogram": _trimmed(bins, zeros),
        }


class _Sums:
    """What is summed on the device of the activations."""

    def __init__(self, x: Tensor) -> None:
        zero = torch.zeros((), dtype=torch.float64, device=x.device)
        self.nonzero = torch.zeros((), dtype=torch.int64, device=x.device)
        self.l1, self.mean, self.squares = zero.clone(), zero.clone(), zero.clone()
        self.least, self.most = zero + 1, zero.clone()
        self.of_channels = self.nonzero.new_zeros(x.shape[1])
        self.of_samples = self.nonzero.new_zeros(SAMPLE_BINS)
        self.bins = self.nonzero.new_zeros(2 * _BINS)

    def add(self, x: Tensor, nonzero: Tensor, samples: int, same_channels: bool) -> None:
        if same_channels:
            self.of_channels += nonzero.sum(0)
        self.nonzero += nonzero.sum()
        self._add_samples(1 - nonzero.sum(1).double() / (x.numel() // len(x)), samples)
        self.l1 += x.abs().nan_to_num_(0, 0, 0).sum(dtype=torch.float64)
        for part in torch.split(x.flatten(), _CHUNK if x.device.type == "cpu" else x.numel()):
            bits = part.float().view(torch.int32)
            index = (bits >> 21).add_(_BINS).long()  # negative values first: their sign is the highest bit
            self.bins.scatter_add_(0, index, self.nonzero.new_ones(1).expand(len(index)))

    def _add_samples(self, sparsity: Tensor, samples: int) -> None:
        """Mean and squared deviations by the pairwise update of Chan et al. (1979), which loses no digits."""
        count = len(sparsity)
        mean = sparsity.mean()
        change = mean - self.mean
        self.squares += (sparsity - mean).square().sum() + change.square() * (samples * count / (samples + count))
        self.mean += change * (count / (samples + count))
        self.least = torch.minimum(self.least, sparsity.min())
        self.most = torch.maximum(self.most, sparsity.max())
        index = (sparsity * SAMPLE_BINS).long().clamp_(max=SAMPLE_BINS - 1)
        self.of_samples.scatter_add_(0, index, torch.ones_like(index))

    def counts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of values in bins, positive ones first, of what is not zero in channels, and of samples in bins."""
        negative, positive = self.bins[:_BINS], self.bins[_BINS:]
        return torch.cat([positive, negative]), self.of_channels, self.of_samples

    def moments(self) -> list[float]:
        sums: list[float] = torch.stack([self.l1, self.mean, self.squares, self.least, self.most]).tolist()
        return sums


def thresholds(module: nn.Module) -> list[float]:
    """Those of a learned threshold, or of the one that a module has; else none."""
    for each in (module, module._modules.get(CHILD)):
        if isinstance(each, LossySparsifier | LossyHardSparsifier):
            found: list[float] = each.eps.detach().abs().double().tolist()
            return found
    return []


def _trimmed(bins: list[int], zeros: int) -> dict[str, list[Any]]:
    """Bins of magnitudes from the first that has a value to the last."""
    positive, negative = bins[:_FINITE], bins[_BINS : _BINS + _FINITE]
    # Bin 0 has the zeros of both signs, and the smallest magnitudes.
    rest = positive[0] + negative[0] - zeros
    positive[0], negative[0] = rest, 0
    filled = [i for i in range(_FINITE) if positive[i] or negative[i]]
    first, last = (filled[0], filled[-1] + 1) if filled else (0, 0)
    edges = torch.arange(first, last + 1, dtype=torch.int32).mul_(1 << 21).view(torch.float32).tolist()
    return {
        "edges": edges if filled else [],
        "negative": negative[first:last],
        "positive": positive[first:last],
    }
