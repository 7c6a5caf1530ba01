"""The saved state of masks: what it holds, and whether it fits what is attached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gossamer.errors import StateError
from gossamer.masks import count_active, is_packed, packed_shape, unpack_like
from gossamer.method import Method
from gossamer.optimizers import SECOND_MOMENTS
from gossamer.targets import plain_name

FORMAT = 1
"""Version of the saved state."""

_KEYS = {
    "step": int,
    "frozen": bool,
    "second_moment": str,
    "masks": Mapping,
    "begun": Mapping,
    "shapes": Mapping,
    "methods": Sequence,
}
_PARTS = ("config", "settings", "state")


def save(methods: Sequence[Method], step: int, frozen: bool, second_moment: str) -> dict[str, Any]:
    """Masks packed by rows, counters and the methods' own state, as tensors and JSON values."""
    tensors = [tensor for method in methods for tensor in method.tensors]
    return {
        "format": FORMAT,
        "step": step,
        "frozen": frozen,
        "masks": {tensor.name: tensor.pack(tensor.mask) for tensor in tensors},
        "begun": {tensor.name: tensor.pack(tensor.begun) for tensor in tensors if tensor.begun is not None},
        "shapes": {tensor.name: list(tensor.shape) for tensor in tensors},
        "second_moment": second_moment,
        "methods": [
            {
                "name": method.name,
                "config": method.config(),
                "settings": method.settings(),
                "state": method.state_dict(),
            }
            for method in methods
        ],
    }


def check(methods: Sequence[Method], state: Mapping[str, Any]) -> None:
    """Raise a StateError, naming what differs, unless `restore` can take this state; change nothing."""
    if not isinstance(state, Mapping) or type(state.get("format")) is not int or state["format"] != FORMAT:
        found = _brief(state.get("format") if isinstance(state, Mapping) else type(state).__name__)
        raise StateError(
            f"sparsity state: format {found}, this version of gossamer reads {FORMAT}; it is a state of another "
            "version, or not one that Sparsity.state_dict() made"
        )
    for key, kind in _KEYS.items():
        if not isinstance(state.get(key), kind):
            raise StateError(f"sparsity state: {key!r} is {_brief(state.get(key))}, expected {kind.__name__}")
    if unknown := [key for part in ("masks", "begun", "shapes") for key in state[part] if not isinstance(key, str)]:
        raise StateError(f"sparsity state: masks are by parameter name, got {_brief(unknown[0])}; the file is damaged")
    if state["second_moment"] not in SECOND_MOMENTS:
        raise StateError(f"sparsity state: 'second_moment' is {_brief(state['second_moment'])}; the file is damaged")
    if type(state["step"]) is bool or not 0 <= state["step"] < 1 << 62:
        raise StateError(f"sparsity state: 'step' is {state['step']}, expected a number of steps; the file is damaged")
    for each in state["methods"]:
        if not isinstance(each, Mapping) or not all(isinstance(each.get(key), Mapping) for key in _PARTS):
            raise StateError(
                f"sparsity state: 'methods' has {_brief(each)}, expected {', '.join(_PARTS)}; the file is damaged"
            )
    saved = [each.get("name") for each in state["methods"]]
    here = [method.name for method in methods]
    if saved != here:
        raise StateError(f"sparsity state: saved with methods {saved}, attached are {here}; attach the same methods")
    for method, each in zip(methods, state["methods"], strict=True):
        for key, value in method.config().items():
            there = each["config"].get(key)
            if repr(_comparable(there)) != repr(_comparable(value)):
                raise StateError(
                    f"sparsity state: {method.name} was saved with {key}={_brief(there)}, attached is {_brief(value)}; "
                    "attach with the arguments it was saved with"
                )
        method.check_state(each["state"], _check_masks(method, state))
        _check_masks(method, state, "begun")
    claimed = {saved_name(target.name) for method in methods for target in method.claims()}
    if unknown := sorted(set(_by_name(state["masks"])) - claimed):
        raise StateError(f"sparsity state: has a mask of {unknown[0]}, which no attached method masks; attach the same")


def differences(methods: Sequence[Method], saved: Mapping[str, Any], second_moment: str) -> list[str]:
    """The arguments that a checked state was saved with and that are others now, a line each."""
    lines = [
        f"{method.name}: saved with {key}={_brief(each['settings'].get(key))}, goes on with {_brief(value)}"
        for method, each in zip(methods, saved["methods"], strict=True)
        for key, value in method.settings().items()
        if repr(each["settings"].get(key)) != repr(value)
    ]
    if saved["second_moment"] != second_moment:
        lines.append(f"attach: saved with second_moment={saved['second_moment']!r}, goes on with {second_moment!r}")
    return lines


def restore(methods: Sequence[Method], state: Mapping[str, Any]) -> None:
    """Put a checked state in force; pruned weights become 0."""
    masks, begun = _by_name(state["masks"]), _by_name(state["begun"])
    for method, each in zip(methods, state["methods"], strict=True):
        method.load_state_dict(each["state"])
    tensors = [tensor for method in methods for tensor in method.tensors]
    for tensor in tensors:
        late = begun.get(saved_name(tensor.name))
        tensor.begun = None if late is None else unpack_like(late, tensor)
        tensor.mask.copy_(unpack_like(masks[saved_name(tensor.name)], tensor))
        tensor.enforce()
    count_active(tensors)


def check_random(name: str, saved: object, generator: torch.Generator) -> None:
    """Raise a StateError unless this is a random state that the generator can take; `name` is the method's."""
    now = generator.get_state()
    if not isinstance(saved, Tensor) or saved.dtype != now.dtype or saved.shape != now.shape:
        raise StateError(f"{name}: the saved state has no random state; it is not one of this method")
    try:
        torch.Generator().set_state(saved.cpu())
    except (RuntimeError, NotImplementedError) as error:
        raise StateError(f"{name}: the saved random state is damaged ({error}); use an earlier file") from None


def saved_name(name: str) -> str:
    """A name without what wrappers add, by which the states of wrapped and plain models agree."""
    return plain_name(name).removeprefix("module.")


def _check_masks(method: Method, state: Mapping[str, Any], part: str = "masks") -> dict[str, Tensor]:
    """Check the form of a method's saved masks; returns this rank's part of each."""
    masks, shapes = _by_name(state[part]), _by_name(state["shapes"])
    found = {}
    for each in method.holdings():
        mask, listed = masks.get(saved_name(each.name)), shapes.get(saved_name(each.name))
        if mask is None:
            continue
        here = each.shape
        shape = tuple(listed) if isinstance(listed, Sequence) and all(type(n) is int for n in listed) else listed
        if not isinstance(shape, tuple) or shape != here or not is_packed(mask, here):
            form = f"{tuple(mask.shape)}, {mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
            raise StateError(
                f"sparsity state: the mask of {each.name} is for shape {_brief(shape)} (packed {form}), the weight has "
                f"{here} (packed {packed_shape(here)}, torch.uint8)"
            )
        found[each.name] = unpack_like(mask, each)
    return found


def _by_name(values: Mapping[str, Any]) -> dict[str, Any]:
    return {saved_name(name): value for name, value in values.items()}


def _comparable(value: Any) -> Any:
    """Names without what wrappers add, so that states of wrapped and plain models agree."""
    return [saved_name(each) if isinstance(each, str) else each for each in value] if isinstance(value, list) else value


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) < 200 else f"{text[:200]} …"
