"""Nested states in one safetensors file, bit for bit: tensors as tensors, everything else as JSON in the header."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gossamer.errors import ConfigurationError, StateError

_FORMAT = "gossamer-tree-2"
_TEMPORARY = ".tmp"
_LAYOUTS = {"channels_last": torch.channels_last, "channels_last_3d": torch.channels_last_3d}


def save_tree(path: str | Path, tree: Any) -> None:
    """Write nested dicts, lists and tuples of tensors and plain values to one `.safetensors` file, atomically.

    The file opens with any safetensors reader: a tensor's name is the path of keys that leads to it, joined by "/";
    the structure and the plain values (None, bool, int, float, str) are JSON under the metadata key `tree`; `sha256`
    is the checksum of this JSON and of every tensor, in the order of their names. Dict keys may be str, int, float,
    bool or None. Dtype, bits and channels-last layout are kept; devices are not.

    Args:
        path: The file, replaced as a whole: a reader sees the old one or the new one.
        tree: What to save.

    Raises:
        ConfigurationError: A value of another type, named by its path; nothing is written.
        OSError: The file cannot be written, as where the disk is full; the old one is still there.
    """
    tensors: dict[str, Tensor] = {}
    layout = json.dumps(_encode(tree, (), tensors))
    with replacing(path) as temporary:
        try:
            save_file(
                tensors, temporary, metadata={"format": _FORMAT, "tree": layout, "sha256": _digest(layout, tensors)}
            )
        except SafetensorError as error:
            raise OSError(f"{path}: cannot be written: {error}") from error


def load_tree(path: str | Path) -> Any:
    """Read what `save_tree` wrote; tensors come on the CPU.

    Raises:
        StateError: The file is missing, damaged, or of another format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise StateError(
                    f"{path}: format is {metadata.get('format')!r}, expected {_FORMAT!r}; this is not a saved state"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
        if metadata["sha256"] != _digest(metadata["tree"], tensors):
            raise StateError(f"{path}: damaged, its checksum does not fit its content; use an earlier copy")
        return _decode(json.loads(metadata["tree"]), tensors)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        if isinstance(error, StateError):
            raise
        raise StateError(f"{path}: missing, incomplete or damaged ({error}); use an earlier copy") from error


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sweep(folder: Path) -> None:
    """Remove the temporary files of a process that was killed while it wrote into a folder."""
    for left in folder.glob(f".*{_TEMPORARY}"):
        left.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a temporary file to write; on success it is flushed to the disk and renamed to `path`, else removed."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{_TEMPORARY}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors makes files that only their owner can read
        _flush(temporary)
        temporary.replace(path)
        _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _encode(value: Any, path: tuple[str, ...], tensors: dict[str, Tensor]) -> Any:
    """The JSON form; what JSON lacks is an object with one key that begins with "$"."""
    if isinstance(value, Tensor):
        return _encode_tensor(value, path, tensors)
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, list | tuple):
        items = [_encode(item, (*path, str(i)), tensors) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if isinstance(value, dict):
        if any(not isinstance(key, str | int | float | bool | None) for key in value):
            raise ConfigurationError(f"{'/'.join(path) or 'tree'}: keys must be str, int, float, bool or None")
        pairs = [[key, _encode(item, (*path, str(key)), tensors)] for key, item in value.items()]
        plain = all(isinstance(key, str) and not key.startswith("$") for key in value)
        return dict(pairs) if plain else {"$dict": pairs}
    raise ConfigurationError(
        f"{'/'.join(path) or 'tree'}: cannot save a {type(value).__name__}; allowed are tensors, dicts, lists, tuples, "
        "None, bool, int, float and str"
    )


def _encode_tensor(value: Tensor, path: tuple[str, ...], tensors: dict[str, Tensor]) -> dict[str, Any]:
    name = "/".join(path) or "value"
    while name in tensors:  # keys that hold a "/" can lead to one name twice
        name += "'"
    value = value.detach()
    tensors[name] = value.to("cpu", copy=True, memory_format=torch.contiguous_format)
    for layout, memory_format in _LAYOUTS.items():
        rank = 4 if memory_format is torch.channels_last else 5
        if value.dim() == rank and value.is_contiguous(memory_format=memory_format) and not value.is_contiguous():
            return {"$tensor": name, "layout": layout}
    return {"$tensor": name}


def _digest(layout: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(layout.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "$tensor" in value:
        tensor = tensors[value["$tensor"]]
        return tensor.contiguous(memory_format=_LAYOUTS[value["layout"]]) if "layout" in value else tensor
    if "$tuple" in value:
        return tuple(_decode(item, tensors) for item in value["$tuple"])
    if "$dict" in value:
        return {key: _decode(item, tensors) for key, item in value["$dict"]}
    return {key: _decode(item, tensors) for key, item in value.items()}
