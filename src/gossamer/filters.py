"""Pictures of a layer's filters while it is trained: how strong their connections are, and which are pruned."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer.activations.figures import new_figure
from gossamer.checks import closest
from gossamer.errors import ConfigurationError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Snapshot = tuple[int, Mapping[str, Tensor], Mapping[str, Tensor]]
"""A step, and the strengths and the masks of weights by name, in the weights' shapes."""

_SNAPSHOTS, _FILTERS, _KERNELS, _INPUTS = 6, 12, 64, 4096
"""The most that are shown: snapshots, filters, kernels of a filter, inputs of an output of a linear layer."""

_WIDTH = 130
"""Connections side by side that can be told apart; of wide filters fewer are shown."""

_DOTS = 8
"""Dots along a side of the place of a connection; the last is left free."""

_GAP = 4
"""Dots between the kernels of a filter; twice as many between filters."""


def filters_figure(snapshots: Sequence[Snapshot], name: str) -> Figure:
    """The filters of a layer over training: a row a snapshot, a column a filter, in which its kernels are tiles.

    The colour of a connection is its strength, on one scale for all rows. An active one fills its place, a pruned one
    is a small square in it. Of a linear layer the filters are its outputs. What is too much is left out, and labels say
    so: the last filters and inputs, and snapshots between the first and the last.

    Args:
        snapshots: In order. A function given to `sparsity.on_update` may append them to a list after each mask update:
            `(update.step, sparsity.methods[0].strengths(), sparsity.masks())`.
        name: Name of the weight, `(filters, inputs, …)`.

    Raises:
        ConfigurationError: No snapshots; this weight is not in them, or has one dimension; or matplotlib is not
            installed.
    """
    if not snapshots:
        raise ConfigurationError(f"{name}: there are no snapshots; train until masks are updated, or take one by hand")
    for step, strengths, masks in snapshots:
        if name not in strengths or name not in masks or strengths[name].shape != masks[name].shape:
            raise ConfigurationError(
                f"{name}: the snapshot of step {step} has no strengths and mask of it, both in its shape"
                f"{closest(name, strengths.keys() & masks.keys())}"
            )
        if strengths[name].dim() < 2:
            raise ConfigurationError(
                f"{name}: has shape {tuple(strengths[name].shape)}; filters are of weights (filters, inputs, …)"
            )
    places = np.linspace(0, len(snapshots) - 1, min(_SNAPSHOTS, len(snapshots))).round().astype(int)
    shown = [(step, strengths[name], masks[name]) for step, strengths, masks in (snapshots[i] for i in places)]
    filters, inputs, *kernel = shown[0][1].shape
    kernels = min(inputs, _KERNELS if kernel else _INPUTS)
    across = kernels if kernel and kernels <= 4 else math.ceil(math.sqrt(kernels))
    columns = max(1, min(filters, _FILTERS, _WIDTH // (across * kernel[-1] if kernel else across)))
    pictures = [_picture(strength, mask, columns, kernels, across) for _, strength, mask in shown]

    height, width = pictures[0].shape
    inches = min(0.12 / _DOTS, 9 / width)  # of a dot
    figure = new_figure(max(4.0, inches * width + 2.2), 0.9 + len(shown) * max(0.5, inches * height + 0.15))
    figure.set_layout_engine("compressed")  # pictures keep their shape
    rows = list(figure.subplots(len(shown), 1, squeeze=False)[:, 0])
    for axes, picture, (step, _, mask) in zip(rows, pictures, shown, strict=True):
        image = axes.imshow(picture, interpolation="nearest", **_colours(pictures))
        label = f"step {step}\n{100 * (mask == 0).float().mean().item():.1f} % pruned"
        axes.set_ylabel(label, fontsize=8, rotation=0, ha="right", va="center")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    rows[-1].set_xticks([(i + 0.5) * width / columns for i in range(columns)], [str(i) for i in range(columns)])
    rows[-1].tick_params(length=0, labelsize=8)
    rows[-1].set_xlabel("filter" + f" (the first {columns} of {filters})" * (columns < filters), fontsize=8)
    some = f", the first {kernels} of {inputs} inputs" * (kernels < inputs)
    figure.suptitle(f"{name}{some}; small squares are pruned", fontsize=9)
    bar = figure.colorbar(image, ax=rows, fraction=0.03, pad=0.02)
    bar.set_label("strength", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return figure


def _picture(strength: Tensor, mask: Tensor, columns: int, kernels: int, across: int) -> np.ndarray:
    """Filters side by side, dots as numbers; NaN where nothing is."""
    kernel = strength.shape[2:]
    # The last dimension of a kernel runs to the right, the others down.
    high, wide = (math.prod(kernel[:-1]), kernel[-1]) if kernel else (1, 1)
    colour, alive = (
        each[:columns, :kernels].detach().cpu().float().reshape(columns, kernels, high, wide, 1, 1)
        for each in (strength, mask)
    )
    dots = torch.full((columns, kernels, high, wide, _DOTS, _DOTS), torch.nan)
    middle = slice(_DOTS // 3, _DOTS - 1 - _DOTS // 3)
    dots[..., :-1, :-1] = torch.where(alive != 0, colour, torch.nan)
    dots[..., middle, middle] = colour
    tiles = dots.transpose(3, 4).reshape(columns, kernels, high * _DOTS, wide * _DOTS)
    gap = _GAP if kernel else 0
    tiles = F.pad(tiles, (0, gap, 0, gap), value=torch.nan)
    tiles = F.pad(tiles, (0, 0, 0, 0, 0, -kernels % across), value=torch.nan)
    grid = tiles.view(columns, -1, across, *tiles.shape[2:]).transpose(2, 3).flatten(3).flatten(1, 2)
    return F.pad(grid, (0, 2 * _GAP), value=torch.nan).transpose(0, 1).flatten(1).numpy()


def _colours(pictures: Sequence[np.ndarray]) -> dict[str, Any]:
    low, high = float(np.nanmin(pictures)), float(np.nanmax(pictures))
    if low < 0:  # correlations: grey is none
        return {"cmap": "coolwarm", "vmin": -max(-low, high), "vmax": max(-low, high)}
    return {"cmap": "viridis", "vmin": low, "vmax": high}
