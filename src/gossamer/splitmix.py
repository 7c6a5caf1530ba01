"""Random numbers that follow from a position and a seed alone: the same on every device, compiled or not."""

from __future__ import annotations

import torch
from torch import Tensor

_STEP = 0x9E3779B97F4A7C15 - (1 << 64)  # as a signed number
_FIRST, _SECOND = 0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64)
_POSITIVE = (1 << 63) - 1


def splitmix(positions: Tensor, seed: int | Tensor) -> Tensor:
    """The output of splitmix64 (Steele et al., 2014) at each position, without its sign bit.

    Args:
        positions: int64, at least 0.
        seed: At least 0; a number, or an int64 tensor of one.

    Returns:
        int64, of the shape of `positions`, uniform in [0, 2⁶³).
    """
    start = seed if isinstance(seed, Tensor) else torch.tensor(seed, device=positions.device)
    return _mix((positions + 1) * _STEP + _mix(start)) & _POSITIVE


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _FIRST
    x = (x ^ _shift(x, 27)) * _SECOND
    return x ^ _shift(x, 31)


def _shift(x: Tensor, count: int) -> Tensor:
    """Shift to the right as if without a sign."""
    return (x >> count) & ((1 << (64 - count)) - 1)
