"""Every encoding against a decoder that goes number by number, and the choice between them."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossamer.bit_packing import pack_numbers, set_bits
from gossamer.encodings import EXPANSION, ROOM, Bitmask, Cells, Dense, Encoding, Positions, describe, parse
from gossamer.errors import StateError
from gossamer.smallest_encoding import smallest
from slow_decoding import slow_decode, three


@st.composite
def zeros_by_structure(draw: st.DrawFn) -> tuple[np.ndarray, tuple[int, ...]]:
    """Numbers with zeros of every structure and density: single, in tiles, in cells."""
    shape = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 4, 5, 8, 12, 16, 33]), max_size=4)))
    if math.prod(shape) > 5000:
        shape = shape[:2]
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sides = rows, columns, kernel = three(shape)
    dtype = draw(st.sampled_from([np.uint8, np.uint16, np.uint32, np.uint64]))
    bits = random.integers(1, np.iinfo(dtype).max, sides, dtype, endpoint=True)
    r, c = draw(st.sampled_from([(1, 1), (4, 1), (1, 8), (16, 16), (rows, 1), (1, columns)]))
    d = draw(st.sampled_from([1, kernel]))
    kept = random.random((math.ceil(rows / r), math.ceil(columns / c), kernel // d)) < draw(
        st.sampled_from([0, 0.02, 0.1, 0.5, 0.9, 1])
    )
    bits *= kept.repeat(r, 0).repeat(c, 1).repeat(d, 2)[:rows, :columns]
    if draw(st.booleans()) and columns % 4 == 0:
        cells = np.moveaxis(bits, 1, -1).copy().reshape(-1, 4)
        np.put_along_axis(cells, random.random(cells.shape).argsort(1)[:, :2], 0, 1)
        bits = np.moveaxis(cells.reshape(rows, kernel, columns), -1, 1)
    return bits.ravel(), shape


def fitting(bits: np.ndarray, shape: tuple[int, ...]) -> list[Encoding]:
    """Encodings that can write these numbers, counted number by number."""
    rows, columns, kernel = three(shape)
    numbers = bits.reshape(rows, columns, kernel)
    found: list[Encoding] = [Dense()]
    sides = {(1, 1), (rows, 1), (1, columns), (min(rows, 4), min(columns, 4)), (min(rows, 3), min(columns, 2))}
    for (r, c), d in itertools.product(sides, {1, kernel}):
        kept = {
            (i // r, j // c, k // d)
            for i, j, k in itertools.product(range(rows), range(columns), range(kernel))
            if numbers[i, j, k]
        }
        found += [Bitmask((r, c, d), len(kept)), *(Positions((r, c, d), len(kept), low) for low in (0, 1, 3, 20))]
    for dim, m in itertools.product((0, 1), (3, 4, 8, 16)):
        if numbers.shape[dim] % m == 0:
            fullest = (np.moveaxis(numbers, dim, -1).reshape(-1, m) != 0).sum(1).max()
            found += [Cells(n, m, dim) for n in range(max(1, fullest), m)]
    return found


@given(zeros_by_structure())
def test_every_encoding_that_fits_comes_back_and_is_what_the_format_says(case):
    bits, shape = case
    for encoding in fitting(bits, shape):
        encoding.check(shape)
        parts = encoding.encode(bits, shape)
        assert tuple(parts) == encoding.parts
        assert {part: array.size for part, array in parts.items()} == encoding.lengths(shape)
        assert sum(array.nbytes for array in parts.values()) == encoding.size(shape, bits.itemsize)
        assert slow_decode(encoding, parts, shape) == bits.tolist()
        assert encoding.decode(parts, shape).tolist() == bits.tolist()
        if math.prod(shape) * bits.itemsize <= EXPANSION * encoding.size(shape, bits.itemsize) + ROOM:
            described = {key: list(value) if key == "tile" else value for key, value in describe(encoding).items()}
            assert parse(described, shape, bits.itemsize) == encoding


@given(zeros_by_structure())
def test_the_chosen_encoding_comes_back_and_none_that_fits_is_smaller(case):
    bits, shape = case
    chosen = smallest(bits, shape)
    assert slow_decode(chosen, chosen.encode(bits, shape), shape) == bits.tolist()
    tried = {(1, 1), (three(shape)[0], 1), (1, three(shape)[1])}
    for other in fitting(bits, shape):
        if isinstance(other, Cells) and other.m not in (4, 8, 16):
            continue
        if isinstance(other, Bitmask | Positions) and other.tile[:2] not in tried:
            continue
        least = chosen.size(shape, bits.itemsize) + 100 * len(chosen.parts)  # with what a part costs in the header
        assert least <= other.size(shape, bits.itemsize) + 100 * len(other.parts), other


def structured(structure: str) -> np.ndarray:
    random = np.random.default_rng(0)
    numbers = random.standard_normal((64, 128, 3, 3)).astype(np.float32).view(np.uint32)
    if structure == "cells":
        cells = np.moveaxis(numbers, 1, -1).reshape(-1, 4).copy()
        np.put_along_axis(cells, random.random(cells.shape).argsort(1)[:, :2], 0, 1)
        return np.moveaxis(cells.reshape(64, 3, 3, 128), -1, 1)
    grid = {
        "rows": (64, 1, 1),
        "columns": (1, 128, 1),
        "kernels": (64, 128, 1),
        "4x1": (16, 128, 9),
        "16x16": (4, 8, 9),
    }
    kept = random.random(grid[structure]) < 0.4
    for dim, extent in enumerate((64, 128, 9)):
        kept = kept.repeat(extent // kept.shape[dim], dim)
    return numbers * kept.reshape(64, 128, 3, 3)


@pytest.mark.parametrize(
    ("structure", "expected"),
    [
        ("cells", Cells(2, 4, 1)),
        ("rows", (1, 128, 9)),
        ("columns", (64, 1, 9)),
        ("kernels", (1, 1, 9)),
        ("4x1", (4, 1, 1)),
        ("16x16", (16, 16, 1)),
    ],
)
def test_a_structure_is_found_in_the_numbers(structure, expected):
    numbers = structured(structure)
    chosen = smallest(numbers.ravel(), numbers.shape)
    assert expected in (chosen, getattr(chosen, "tile", None))


@pytest.mark.parametrize(("sparsity", "bits_a_place"), [(0.8, 0.86), (0.9, 0.54), (0.95, 0.32), (0.99, 0.09)])
def test_places_of_single_numbers_take_little_more_than_their_entropy(sparsity, bits_a_place):
    count = 1 << 20
    bits = (np.random.default_rng(0).random(count) > sparsity).astype(np.uint32)
    encoding = smallest(bits, (1024, 1024))
    places = encoding.size((1024, 1024), 4) - 4 * np.count_nonzero(bits)
    assert 8 * places / count < bits_a_place


def test_a_tensor_of_zeros_takes_a_thousandth_but_not_nothing():
    # What a small file can ask a reader to allocate is bounded, so zeros cannot be free.
    encoding = smallest(np.zeros(1 << 22, np.uint32), (2048, 2048))
    assert (1 << 24) / EXPANSION * 0.99 < encoding.size((2048, 2048), 4) < 1.2 * (1 << 24) / EXPANSION


BITS = np.array([0, 7, 0, 0, 0, 0, 9, 0, 0, 0, 0, 8], np.uint8)


@pytest.mark.parametrize(
    ("encoding", "changed", "said"),
    [
        (Bitmask((1, 1, 1), 3), {"mask": set_bits(np.array([1, 6]), 12)}, "marks 2 places"),
        (Bitmask((1, 1, 1), 3), {"mask": set_bits(np.array([1, 6, 9, 11]), 12)}, "marks 4 places"),
        (Bitmask((1, 1, 1), 3), {"mask": set_bits(np.array([1, 6, 13]), 16)}, "beyond the end"),
        (Positions((1, 1, 1), 3, 1), {"high": set_bits(np.array([0, 4]), 8)}, "marks 2 places"),
        (Positions((1, 1, 1), 3, 3), {"high": set_bits(np.array([0, 1, 2]), 4)}, "do not increase"),
        (Positions((1, 1, 1), 3, 2), {"low": pack_numbers(np.array([1, 2, 0]), 2) | 0x80}, "beyond the end"),
        (Positions((1, 1, 1), 3, 3), {"low": pack_numbers(np.array([1, 6, 5]), 3)}, "beyond 12"),
        (Cells(1, 3, 0), {"places": pack_numbers(np.array([1, 0, 0, 3]), 2)}, "go beyond"),
        (Cells(2, 4, 0), {"places": pack_numbers(np.array([1, 1, 2, 3, 2, 3]), 2)}, "do not increase"),
        (Cells(2, 4, 0), {"places": pack_numbers(np.array([1, 0, 2, 3, 2, 3]), 2)}, "do not increase"),
    ],
)
def test_parts_that_encode_nothing_are_refused(encoding, changed, said):
    parts = encoding.encode(BITS, (12,))
    assert encoding.decode(parts, (12,)).tolist() == BITS.tolist()
    with pytest.raises(StateError, match=said):
        encoding.decode(parts | changed, (12,))


@pytest.mark.parametrize(
    ("described", "shape"),
    [
        ({}, (4, 8)),
        ({"encoding": "zip"}, (4, 8)),
        ({"encoding": ["dense"]}, (4, 8)),
        ({"encoding": "dense", "kept": 1}, (4, 8)),
        ({"encoding": "bitmask", "kept": 1}, (4, 8)),
        ({"encoding": "bitmask", "tile": [1, 1], "kept": 1}, (4, 8)),
        ({"encoding": "bitmask", "tile": [1, 1, 1], "kept": 1.0}, (4, 8)),
        ({"encoding": "bitmask", "tile": [1, 1, 1], "kept": True}, (4, 8)),
        ({"encoding": "bitmask", "tile": [1, 1, 1], "kept": -1}, (4, 8)),
        ({"encoding": "bitmask", "tile": [1, 1, 1], "kept": 33}, (4, 8)),
        ({"encoding": "bitmask", "tile": [0, 1, 1], "kept": 1}, (4, 8)),
        ({"encoding": "bitmask", "tile": [5, 1, 1], "kept": 1}, (4, 8)),
        ({"encoding": "bitmask", "tile": [1, 1, 2], "kept": 1}, (4, 8, 3)),
        ({"encoding": "bitmask", "tile": [1, 1, 1], "kept": 0}, (0, 8)),
        ({"encoding": "positions", "tile": [1, 1, 1], "kept": 1, "low_bits": 63}, (4, 8)),
        ({"encoding": "positions", "tile": [1, 1, 1], "kept": 1, "low_bits": -1}, (4, 8)),
        ({"encoding": "positions", "tile": [1, 1, 1], "kept": 1, "low_bits": 40}, (1 << 20, 1 << 20)),
        ({"encoding": "bitmask", "tile": [1 << 20, 1, 1], "kept": 0}, (1 << 20, 1 << 20)),
        ({"encoding": "cells", "n": 4, "m": 4, "dim": 1}, (4, 8)),
        ({"encoding": "cells", "n": 0, "m": 4, "dim": 1}, (4, 8)),
        ({"encoding": "cells", "n": 1, "m": 3, "dim": 1}, (4, 8)),
        ({"encoding": "cells", "n": 1, "m": 512, "dim": 1}, (4, 512)),
        ({"encoding": "cells", "n": 1, "m": 4, "dim": 2}, (4, 8, 4)),
        ({"encoding": "cells", "n": 1, "m": 4, "dim": 1}, (0, 8)),
    ],
)
def test_a_description_that_fits_no_tensor_is_refused(described: dict[str, Any], shape):
    with pytest.raises(StateError):
        parse(described, shape, 4)
