"""Files of tensors that are small where there are zeros: reading and writing; docs/files.md describes the format."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gossamer import encodings
from gossamer.bit_packing import Bits
from gossamer.container import DTYPES, Container, Form, parse_form, parse_json, write_container
from gossamer.encodings import Dense, Encoding
from gossamer.errors import StateError
from gossamer.smallest_encoding import smallest

VERSION = 1
"""Version of the format."""

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_FORMAT, _CONTENTS, _CHECKSUM = "format", "gossamer", "gossamer_sha256"


def write(
    path: str | Path,
    names: Sequence[str],
    read: Callable[[str], Tensor],
    tied: Mapping[str, str],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors that are read twice each, by name: once to see how to write them, once to do it.

    Args:
        path: The file.
        names: Names of all tensors, in order.
        read: Gives a tensor.
        tied: The names that stand for the tensor of another name.
        metadata: Other texts to keep in the file.
    """
    plans: dict[str, tuple[Form, Encoding]] = {}
    contents: dict[str, Any] = {}
    for name in names:
        if name in tied:
            contents[name] = {"tied": tied[name]}
            continue
        tensor = read(name)
        form, bits = Form(_DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)), bits_of(tensor)
        encoding = smallest(bits, form.shape)
        plans[name] = form, encoding
        contents[name] = {"dtype": form.dtype, "shape": form.shape, "sha256": _digest(name, form, bits)}
        contents[name] |= encodings.describe(encoding)
    separator = _separator(plans)
    about = {"version": VERSION, "separator": separator, "tensors": contents, "metadata": metadata or {}}
    text = json.dumps(about, separators=(",", ":"), ensure_ascii=False)
    forms = {
        stored: part
        for name, plan in plans.items()
        for stored, part in zip(_names(name, plan[1], separator), _forms(*plan), strict=True)
    }

    def parts() -> Iterator[tuple[str, Bits]]:
        for name, (form, encoding) in plans.items():
            encoded = encoding.encode(bits_of(read(name)), form.shape)
            yield from zip(_names(name, encoding, separator), (encoded[part] for part in encoding.parts), strict=True)

    write_container(path, {_FORMAT: "gossamer", _CONTENTS: text, _CHECKSUM: _sha256(text.encode())}, forms, parts())


