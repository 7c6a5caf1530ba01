"""Models and state dicts in files, and back."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar, overload

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from gossamer.checks import closest
from gossamer.container import DTYPES
from gossamer.errors import ConfigurationError, StateError
from gossamer.files import File, bits_of, write
from gossamer.targets import WRAPPERS

M = TypeVar("M", bound=nn.Module)
_PARALLEL = (DistributedDataParallel, nn.DataParallel)


def save(model: nn.Module | Mapping[str, Tensor], path: str | Path) -> None:
    """Write a model's state, or a state dict, to one file; each tensor in the way that takes the fewest bytes.

    The zeros may come from anywhere: only the numbers count. Every bit comes back. Tensors that are one (tied weights)
    are written once; buffers are state, those that are not persistent are not. Names go without what `torch.compile`,
    DDP, FSDP and activation checkpointing put before them. Beside the model this needs up to three times the memory of
    its largest tensor.

    Args:
        model: The model, or tensors by name.
        path: The file (by custom `.safetensors`), replaced as a whole: a reader sees the old one or the new one.

    Raises:
        ConfigurationError: Something that a file cannot hold, by its name; nothing is written.
        OSError: The file cannot be written; the old one is still there.
    """
    state = dict(model) if isinstance(model, Mapping) else _state(_unwrapped(model))
    first: dict[Hashable, str] = {}
    tied = {}
    for name, tensor in state.items():
        _check(name, tensor)
        if (owner := first.setdefault(_identity(name, tensor), name)) != name:
            tied[name] = owner
    write(path, list(state), state.__getitem__, tied)


@overload
def load(path: str | Path) -> dict[str, Tensor]: ...


@overload
def load(path: str | Path, model: M) -> M: ...


def load(path: str | Path, model: M | None = None) -> dict[str, Tensor] | M:
    """Read what `save` wrote, or any safetensors file.

    Args:
        path: The file.
        model: What to load it into: names, shapes and types must be the same. Parameters stay where they are.

    Returns:
        The model; without one a state dict on the CPU, in which tied names have one tensor.

    Raises:
        StateError: The file is missing or damaged, or does not fit the model; nothing has been changed.
        ConfigurationError: The model has no memory (device "meta"), or state that no file holds.
    """
    with File(path) as file:
        if model is not None:
            _load_into(_unwrapped(model), file)
            return model
        return _tensors(file)


def _tensors(file: File) -> dict[str, Tensor]:
    """All tensors of a file; tied names have one."""
    found = {name: file[name] for name in file if name not in file.tied}
    return {name: found[file.tied.get(name, name)] for name in file}


def _check(name: object, value: object) -> None:
    """Raise a ConfigurationError unless a file can hold this tensor under this name."""
    if not isinstance(name, str) or not _is_text(name):
        raise ConfigurationError(f"{name!r}: tensors have texts as names in a file; rename it")
    if not isinstance(value, Tensor):
        raise ConfigurationError(
            f"{name}: is a {type(value).__name__}, and files hold tensors; leave it out of the state dict, and keep it "
            "in a file of another kind"
        )
    if is_lazy(value):
        raise ConfigurationError(f"{name}: has no shape yet; run a batch through the model first")
    if value.layout is not torch.strided or value.is_nested or type(value.detach()) is not Tensor:
        raise ConfigurationError(
            f"{name}: is a {type(value).__name__} of layout {value.layout}, and files hold ordinary tensors; make it "
            "dense, and gather what is sharded, as torch.distributed.checkpoint.state_dict does with full_state_dict"
        )
    if value.device.type == "meta":
        raise ConfigurationError(f'{name}: has no memory (device "meta"); call model.to_empty(device="cpu") first')
    if value.dtype not in DTYPES.values():
        raise ConfigurationError(f"{name}: has type {value.dtype}, and files hold {', '.join(DTYPES)}; convert it")


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model without what `torch.compile` and DDP put around it."""
    for attribute in ("_orig_mod", "module"):
        inner = getattr(model, attribute, None)
        if isinstance(inner, nn.Module) and (attribute == "_orig_mod" or isinstance(model, _PARALLEL)):
            return _unwrapped(inner)
    return model


def _state(model: nn.Module) -> dict[str, Tensor]:
    """State of an unwrapped model, by the names it has without the wrappers inside."""
    return {_plain(name): value for name, value in model.state_dict().items()}


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _load_into(model: nn.Module, file: File) -> None:
    state = _state(model)
    for name, value in state.items():
        _check(name, value)
    one: dict[Hashable, list[str]] = {}  # the names of each tensor of the model
    for name, value in state.items():
        one.setdefault(_identity(name, value), []).append(name)
    held = {name: next((each for each in names if each in file), name) for names in one.values() for name in names}
    held |= {name: name for name in state if name in file}
    if missing := [name for name, source in held.items() if source not in file]:
        raise StateError(
            f"{file.path}: has no {_some(missing)}, which the model has; build the model that was saved"
            + closest(missing[0], file.keys() - state.keys())
        )
    if unknown := [name for name in file if name not in state]:
        raise StateError(
            f"{file.path}: has {_some(unknown)}, which the model has not; build the model that was saved"
            + closest(unknown[0], state)
        )
    for name, value in state.items():
        form = file.form(held[name])
        if (DTYPES[form.dtype], form.shape) != (value.dtype, tuple(value.shape)):
            raise StateError(
                f"{file.path}: {name} has type {DTYPES[form.dtype]} and shape {form.shape}, in the model it has "
                f"{value.dtype} and {tuple(value.shape)}; build the model that was saved, and convert it before"
            )
    loaded = _tensors(file)
    for first, *others in one.values():
        for name in others:
            if not np.array_equal(bits_of(loaded[held[first]]), bits_of(loaded[held[name]])):
                raise StateError(
                    f"{file.path}: {first} and {name} differ, in the model they are one tensor; untie them first"
                )
    model.load_state_dict({name: loaded[held[_plain(name)]] for name in model.state_dict()})


def _identity(name: str, tensor: Tensor) -> Hashable:
    """What two names share that are of one tensor."""
    if not tensor.numel():
        return name
    return (
        tensor.device,
        tensor.data_ptr(),
        tensor.dtype,
        tensor.shape,
        tensor.stride(),
        tensor.is_conj(),
        tensor.is_neg(),
    )


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _some(names: Sequence[str]) -> str:
    return repr(names[0]) + (f" and {len(names) - 1} more" if len(names) > 1 else "")
