"""How the numbers of one tensor lie in a file: dense, or only those that are not zero and where they are.

Everything here is about bits: a number is an unsigned integer of its own width, and zero is the one whose bits are all
zero. So −0.0 and every NaN are values like others, and any type comes back as it was. docs/files.md has the format.

A tensor is seen as `(rows, columns, kernel)`: its first dimension, its second, and all others together.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import numpy as np

from gossamer.bit_packing import Bits, byte_count, pack_numbers, set_bits, unpack_bits, unpack_numbers
from gossamer.errors import StateError

EXPANSION, ROOM = 1024, 1 << 16
"""A tensor may have so many times the bytes that encode it, and so many more: this bounds what a file can ask for."""


@dataclass(frozen=True)
class Encoding(ABC):
    """A way to write a tensor. Its fields are what a reader must know beside shape and type."""

    kind: ClassVar[str]
    parts: ClassVar[tuple[str, ...]]

    def __str__(self) -> str:
        return self.kind

    @abstractmethod
    def check(self, shape: tuple[int, ...]) -> None:
        """Raise a StateError unless a tensor of this shape can be encoded so."""

    @abstractmethod
    def lengths(self, shape: tuple[int, ...]) -> dict[str, int]:
        """Of each part: `values` in numbers of the tensor's type, others in bytes."""

    @abstractmethod
    def encode(self, bits: Bits, shape: tuple[int, ...]) -> dict[str, Bits]:
        """Write the numbers of a tensor, `(numbers,)`, as parts."""

    @abstractmethod
    def decode(self, parts: Mapping[str, Bits], shape: tuple[int, ...]) -> Bits:
        """Undo `encode`, in new memory or in that of `values`; raise a StateError for parts that encode nothing."""

    def size(self, shape: tuple[int, ...], itemsize: int) -> int:
        """Bytes of all parts."""
        lengths = self.lengths(shape)
        return sum(lengths.values()) + lengths["values"] * (itemsize - 1)


@dataclass(frozen=True)
class Dense(Encoding):
    """Every number, in row-major order."""

    kind: ClassVar[str] = "dense"
    parts: ClassVar[tuple[str, ...]] = ("values",)

    def check(self, shape: tuple[int, ...]) -> None:
        """See `Encoding.check`."""

    def lengths(self, shape: tuple[int, ...]) -> dict[str, int]:
        """See `Encoding.lengths`."""
        return {"values": prod(shape)}

    def encode(self, bits: Bits, shape: tuple[int, ...]) -> dict[str, Bits]:
        """See `Encoding.encode`."""
        return {"values": bits}

    def decode(self, parts: Mapping[str, Bits], shape: tuple[int, ...]) -> Bits:
        """See `Encoding.decode`."""
        return parts["values"]


