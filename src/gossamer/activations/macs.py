"""Multiply-accumulates of layers, and how many of them multiply a zero of the layer's input."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.activations.counts import split_samples
from gossamer.activations.measurements import fraction

LAYERS = (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear)
"""The layers whose multiply-accumulates are counted; `_ConvNd` is every convolution, transposed ones too."""


class MacCounter:
    """Counts the multiply-accumulates of one layer over its calls.

    A multiply-accumulate is the product of an input with a weight, or in a bilinear layer of two inputs with a weight.
    Those with the zeros that a convolution pads with, and those of a transposed one whose result is cropped, are no
    work on activations: they are counted apart. What other padding modes repeat counts as often as it is read.

    Args:
        layer: One of `LAYERS`.

    Attributes:
        calls: How often it was called.
        elements: Elements of its inputs.
        macs: Multiply-accumulates on them.
        padding: Those with padded zeros, or cropped; with `macs` they are what counters of operations report of this
            layer.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.calls = self.elements = self.macs = self.padding = 0
        self._sums: Tensor | None = None
        self._uses: _Uses | None = None

    def add(self, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Count a call: its inputs, of which a bilinear layer has two, and what it gave."""
        self.calls += 1
        self.elements += sum(x.numel() for x in inputs)
        layer, x = self.layer, inputs[0]
        if isinstance(layer, nn.modules.conv._ConvNd):
            sums = self._add_convolution(layer, x, output)
        elif isinstance(layer, nn.Bilinear):
            first, second = ((x != 0).sum(-1) for x in inputs)
            macs = first.numel() * layer.in1_features * layer.in2_features * layer.out_features
            self.macs += macs
            zeros = sum(x.numel() for x in inputs) - first.sum() - second.sum()
            sums = torch.stack([zeros, macs - (first * second).sum() * layer.out_features])
        else:
            assert isinstance(layer, nn.Linear)
            self.macs += x.numel() * layer.out_features
            zeros = (x == 0).sum()
            sums = torch.stack([zeros, zeros * layer.out_features])
        self._sums = sums if self._sums is None else self._sums + sums

    def _add_convolution(self, layer: nn.modules.conv._ConvNd, x: Tensor, output: Tensor) -> Tensor:
        dims = len(layer.kernel_size)
        x = x.unsqueeze(0) if x.dim() == dims + 1 else x
        size, output_size = tuple(x.shape[2:]), tuple(output.shape[-dims:])
        if self._uses is None or (self._uses.size, self._uses.output_size) != (size, output_size):
            self._uses = _Uses(layer, size, output_size, x.device)
        pairs = x.shape[0] * x.shape[1] * layer.out_channels // layer.groups  # of an input and an output channel
        macs = pairs * self._uses.total
        transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
        self.macs += macs
        self.padding += pairs * prod(layer.kernel_size) * prod(size if transposed else output_size) - macs
        zeros = torch.stack([(part == 0).sum((0, 1)) for part in split_samples(x)]).sum(0)
        saved = (zeros * self._uses.of_positions).sum() * (layer.out_channels // layer.groups)
        return torch.stack([zeros.sum(), saved])

    def row(self) -> dict[str, Any]:
        """See `ActivationMeasurements.layers`."""
        zeros, saved = self._sums.tolist() if self._sums is not None else (0, 0)
        return {
            "elements": self.elements,
            "zeros": zeros,
            "sparsity": fraction(zeros, self.elements),
            "macs": self.macs,
            "saved_macs": saved,
            "saved": fraction(saved, self.macs),
            "padding_macs": self.padding,
        }


class _Uses:
    """`position_uses` for one size of inputs, on their device, and the sum."""

    def __init__(
        self,
        layer: nn.modules.conv._ConvNd,
        size: tuple[int, ...],
        output_size: tuple[int, ...],
        device: torch.device,
    ) -> None:
        self.size, self.output_size = size, output_size
        uses = position_uses(layer, size, output_size)
        self.total = int(uses.sum())
        self.of_positions = uses.to(device)


def position_uses(layer: nn.modules.conv._ConvNd, size: tuple[int, ...], output_size: tuple[int, ...]) -> Tensor:
    """In how many products of one input and one output channel each position of a convolution's input takes part.

    Args:
        layer: The convolution.
        size: Of its input, without samples and channels.
        output_size: Likewise of its output.

    Returns:
        int64 of `size`, on the CPU.
    """
    uses = torch.ones((), dtype=torch.int64)
    for dim, pair in enumerate(zip(size, output_size, strict=True)):
        uses = uses.unsqueeze(-1) * _uses_along(layer, dim, *pair)
    return uses


def _uses_along(layer: nn.modules.conv._ConvNd, dim: int, size: int, output_size: int) -> Tensor:
    """`position_uses` along one dimension; that of several is the product, since a kernel covers a box."""
    transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
    steps = torch.arange(size if transposed else output_size) * layer.stride[dim]
    places = steps.unsqueeze(1) + torch.arange(layer.kernel_size[dim]) * layer.dilation[dim]
    if transposed:
        places -= int(layer.padding[dim])
        return ((places >= 0) & (places < output_size)).sum(1)
    last = 2 * (len(layer.kernel_size) - 1 - dim)
    padding = layer._reversed_padding_repeated_twice[last : last + 2]
    mode, outside = ("constant", size) if layer.padding_mode == "zeros" else (layer.padding_mode, None)
    positions = torch.arange(size, dtype=torch.float64).view(1, 1, size)
    sources = F.pad(positions, padding, mode, outside).flatten().long()
    return torch.bincount(sources[places].flatten(), minlength=size + 1)[:size]
