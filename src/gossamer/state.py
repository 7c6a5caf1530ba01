"""The saved state of masks: what it holds, and whether it fits what is attached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gossamer.errors import StateError
from gossamer.masks import MaskedTensor, count_over_shards, enforce, pack, rows_like, unpack
from gossamer.method import Method
from gossamer.targets import local, plain_name

FORMAT = 1
"""Version of the saved state."""

_KEYS = {"step": int, "frozen": bool, "masks": Mapping, "shapes": Mapping, "methods": Sequence}


def save(methods: Sequence[Method], step: int, frozen: bool) -> dict[str, Any]:
    """Masks packed by rows, counters and the methods' own state, as tensors and JSON values."""
    tensors = [tensor for method in methods for tensor in method.tensors]
    return {
        "format": FORMAT,
        "step": step,
        "frozen": frozen,
        "masks": {tensor.name: tensor.distribute(pack(tensor.mask)) for tensor in tensors},
        "shapes": {tensor.name: list(tensor.shape) for tensor in tensors},
        "methods": [{"config": method.config(), "state": method.state_dict()} for method in methods],
    }


def check(methods: Sequence[Method], state: Mapping[str, Any]) -> None:
    """Raise a StateError, naming what differs, unless `restore` can take this state; change nothing."""
    if not isinstance(state, Mapping) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, Mapping) else type(state).__name__
        raise StateError(
            f"sparsity state: format {found!r}, this version of gossamer reads {FORMAT}; it is a state of another "
            "version, or not one that Sparsity.state_dict() made"
        )
    for key, kind in _KEYS.items():
        if not isinstance(state.get(key), kind):
            raise StateError(f"sparsity state: {key!r} is {_brief(state.get(key))}, expected {kind.__name__}")
    if state["step"] < 0:
        raise StateError(f"sparsity state: 'step' is {state['step']}, expected a number of steps; the file is damaged")
    for each in state["methods"]:
        if not isinstance(each, Mapping) or not all(isinstance(each.get(key), Mapping) for key in ("config", "state")):
            raise StateError(
                f"sparsity state: 'methods' has {_brief(each)}, expected a config and a state; the file is damaged"
            )
    saved = [each["config"].get("method") for each in state["methods"]]
    here = [method.config().get("method") for method in methods]
    if saved != here:
        raise StateError(f"sparsity state: saved with methods {saved}, attached are {here}; attach the same methods")
    for method, each in zip(methods, state["methods"], strict=True):
        for key, value in method.config().items():
            there = each["config"].get(key)
            if _comparable(there) != _comparable(value):
                raise StateError(
                    f"sparsity state: {method.name} was saved with {key}={_brief(there)}, attached is {_brief(value)}; "
                    "attach with the arguments it was saved with"
                )
        method.check_state(each["state"], _check_masks(method, state))
    claimed = {_strip(name) for method in methods for name in method.claims()}
    if unknown := sorted(set(_by_name(state["masks"])) - claimed):
        raise StateError(f"sparsity state: has a mask of {unknown[0]}, which no attached method masks; attach the same")


def restore(methods: Sequence[Method], state: Mapping[str, Any]) -> None:
    """Put a checked state in force; pruned weights become 0."""
    masks = _by_name(state["masks"])
    for method, each in zip(methods, state["methods"], strict=True):
        method.load_state_dict(each["state"])
    tensors = [tensor for method in methods for tensor in method.tensors]
    for tensor in tensors:
        tensor.mask.copy_(_unpack(tensor, masks))
        enforce(local(tensor.parameter), tensor.mask)
    counts = count_over_shards(tensors, [tensor.mask.count_nonzero() for tensor in tensors])
    for tensor, count in zip(tensors, counts, strict=True):
        tensor.active = count


def _check_masks(method: Method, state: Mapping[str, Any]) -> int:
    """Check the form of a method's masks; returns the number of active weights in them."""
    masks, shapes = _by_name(state["masks"]), _by_name(state["shapes"])
    for tensor in method.tensors:
        mask = masks.get(_strip(tensor.name))
        if not isinstance(mask, Tensor):
            raise StateError(f"sparsity state: no mask of {tensor.name}; there are {_brief(sorted(masks))}")
        expected = (tensor.shape[0], -(-(tensor.weights // tensor.shape[0]) // 8))
        listed = shapes.get(_strip(tensor.name))
        shape = tuple(listed) if isinstance(listed, Sequence) else listed
        if shape != tensor.shape or tuple(mask.shape) != expected or mask.dtype != torch.uint8:
            raise StateError(
                f"sparsity state: the mask of {tensor.name} is for shape {shape} (packed {tuple(mask.shape)}, "
                f"{mask.dtype}), the weight has {tensor.shape} (packed {expected}, torch.uint8)"
            )
    counts = [_unpack(tensor, masks).count_nonzero() for tensor in method.tensors]
    return sum(count_over_shards(method.tensors, counts))


def _unpack(tensor: MaskedTensor, masks: Mapping[str, Tensor]) -> Tensor:
    """This rank's part of a tensor's saved mask."""
    packed = rows_like(masks[_strip(tensor.name)], tensor.parameter).to(tensor.mask.device)
    return unpack(packed, tensor.mask.shape)


def _by_name(values: Mapping[str, Any]) -> dict[str, Any]:
    return {_strip(name): value for name, value in values.items()}


def _comparable(value: Any) -> Any:
    """Names without what wrappers add, so that states of wrapped and plain models agree."""
    return [_strip(each) if isinstance(each, str) else each for each in value] if isinstance(value, list) else value


def _strip(name: str) -> str:
    return plain_name(name).removeprefix("module.")


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) < 200 else f"{text[:200]} …"
