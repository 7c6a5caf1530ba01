"""What every process has kept of a layer's inputs, brought together on all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gossamer.errors import ConfigurationError, OrderError


def over_ranks(kept: Mapping[str, Sequence[Tensor]], kinds: Mapping[str, Any]) -> dict[str, list[list[Tensor]]]:
    """What all processes kept; a collective call where there are several, which then fails on all or none.

    Args:
        kept: For each layer the tensors of this process, which may be of any length along dimension 0; none where it
            kept nothing.
        kinds: For each layer what has to be the same in all processes, as plain values.

    Returns:
        For each layer and each of its tensors one tensor of every process.

    Raises:
        OrderError: A process kept nothing of a layer.
        ConfigurationError: Processes watch other layers, in other ways, or inputs of other shapes.
    """
    mine: dict[str, Any] = {
        name: (kinds[name], [(tuple(part.shape), str(part.dtype)) for part in kept[name]]) for name in sorted(kept)
    }
    together = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    every = [mine]
    if together:
        every = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(every, mine)
    for rank, theirs in enumerate(every):
        _check(every[0], theirs, f" in process {rank}" if together else "")
    if not together:
        return {name: [[part] for part in parts] for name, parts in kept.items()}
    return {
        # In one order in all processes.
        name: [_gathered(part, [theirs[name][1][i][0][0] for theirs in every]) for i, part in enumerate(kept[name])]
        for name in mine
    }


def _check(first: Mapping[str, Any], theirs: Mapping[str, Any], where: str) -> None:
    if list(theirs) != list(first):
        raise ConfigurationError(
            f"processes watch other layers: {list(first)}, and {list(theirs)}{where}; register the same in all"
        )
    for name, (kind, found) in theirs.items():
        first_kind, expected = first[name]
        if kind != first_kind:
            raise ConfigurationError(
                f"{name}: processes watch it in other ways: {first_kind}, and {kind}{where}; register the same in all"
            )
        if not found or not expected:
            where = where if not found else " in process 0"
            raise OrderError(f"{name}: nothing was aggregated since the last step{where}; run a forward pass first")
        if [(shape[1:], dtype) for shape, dtype in found] != [(shape[1:], dtype) for shape, dtype in expected]:
            raise ConfigurationError(
                f"{name}: processes have kept inputs of other shapes: {expected}, and {found}{where}; only "
                "batches of other sizes can be aggregated"
            )


def _gathered(part: Tensor, rows: Sequence[int]) -> list[Tensor]:
    """A tensor of each process, with so many rows."""
    padded = part.new_zeros((max(rows), *part.shape[1:]))
    padded[: len(part)] = part
    whole = [torch.empty_like(padded) for _ in rows]
    dist.all_gather(whole, padded)
    return [each[:count] for each, count in zip(whole, rows, strict=True)]