@dataclass(frozen=True)
class Tiled(Encoding):
    """The tiles that are not all zero, whole, in row-major order of the grid of tiles.

    Attributes:
        tile: Rows × columns × positions of a kernel; (1, 1, 1) for single numbers. Tiles at an edge may reach beyond
            the tensor, and have zeros there.
        kept: Number of tiles that are not all zero.
    """

    tile: tuple[int, int, int]
    kept: int

    def __str__(self) -> str:
        return self.kind if self.tile == (1, 1, 1) else f"{self.kind} of {'×'.join(map(str, self.tile))}"

    def check(self, shape: tuple[int, ...]) -> None:
        """See `Encoding.check`."""
        sides = three(shape)
        fits = all(1 <= side <= extent for side, extent in zip(self.tile, sides, strict=True))
        if not fits or sides[2] % self.tile[2]:
            raise StateError(f"tiles of {self.tile} do not fit shape {shape}")
        if not 0 <= self.kept <= prod(self.grid(shape)):
            raise StateError(f"{self.kept} tiles of {prod(self.grid(shape))}")

    def grid(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Number of tiles along rows, columns and kernel."""
        return tuple(-(-extent // side) for extent, side in zip(three(shape), self.tile, strict=True))

    def lengths(self, shape: tuple[int, ...]) -> dict[str, int]:
        """See `Encoding.lengths`."""
        return {"values": self.kept * prod(self.tile)} | self.place_lengths(prod(self.grid(shape)))

    def encode(self, bits: Bits, shape: tuple[int, ...]) -> dict[str, Bits]:
        """See `Encoding.encode`."""
        if self.tile == (1, 1, 1):
            places = np.flatnonzero(bits)
            return {"values": bits[places]} | self.write_places(places, bits.size)
        grid = self.grid(shape)
        padded = bits.reshape(three(shape))
        more = [side * count - extent for side, count, extent in zip(self.tile, grid, padded.shape, strict=True)]
        if any(more):
            padded = np.pad(padded, [(0, each) for each in more])
        nonzero = nonzero_tiles(padded != 0, self.tile)
        places = np.flatnonzero(nonzero)
        tiles = self._tiles(padded, grid)[np.unravel_index(places, grid)]
        return {"values": tiles.reshape(-1)} | self.write_places(places, nonzero.size)

    def decode(self, parts: Mapping[str, Bits], shape: tuple[int, ...]) -> Bits:
        """See `Encoding.decode`."""
        grid, sides, values = self.grid(shape), three(shape), parts["values"]
        places = self.read_places(parts, prod(grid))
        if self.tile == (1, 1, 1):
            bits = np.zeros(prod(shape), values.dtype)
            bits[places] = values
            return bits
        padded = np.zeros([side * count for side, count in zip(self.tile, grid, strict=True)], values.dtype)
        self._tiles(padded, grid)[np.unravel_index(places, grid)] = values.reshape(-1, *self.tile)
        return padded[: sides[0], : sides[1], : sides[2]].reshape(-1)

    def _tiles(self, padded: Bits, grid: tuple[int, ...]) -> Bits:
        """A view `(*grid, *tile)`."""
        r, c, k = self.tile
        return padded.reshape(grid[0], r, grid[1], c, grid[2], k).transpose(0, 2, 4, 1, 3, 5)

    @abstractmethod
    def place_lengths(self, tiles: int) -> dict[str, int]:
        """Bytes of the parts that tell which of so many tiles are kept."""

    @abstractmethod
    def write_places(self, places: Bits, tiles: int) -> dict[str, Bits]:
        """Those parts, from the increasing int64 numbers of the tiles that are kept."""

    @abstractmethod
    def read_places(self, parts: Mapping[str, Bits], tiles: int) -> Bits:
        """Undo `write_places`."""

    def check_places(self, count: int) -> None:
        """Raise a StateError unless so many tiles are the number that is kept."""
        if count != self.kept:
            raise StateError(f"marks {count} places, for {self.kept} values or tiles")


@dataclass(frozen=True)
class Bitmask(Tiled):
    """One bit a tile."""

    kind: ClassVar[str] = "bitmask"
    parts: ClassVar[tuple[str, ...]] = ("values", "mask")

    def place_lengths(self, tiles: int) -> dict[str, int]:
        """See `Tiled.place_lengths`."""
        return {"mask": byte_count(tiles)}

    def write_places(self, places: Bits, tiles: int) -> dict[str, Bits]:
        """See `Tiled.write_places`."""
        return {"mask": set_bits(places, tiles)}

    def read_places(self, parts: Mapping[str, Bits], tiles: int) -> Bits:
        """See `Tiled.read_places`."""
        places = np.flatnonzero(unpack_bits(parts["mask"], tiles))
        self.check_places(places.size)
        return places


@dataclass(frozen=True)
class Positions(Tiled):
    """The numbers of the tiles that are kept, in the code of Elias and Fano.

    The lowest bits of each number stand one after the other. What is left of the i-th, h, is the bit h + i of a mask:
    as the numbers increase, each has a bit of its own. That is about 2 + log2(tiles / kept) bits a tile, where at best
    1.44 + log2(tiles / kept) are needed; it is fixed in length and has no order to get wrong.

    Paper: P. Elias, Efficient storage and retrieval by content and address of static files, J. ACM 21(2), 1974.

    Attributes:
        low_bits: How many of the lowest bits stand by themselves.
    """

    kind: ClassVar[str] = "positions"
    parts: ClassVar[tuple[str, ...]] = ("values", "low", "high")
    low_bits: int

    def check(self, shape: tuple[int, ...]) -> None:
        """See `Encoding.check`."""
        super().check(shape)
        if not 0 <= self.low_bits < 63:
            raise StateError(f"{self.low_bits} low bits")

    def place_lengths(self, tiles: int) -> dict[str, int]:
        """See `Tiled.place_lengths`."""
        return {"low": byte_count(self.kept * self.low_bits), "high": byte_count(self._high_bits(tiles))}

    def write_places(self, places: Bits, tiles: int) -> dict[str, Bits]:
        """See `Tiled.write_places`."""
        low = places & ((1 << self.low_bits) - 1)
        high = (places >> self.low_bits) + np.arange(self.kept)
        return {"low": pack_numbers(low, self.low_bits), "high": set_bits(high, self._high_bits(tiles))}

    def read_places(self, parts: Mapping[str, Bits], tiles: int) -> Bits:
        """See `Tiled.read_places`."""
        high = np.flatnonzero(unpack_bits(parts["high"], self._high_bits(tiles)))
        self.check_places(high.size)
        places: Bits = (high - np.arange(self.kept)) << self.low_bits
        places |= unpack_numbers(parts["low"], self.kept, self.low_bits)
        if self.kept and (places[-1] >= tiles or (places[1:] <= places[:-1]).any()):
            raise StateError(f"positions do not increase, or go beyond {tiles}")
        return places

    def _high_bits(self, tiles: int) -> int:
        return self.kept + ((tiles - 1) >> self.low_bits)


@dataclass(frozen=True)
class Cells(Encoding):
    """`n` numbers of every `m` consecutive ones along a dimension, and the position of each within its cell.

    Where fewer are not zero, zeros fill up.

    Attributes:
        n: Numbers of a cell that are written.
        m: Numbers of a cell.
        dim: The dimension, 0 or 1.
    """

    kind: ClassVar[str] = "cells"
    parts: ClassVar[tuple[str, ...]] = ("values", "places")
    n: int
    m: int
    dim: int

    def __str__(self) -> str:
        return f"{self.kind} {self.n}:{self.m}"

    def check(self, shape: tuple[int, ...]) -> None:
        """See `Encoding.check`."""
        fits = prod(shape) and 1 <= self.n < self.m <= 256 and self.dim in (0, 1)
        if not fits or three(shape)[self.dim] % self.m:
            raise StateError(f"cells {self.n}:{self.m} along dimension {self.dim} do not fit shape {shape}")

    def lengths(self, shape: tuple[int, ...]) -> dict[str, int]:
        """See `Encoding.lengths`."""
        values = prod(shape) // self.m * self.n
        return {"values": values, "places": byte_count(values * self._width)}

    def encode(self, bits: Bits, shape: tuple[int, ...]) -> dict[str, Bits]:
        """See `Encoding.encode`."""
        cells = np.moveaxis(bits.reshape(three(shape)), self.dim, -1).reshape(-1, self.m)
        kept = cells != 0
        if np.count_nonzero(kept) < self.n * len(kept):
            lacking = self.n - kept.sum(1, dtype=np.int16)
            kept |= np.cumsum(~kept, 1, dtype=np.int16) <= lacking[:, None]
        places = np.flatnonzero(kept)
        values = cells.reshape(-1)[places]
        np.remainder(places, self.m, out=places)
        return {"values": values, "places": pack_numbers(places.astype(np.uint8), self._width)}

    def decode(self, parts: Mapping[str, Bits], shape: tuple[int, ...]) -> Bits:
        """See `Encoding.decode`."""
        values, sides = parts["values"], three(shape)
        places = unpack_numbers(parts["places"], values.size, self._width).reshape(-1, self.n)
        if (places >= self.m).any() or (places[:, 1:] <= places[:, :-1]).any():
            raise StateError(f"positions in cells of {self.m} do not increase, or go beyond")
        cells = np.zeros((len(places), self.m), values.dtype)
        np.put_along_axis(cells, places, values.reshape(places.shape), 1)
        lines = [side for dim, side in enumerate(sides) if dim != self.dim]
        return np.moveaxis(cells.reshape(*lines, sides[self.dim]), -1, self.dim).reshape(-1)

    @property
    def _width(self) -> int:
        """Bits of a position."""
        return (self.m - 1).bit_length()


_KINDS: dict[str, type[Encoding]] = {each.kind: each for each in (Dense, Cells, Bitmask, Positions)}


def describe(encoding: Encoding) -> dict[str, Any]:
    """An encoding as JSON values."""
    return {"encoding": encoding.kind} | dataclasses.asdict(encoding)


def parse(described: Mapping[str, Any], shape: tuple[int, ...], itemsize: int) -> Encoding:
    """Undo `describe`; raise a StateError for what encodes no tensor of this shape, or too large a one."""
    kind = _KINDS.get(described["encoding"]) if isinstance(described.get("encoding"), str) else None
    if kind is None:
        raise StateError(f"unknown encoding {described.get('encoding')!r}, known are {', '.join(_KINDS)}")
    fields = {name: value for name, value in described.items() if name != "encoding"}
    if fields.keys() != {field.name for field in dataclasses.fields(kind)}:
        raise StateError(f"encoding {kind.kind} with {sorted(fields)}")
    tile = fields.get("tile", [1, 1, 1])
    numbers = [value for name, value in fields.items() if name != "tile"]
    if not isinstance(tile, list) or len(tile) != 3 or any(type(number) is not int for number in numbers + tile):
        raise StateError(f"encoding {kind.kind} with {fields}")
    encoding = kind(**fields | ({"tile": tuple(tile)} if "tile" in fields else {}))
    encoding.check(shape)
    if not bounded(encoding, shape, itemsize):
        raise StateError(f"shape {shape} has more than {EXPANSION} times the bytes that encode it")
    return encoding


def nonzero_tiles(nonzero: Bits, tile: tuple[int, int, int]) -> Bits:
    """Which tiles have something that is not zero: `(rows, columns, kernel)` → grid of tiles."""
    for dim, side in enumerate(tile):
        if side >= nonzero.shape[dim]:
            nonzero = np.logical_or.reduce(nonzero, dim, keepdims=True) if side > 1 else nonzero
        else:  # many times faster than `np.logical_or.reduceat`
            lines = np.moveaxis(nonzero, dim, 0)
            found = lines[::side].copy() if side > 1 else lines
            for i in range(1, side):
                part = lines[i::side]
                found[: len(part)] |= part
            nonzero = np.moveaxis(found, 0, dim)
    return nonzero


def bounded(encoding: Encoding, shape: tuple[int, ...], itemsize: int) -> bool:
    """Whether the tensor is not too large for the bytes that encode it."""
    return prod(shape) * itemsize <= EXPANSION * encoding.size(shape, itemsize) + ROOM


def three(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """The extents of rows, columns and kernel."""
    return prod(shape[:1]), prod(shape[1:2]), prod(shape[2:])
