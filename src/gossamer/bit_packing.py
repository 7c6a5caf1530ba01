"""Bits and numbers of few bits, packed into bytes: bit i of all is bit i mod 8 of byte ⌊i/8⌋."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from gossamer.errors import StateError

Bits: TypeAlias = NDArray[Any]
"""Numbers as unsigned integers of their own width, or bytes, or their places as int64."""


def byte_count(bits: int) -> int:
    """How many bytes hold so many bits."""
    return -(-bits // 8)


def set_bits(places: Bits, count: int) -> Bits:
    """So many bits, of which those at the places are set, as bytes: bit i is bit i mod 8 of byte ⌊i/8⌋."""
    bits = np.zeros(count, bool)
    bits[places] = True
    return np.packbits(bits, bitorder="little")


def unpack_bits(packed: Bits, count: int) -> Bits:
    """So many bits of bytes, as bool; raise a StateError where a bit behind them is set."""
    bits = np.unpackbits(packed, bitorder="little")
    if bits[count:].any():
        raise StateError("bits are set beyond the end")
    return bits[:count].view(bool)


def pack_numbers(numbers: Bits, width: int) -> Bits:
    """Numbers of so many bits each, one after the other, the lowest bit first."""
    bits = np.empty((numbers.size, width), bool)
    for i in range(width):
        bits[:, i] = numbers & (1 << i)
    return np.packbits(bits.reshape(-1), bitorder="little")


def unpack_numbers(packed: Bits, count: int, width: int) -> Bits:
    """Undo `pack_numbers`: int64."""
    bits = unpack_bits(packed, count * width).reshape(count, width)
    numbers = np.zeros(count, np.int64)
    for i in range(width):
        numbers |= bits[:, i].astype(np.int64) << i
    return numbers
