"""Checks of plain arguments, and the nearest name to a wrong one."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from typing import Any

from gossamer.errors import ConfigurationError

MAX_SEED = 2**63 - 1
"""The largest seed: it fits a signed integer of 64 bits, as tensors and files hold them."""


def check_integer(name: str, value: object, at_least: int, at_most: int | None = None) -> None:
    """Raise a ConfigurationError unless `value` is an integer from `at_least` to `at_most` (None for no limit)."""
    fits = isinstance(value, int) and not isinstance(value, bool) and value >= at_least
    if not fits or (at_most is not None and value > at_most):  # type: ignore[operator]
        limit = "" if at_most is None else f" and at most {at_most}"
        raise ConfigurationError(f"{name}: expected an integer of at least {at_least}{limit}, got {value!r}")


def check_number(name: str, value: object, low: float, high: float, *, open_high: bool = False) -> None:
    """Raise a ConfigurationError unless `low <= value <= high` (`< high` where `open_high`)."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not (low <= value and (value < high or (value == high and not open_high))):  # type: ignore[operator]
        end = ")" if open_high or math.isinf(high) else "]"
        raise ConfigurationError(f"{name}: expected a number in [{low:g}, {high:g}{end}, got {value!r}")


def check_boolean(name: str, value: object) -> None:
    """Raise a ConfigurationError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ConfigurationError(f"{name}: expected True or False, got {value!r}")


def check_not_nested(name: str, *tensors: Any) -> None:
    """Raise a ConfigurationError where one of these tensors is nested; `name` is what got it."""
    if any(tensor.is_nested for tensor in tensors):
        raise ConfigurationError(
            f"{name}: got nested tensors, which cannot be worked on; a torch.nn.TransformerEncoder makes none where it "
            "is built with enable_nested_tensor=False, or has its attribute use_nested_tensor set to False"
        )


def closest(name: str, allowed: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the nearest allowed name, or an empty string."""
    spelled = {each.lower(): each for each in allowed}
    near = difflib.get_close_matches(name.lower(), spelled, n=1, cutoff=0.5)
    return f"; did you mean {spelled[near[0]]!r}?" if near else ""
