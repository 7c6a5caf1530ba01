"""What all sections of a recipe share: which keys and values they refuse, and how they say so."""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from gossamer.checks import closest


class Section(BaseModel):
    """A mapping of a recipe; unknown keys, wrong types and numbers that are not finite are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, given: Any) -> Any:
        if isinstance(given, dict) and cls.model_config.get("extra") == "forbid":
            refuse_unknown(given, cls.model_fields)
        return given


class Named(Section):
    """A choice by name, with the arguments of what it names beside it."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    @property
    def arguments(self) -> dict[str, Any]:
        """All keys but the name."""
        return dict(self.model_extra or {})


def refuse(key: str | None, reason: str, kind: Literal["refused", "unknown_key"] = "refused") -> NoReturn:
    """Within a validator: refuse the value of `key` (None for the section as a whole)."""
    raise PydanticCustomError(kind, "{reason}", {"reason": reason, "key": key})


def refuse_unknown(given: Iterable[Any], allowed: Collection[str]) -> None:
    """Within a validator: refuse the first key that is not allowed."""
    for key in given:
        if key not in allowed:
            reason = f"unknown key{closest(str(key), allowed)}; allowed are {', '.join(allowed)}"
            refuse(str(key), reason, "unknown_key")


def refuse_other_kind(key: str, value: Any, default: Any) -> None:
    """Within a validator: refuse a value that is not of the kind of an argument's default, where the default tells.

    Numbers are finite, and so are those of a list.
    """
    if isinstance(default, bool):
        expected, fits = "true or false", isinstance(value, bool)
    elif isinstance(default, int | float):
        expected, fits = "a finite number", _is_finite(value)
    elif isinstance(default, tuple):
        expected = f"a list of {len(default)} finite numbers"
        fits = (
            isinstance(value, list)
            and len(value) == len(default)
            and all(_is_finite(item) or item is usual is None for item, usual in zip(value, default, strict=True))
        )
    else:
        return
    if not fits:
        refuse(key, f"expected {expected}, got {value!r}")


def _is_finite(value: Any) -> bool:
    """Whether this is a number that a float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def key_in(message: str, keys: Iterable[str]) -> str | None:
    """The argument that an error message speaks of: the one it names first."""
    found = {match.start(): key for key in keys if (match := re.search(rf"\b{re.escape(key)}\b", message))}
    return found[min(found)] if found else None


def describe(error: ValidationError, data: Any) -> tuple[tuple[str | int, ...], str]:
    """Where in `data` a validation failed, and why: of several failures the one that tells most."""
    # An unknown key is often the cause of others that are missing, so it comes first.
    first: Mapping[str, Any] = min(error.errors(), key=lambda each: each["type"] != "unknown_key")
    key = first.get("ctx", {}).get("key")
    path = _path_of(first["loc"], data)
    return (path if key is None else (*path, key)), _message(first)


def _message(error: Mapping[str, Any]) -> str:
    if error["type"] in ("unknown_key", "refused"):
        return str(error["msg"])
    if error["type"] == "missing":
        return "missing; add it"
    if error["type"] == "union_tag_not_found":
        return "'type' is missing; add it"
    if error["type"] == "union_tag_invalid":
        return f"got type {error['ctx']['tag']!r}; allowed are {error['ctx']['expected_tags']}"
    if error["type"] == "model_type":
        return f"must be a mapping of keys to values, got {error['input']!r}"
    if error["type"] == "model_attributes_type":  # of a choice by `type`
        given = error["input"]
        example = f", such as {{type: {given}}}" if isinstance(given, str) else ""
        return f"must be a mapping of keys to values{example}, got {given!r}"
    return f"{str(error['msg']).replace('Input should be', 'must be')}, got {error['input']!r}"


def _path_of(location: Sequence[str | int], data: Any) -> tuple[str | int, ...]:
    """Pydantic's location without the tags it puts in for members of a union."""
    path: list[str | int] = []
    for part in location:
        if isinstance(data, dict) and part not in data and data.get("type") == part:
            continue
        path.append(part)
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            data = None
    return tuple(path)