class File(Mapping[str, Tensor]):
    """An open file as a mapping from names to tensors, each read and decoded when it is asked for, and not kept.

    Opening checks all that the file says of itself, and reads no numbers; asking for a tensor checks what is encoded,
    and the result against its checksum. What a damaged file can make this allocate is bounded by its length: see
    `gossamer.encodings.EXPANSION`.

    Args:
        path: The file. It may be closed by `close`, or used in a `with` statement.

    Attributes:
        path: The file.
        tied: The names that stand for the tensor of another name.
        metadata: Other texts in the file.
        nbytes: Bytes of the file.
        compressed: Whether `save` wrote it; without, it is another safetensors file, and nothing has a checksum.

    Raises:
        StateError: The file is missing, damaged, or of a later version of gossamer.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path
        self._container = Container(path)
        try:
            self._read_contents()
        except StateError as error:
            self.close()
            raise StateError(f"{path}: {error}") from error
        self.nbytes = self._container.nbytes

    def __len__(self) -> int:
        return len(self._names)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._entries or name in self.tied

    def __getitem__(self, name: str) -> Tensor:
        entry = self._entries[self.tied.get(name, name)]
        read = {part: self._container.read(stored) for part, stored in entry.stored.items()}
        try:
            bits = entry.decode(read)
        except StateError as error:
            raise StateError(f"{self.path}: {name!r} is damaged ({error}); use an earlier copy") from error
        return torch.from_numpy(bits.view(np.uint8)).view(DTYPES[entry.form.dtype]).reshape(entry.form.shape)

    def __enter__(self) -> File:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._container.close()

    def form(self, name: str) -> Form:
        """Type and shape of a tensor."""
        return self._entries[self.tied.get(name, name)].form

    def encoding(self, name: str) -> Encoding:
        """How a tensor is written."""
        return self._entries[self.tied.get(name, name)].encoding

    def _read_contents(self) -> None:
        metadata, forms = self._container.metadata, self._container.forms
        self.compressed = metadata.get(_FORMAT) == "gossamer" or any(each.startswith(_CONTENTS) for each in metadata)
        self.tied: dict[str, str] = {}
        if not self.compressed:
            self.metadata = dict(metadata)
            self._names = list(forms)
            self._entries = {name: _Entry(name, form, Dense(), None, {"values": name}) for name, form in forms.items()}
            return
        if metadata.keys() != {_FORMAT, _CONTENTS, _CHECKSUM} or metadata[_FORMAT] != "gossamer":
            raise StateError(f"is damaged: its metadata are {sorted(metadata)}; use an earlier copy")
        text = metadata[_CONTENTS].encode()
        if metadata[_CHECKSUM] != _sha256(text):
            raise StateError("is damaged: its table of contents does not fit its checksum; use an earlier copy")
        try:
            about = parse_json(text)
        except (ValueError, RecursionError) as error:
            raise StateError(f"is damaged: its table of contents is no JSON ({error}); use an earlier copy") from error
        version = about.get("version") if isinstance(about, dict) else None
        if type(version) is not int or version != VERSION:
            raise StateError(
                f"is of version {version!r:.50}, this gossamer reads {VERSION}; install the gossamer that wrote it"
            )
        try:
            self._read_entries(about, forms)
        except StateError as error:
            raise StateError(f"is damaged ({error}); use an earlier copy") from error

    def _read_entries(self, about: Mapping[str, Any], forms: Mapping[str, Form]) -> None:
        separator, tensors, self.metadata = about.get("separator"), about.get("tensors"), about.get("metadata", {})
        if not isinstance(separator, str) or not isinstance(tensors, dict) or not isinstance(self.metadata, dict):
            raise StateError("its table of contents has no tensors")
        if not all(isinstance(text, str) for text in self.metadata.values()):
            raise StateError("its metadata are not texts")
        self._names, self._entries = list(tensors), {}
        expected: dict[str, Form] = {}
        for name, described in tensors.items():
            if not isinstance(described, dict):
                raise StateError(f"{name!r}: is not described")
            if described.keys() == {"tied"}:
                self.tied[name] = described["tied"]
                continue
            form, digest = parse_form(name, described), described.get("sha256")
            if not isinstance(digest, str):
                raise StateError(f"{name!r}: has no checksum")
            others = {key: value for key, value in described.items() if key not in ("dtype", "shape", "sha256")}
            try:
                encoding = encodings.parse(others, form.shape, form.itemsize)
            except StateError as error:
                raise StateError(f"{name!r}: {error}") from error
            names = _names(name, encoding, separator)
            if not expected.keys().isdisjoint(names):
                raise StateError(f"{name!r}: shares a part with another tensor")
            expected |= zip(names, _forms(form, encoding), strict=True)
            stored = dict(zip(encoding.parts, names, strict=True))
            self._entries[name] = _Entry(name, form, encoding, digest, stored)
        for name, owner in self.tied.items():
            if not isinstance(owner, str) or owner not in self._entries:
                raise StateError(f"{name!r}: is tied to {owner!r:.100}, which is no tensor in it")
        if wrong := [name for name in expected.keys() | forms.keys() if expected.get(name) != forms.get(name)]:
            name = min(wrong)
            raise StateError(f"{name!r}: expected {expected.get(name)}, found {forms.get(name)}")


@dataclass(frozen=True)
class _Entry:
    """A tensor of a file: what it is, how it is written, its checksum, and the names of its parts."""

    name: str
    form: Form
    encoding: Encoding
    digest: str | None
    stored: dict[str, str]

    def decode(self, parts: dict[str, Bits]) -> Bits:
        """The numbers, in memory of their own."""
        parts["values"] = parts["values"].view(f"u{self.form.itemsize}")
        bits = self.encoding.decode(parts, self.form.shape)
        if self.digest is not None and self.digest != _digest(self.name, self.form, bits):
            raise StateError("its numbers do not fit their checksum")
        if self.form.dtype == "BOOL" and bits.max(initial=0) > 1:
            raise StateError("a bool that is neither 0 nor 1")
        return bits


def bits_of(tensor: Tensor) -> Bits:
    """The numbers of a tensor as unsigned integers of their width, in row-major order; on the CPU it may be a view."""
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    bits: Bits = plain.view(torch.uint8).numpy().view(f"u{plain.element_size()}")
    return bits


def _names(name: str, encoding: Encoding, separator: str) -> list[str]:
    """Names of the parts in the container: a dense tensor has its own."""
    return [name] if isinstance(encoding, Dense) else [f"{name}{separator}{part}" for part in encoding.parts]


def _forms(form: Form, encoding: Encoding) -> list[Form]:
    """Types and shapes of the parts in the container."""
    if isinstance(encoding, Dense):
        return [form]
    lengths = encoding.lengths(form.shape)
    return [Form(form.dtype if part == "values" else "U8", (lengths[part],)) for part in encoding.parts]


def _separator(plans: Mapping[str, tuple[Form, Encoding]]) -> str:
    """What stands between a name and its part: as many "/" as keep all names apart."""
    separator = "/"
    while True:
        names = [part for name, (_, encoding) in plans.items() for part in _names(name, encoding, separator)]
        if len(set(names)) == len(names):
            return separator
        separator += "/"


def _digest(name: str, form: Form, bits: Bits) -> str:
    """A checksum of a tensor: of its numbers, and of what they are."""
    digest = hashlib.sha256(json.dumps([name, form.dtype, form.shape]).encode())
    digest.update(bits.data)
    return digest.hexdigest()[:32]


def _sha256(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()
