"""A decoder that goes bit by bit and number by number, as docs/files.md describes the format."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np

from gossamer.encodings import Bitmask, Cells, Dense, Encoding, Positions

Parts = dict[str, np.ndarray]


def bit(packed: np.ndarray, i: int) -> int:
    return int(packed[i // 8]) >> i % 8 & 1


def number(packed: np.ndarray, i: int, width: int) -> int:
    return sum(bit(packed, i * width + j) << j for j in range(width))


def three(shape: tuple[int, ...]) -> tuple[int, int, int]:
    padded = (*shape, 1, 1)
    return padded[0], padded[1], math.prod(shape[2:])


def mask_places(encoding: Bitmask, parts: Parts, tiles: int) -> list[int]:
    return [i for i in range(tiles) if bit(parts["mask"], i)]


def elias_fano_places(encoding: Positions, parts: Parts, tiles: int) -> list[int]:
    places, zeros = [], 0
    for i in range(8 * len(parts["high"])):
        if bit(parts["high"], i):
            places.append(zeros << encoding.low_bits | number(parts["low"], len(places), encoding.low_bits))
        else:
            zeros += 1
    return places


def slow_decode(encoding: Encoding, parts: Parts, shape: tuple[int, ...]) -> list[int]:
    """The numbers by the description of the format alone."""
    sides = rows, columns, kernel = three(shape)
    found = np.zeros(sides, np.uint64)
    values = iter(parts["values"].tolist())
    if isinstance(encoding, Dense):
        return parts["values"].tolist()
    if isinstance(encoding, Cells):
        width, i = math.ceil(math.log2(encoding.m)), 0
        lines = itertools.product(range(columns if encoding.dim == 0 else rows), range(kernel))
        for (line, k), cell in itertools.product(lines, range(sides[encoding.dim] // encoding.m)):
            for _ in range(encoding.n):
                along = cell * encoding.m + number(parts["places"], i, width)
                found[(along, line, k) if encoding.dim == 0 else (line, along, k)] = next(values)
                i += 1
        return found.ravel().tolist()
    r, c, d = encoding.tile
    grid = math.ceil(rows / r), math.ceil(columns / c), kernel // d
    tiles = list(itertools.product(*map(range, grid)))
    find: Callable[..., list[int]] = mask_places if isinstance(encoding, Bitmask) else elias_fano_places
    for place in find(encoding, parts, len(tiles)):
        a, b, e = tiles[place]
        for i, j, k in itertools.product(range(a * r, a * r + r), range(b * c, b * c + c), range(e * d, e * d + d)):
            value = next(values)
            if i < rows and j < columns:
                found[i, j, k] = value
    return found.ravel().tolist()
