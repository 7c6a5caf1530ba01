"""Files of other libraries, made smaller and back: safetensors, folders of Transformers, state dicts of torch."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from gossamer.container import write_container
from gossamer.errors import ConfigurationError, StateError, reason
from gossamer.files import File, bits_of, write
from gossamer.storage import save

_SUFFIX = ".safetensors"
_TORCH = (".pt", ".pth", ".bin", ".ckpt")


def compress(source: str | Path, destination: str | Path) -> None:
    """Write the tensors of a file, or of the files of a folder, in the way that takes the fewest bytes.

    Args:
        source: A safetensors file; a state dict that `torch.save` wrote (`.pt`, `.pth`, `.bin`, `.ckpt`), of which
            nothing but tensors is read; or a folder such as Transformers' `save_pretrained` makes, whose safetensors
            files are compressed, whole or in shards, and whose other files are copied.
        destination: The file or folder to make.

    Raises:
        StateError: The source is missing or damaged, or no state dict.
        ConfigurationError: The destination is there already, or the source has nothing to compress; nothing is written.
        OSError: A file cannot be written; no part is left behind.
    """
    _convert(Path(source), Path(destination), _compress_file)


def expand(source: str | Path, destination: str | Path) -> None:
    """Undo `compress`: plain safetensors, with the same bits, that any library reads. Tied names are written each.

    Args:
        source: What `compress` or `save` wrote, a file or a folder.
        destination: The file or folder to make.

    Raises:
        StateError: The source is missing or damaged.
        ConfigurationError: The destination is there already, or the source has nothing to expand; nothing is written.
        OSError: A file cannot be written; no part is left behind.
    """
    _convert(Path(source), Path(destination), _expand_file)


def _compress_file(source: Path, destination: Path) -> None:
    if source.suffix in _TORCH:
        save(_state_dict(source), destination)
        return
    with File(source) as file:
        write(destination, list(file), file.__getitem__, file.tied, file.metadata)


def _expand_file(source: Path, destination: Path) -> None:
    with File(source) as file:
        forms = {name: file.form(name) for name in file}
        metadata = {"format": "pt"} | file.metadata  # without it Transformers reads no file
        write_container(destination, metadata, forms, ((name, bits_of(file[name])) for name in file))


def _state_dict(source: Path) -> Mapping[str, Tensor]:
    try:
        state = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # what it raises for a damaged file is not told
        raise StateError(f"{source}: is no state dict of tensors that torch.save wrote ({reason(error)})") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise StateError(f"{source}: is no state dict; save model.state_dict() alone to a file, and compress that")
    return state


def _convert(source: Path, destination: Path, convert: Callable[[Path, Path], None]) -> None:
    if destination.exists():
        raise ConfigurationError(f"{destination}: is there already; name a new one, or remove it")
    if not source.is_dir():
        convert(source, destination)
        return
    if destination.resolve().is_relative_to(source.resolve()):
        raise ConfigurationError(f"{destination}: is inside {source}; name a folder outside")
    files = [path for path in sorted(source.rglob("*")) if path.is_file()]
    if not any(path.suffix == _SUFFIX for path in files):
        raise ConfigurationError(
            f"{source}: has no {_SUFFIX} file; save the model with save_pretrained, or name a file of tensors"
        )
    temporary = destination.with_name(f".{destination.name}.{os.getpid()}.tmp")
    try:
        for path in files:
            made = temporary / path.relative_to(source)
            made.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == _SUFFIX:
                convert(path, made)
            else:
                shutil.copy2(path, made)
        temporary.rename(destination)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
