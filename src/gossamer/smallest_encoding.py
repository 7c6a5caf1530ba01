"""Which encoding takes the fewest bytes for a tensor: every candidate's exact size, from the numbers alone."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import numpy as np

from gossamer.bit_packing import Bits
from gossamer.encodings import Bitmask, Cells, Dense, Encoding, Positions, bounded, nonzero_tiles, three

_BLOCKS = ((4, 1), (8, 1), (16, 1), (1, 4), (1, 8), (1, 16), (4, 4), (8, 8), (16, 16), (32, 32))
_CELLS = (4, 8, 16, 32)
_SAMPLE = 4096  # cells
_HEADER = 100  # bytes that a part takes in the header, about


def smallest(bits: Bits, shape: tuple[int, ...]) -> Encoding:
    """The encoding that takes the fewest bytes, from the numbers alone; of equals the one of the most order."""
    best: Encoding = Dense()
    itemsize, bound = bits.dtype.itemsize, bits.nbytes + _HEADER
    nonzero = (bits != 0).reshape(three(shape))
    if nonzero.all():
        return best
    for encoding in _candidates(nonzero, shape, itemsize):
        size = encoding.size(shape, itemsize) + _HEADER * len(encoding.parts)
        if size < bound and bounded(encoding, shape, itemsize):
            best, bound = encoding, size
    return best


def _candidates(nonzero: Bits, shape: tuple[int, ...], itemsize: int) -> Iterator[Encoding]:
    yield from _cells(nonzero, shape, itemsize)
    for tile, mask in sorted(_tilings(nonzero), key=lambda each: -prod(each[0])):
        kept = int(np.count_nonzero(mask))
        yield Bitmask(tile, kept)
        yield from (Positions(tile, kept, low) for low in range(mask.size.bit_length()))


def _cells(nonzero: Bits, shape: tuple[int, ...], itemsize: int) -> Iterator[Cells]:
    """N:M for every M that divides a dimension, with the N that its fullest cell needs, where that saves anything."""
    for dim in (1, 0):
        lines = np.moveaxis(nonzero, dim, -1)
        for m in (each for each in _CELLS if lines.shape[-1] and lines.shape[-1] % each == 0):
            rows = max(1, _SAMPLE * m // max(1, lines[0].size))
            for some in (lines[:rows], lines):  # N of a part is at most N of the whole: mostly it ends the matter
                cell = Cells(max(1, _fullest(some, m)), m, dim)
                if cell.n == m or cell.size(shape, itemsize) >= prod(shape) * itemsize:
                    break
            else:
                yield cell


def _fullest(lines: Bits, m: int) -> int:
    counts = lines[..., ::m].astype(np.uint8)
    for i in range(1, m):
        counts += lines[..., i::m]
    return int(counts.max(initial=0))


def _tilings(nonzero: Bits) -> Iterator[tuple[tuple[int, int, int], Bits]]:
    """Tiles to try, with the grid of those that are not all zero; each grid is made from the next finer one."""
    rows, columns, kernel = nonzero.shape
    for depth in {1, kernel}:
        grids = {(1, 1): nonzero_tiles(nonzero, (1, 1, depth))}
        for side in (*_BLOCKS, (1, columns), (rows, 1)):
            tile = min(side[0], rows), min(side[1], columns)
            if tile not in grids:
                finer = max((each for each in grids if not (tile[0] % each[0] or tile[1] % each[1])), key=prod)
                grids[tile] = nonzero_tiles(grids[finer], (tile[0] // finer[0], tile[1] // finer[1], 1))
        yield from (((*tile, depth), grid) for tile, grid in grids.items())
