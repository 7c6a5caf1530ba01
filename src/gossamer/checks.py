"""Checks of plain arguments, and the nearest name to a wrong one."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable

from gossamer.errors import ConfigurationError


def check_integer(name: str, value: object, at_least: int) -> None:
    """Raise a ConfigurationError unless `value` is an integer not below `at_least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise ConfigurationError(f"{name}: expected an integer of at least {at_least}, got {value!r}")


def check_number(name: str, value: object, low: float, high: float, *, open_high: bool = False) -> None:
    """Raise a ConfigurationError unless `low <= value <= high` (`< high` where `open_high`)."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not (low <= value and (value < high or (value == high and not open_high))):  # type: ignore[operator]
        end = ")" if open_high or math.isinf(high) else "]"
        raise ConfigurationError(f"{name}: expected a number in [{low:g}, {high:g}{end}, got {value!r}")


def closest(name: str, allowed: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the nearest allowed name, or an empty string."""
    near = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""
