"""The safetensors container, a tensor at a time.

The library of that name writes from memory that holds all tensors at once; reading, it takes a name that comes twice,
and maps the file, so that one which shrinks meanwhile kills the process. Hence these hundred lines; the format is
described at https://github.com/huggingface/safetensors#format. Tests compare both ways with the library.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gossamer.bit_packing import Bits
from gossamer.checkpoint import replacing
from gossamer.errors import ConfigurationError, StateError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The types a file can hold, by their names there."""

_MAX_HEADER = 100_000_000  # bytes, as the library has it
_RESERVED = "__metadata__"


@dataclass(frozen=True)
class Form:
    """What a tensor is: the name of its type (see `DTYPES`), and its shape."""

    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        # Beside an extent of 0 others may be of any size, and torch computes strides from them.
        if prod(max(1, extent) for extent in self.shape) >= 1 << 60:
            raise StateError(f"shape {self.shape} is larger than any memory")

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return DTYPES[self.dtype].itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all numbers."""
        return prod(self.shape) * self.itemsize


class Container:
    """An open file; nothing but its header is read before it is asked for.

    Args:
        path: The file.

    Attributes:
        metadata: What the file says of itself.
        forms: The tensors that it holds, by name, in the order of the header.
        nbytes: Bytes of the file.

    Raises:
        StateError: The file is missing, or its header is not that of such a file: checked is all that the header says,
            against itself and the length of the file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path
        try:
            self._file = open(path, "rb")  # noqa: SIM115  # closed by `close`
        except OSError as error:
            raise StateError(f"{path}: cannot be read ({error.strerror}); name a safetensors file") from error
        try:
            self._read_header()
        except BaseException as error:
            self._file.close()
            if isinstance(error, ValueError | OSError | RecursionError):
                said = error if isinstance(error, StateError) else f"{type(error).__name__}: {error}"
                raise StateError(f"{path}: incomplete, damaged, or no safetensors file ({said})") from error
            raise

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def read(self, name: str) -> Bits:
        """The bytes of a tensor, in memory of their own.

        Raises:
            StateError: The file has become shorter.
        """
        start, form = self._starts[name], self.forms[name]
        read = np.empty(form.nbytes, np.uint8)
        self._file.seek(start)
        if self._file.readinto(read.data) != read.size:
            raise StateError(f"{self.path}: has become shorter since it was opened; use an earlier copy")
        return read

    def _read_header(self) -> None:
        self.nbytes = os.fstat(self._file.fileno()).st_size
        prefix = self._file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(_MAX_HEADER, self.nbytes - 8):
            raise StateError("its first 8 bytes are not the length of a header")
        header = parse_json(self._file.read(length))
        if not isinstance(header, dict):
            raise StateError("its header is no JSON object")
        self.metadata = header.pop(_RESERVED, {})
        if not isinstance(self.metadata, dict) or not all(isinstance(text, str) for text in self.metadata.values()):
            raise StateError("its metadata are not texts")
        ends: dict[str, tuple[int, int]] = {}
        self.forms: dict[str, Form] = {}
        for name, entry in header.items():
            if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
                raise StateError(f"{name!r}: expected type, shape and offsets")
            self.forms[name] = parse_form(name, entry)
            offsets = entry["data_offsets"]
            if not _naturals(offsets) or len(offsets) != 2 or offsets[1] - offsets[0] != self.forms[name].nbytes:
                raise StateError(f"{name!r}: {self.forms[name]} does not fit its offsets")
            ends[name] = (offsets[0], offsets[1])
        self._starts: dict[str, int] = {}
        end = 0
        for name, (start, stop) in sorted(ends.items(), key=lambda each: each[1]):
            if start != end:
                raise StateError(f"{name!r}: begins at {start}, where {end} is expected")
            self._starts[name], end = 8 + length + start, stop
        if 8 + length + end != self.nbytes:
            raise StateError(f"has {self.nbytes} bytes, its header tells of {8 + length + end}")


def parse_form(name: str, entry: Mapping[str, Any]) -> Form:
    """Type and shape out of JSON, or a StateError."""
    dtype, shape = entry.get("dtype"), entry.get("shape")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise StateError(f"{name!r}: type {dtype!r}, known are {', '.join(DTYPES)}")
    if not _naturals(shape):
        raise StateError(f"{name!r}: shape {shape!r:.200}")
    return Form(dtype, tuple(shape))  # type: ignore[arg-type]


def parse_json(text: bytes) -> Any:
    """JSON in UTF-8 with no key twice, no NaN or infinity, and no text that UTF-8 cannot write; else a ValueError."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            raise ValueError("a key comes twice")
        return found

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no number")

    parsed = json.loads(text.decode(), object_pairs_hook=once, parse_constant=refuse)
    json.dumps(parsed, ensure_ascii=False).encode()
    return parsed


def write_container(
    path: str | Path, metadata: Mapping[str, str], forms: Mapping[str, Form], contents: Iterable[tuple[str, Bits]]
) -> None:
    """Write a file atomically: a reader sees the old one or the new one, and no part is left behind on an error.

    Args:
        path: The file.
        metadata: What it says of itself.
        forms: Its tensors, by name.
        contents: The numbers of each, once, in any order; one is held in memory at a time.

    Raises:
        ConfigurationError: A tensor has a name that such files reserve, or all names are too long together.
        StateError: A tensor has not the length that it should have, as where it was changed meanwhile.
        OSError: The file cannot be written.
    """
    if _RESERVED in forms:
        raise ConfigurationError(f"{_RESERVED!r}: is no name for a tensor in a safetensors file; rename it")
    header: dict[str, Any] = {_RESERVED: dict(metadata)} if metadata else {}
    starts, end = {}, 0
    # The widest numbers first, so that each tensor begins at a multiple of the width of its numbers.
    for name, form in sorted(forms.items(), key=lambda each: -each[1].itemsize):
        starts[name], end = end, end + form.nbytes
        header[name] = {"dtype": form.dtype, "shape": form.shape, "data_offsets": [starts[name], end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _MAX_HEADER:
        raise ConfigurationError(f"{path}: {len(forms)} tensors need a header of more than {_MAX_HEADER} bytes")
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, bits in contents:
            if bits.nbytes != forms[name].nbytes:
                raise StateError(f"{name}: changed while it was saved; save it when nothing writes to it")
            file.seek(8 + len(text) + starts[name])
            file.write(bits.data)


def _naturals(numbers: object) -> bool:
    return isinstance(numbers, list) and all(type(number) is int and number >= 0 for number in numbers)
