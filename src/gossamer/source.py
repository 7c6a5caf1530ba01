"""A YAML text that remembers where each value stands, so that an error can name the line; and `key=value` overrides."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import yaml

from gossamer.errors import ConfigurationError

Path = tuple[str | int, ...]
"""The keys and list positions that lead to a value."""


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, but `1e-3` is a number, as everywhere else."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


class Source:
    """The values of a YAML mapping, with overrides applied, and the place each came from.

    Args:
        name: What messages call the text: its file name.
        text: YAML; only plain values are ever built from it.
        overrides: `key=value` each; a key is a dotted path such as `optimizer.lr` or `methods.0.sparsity`, a value is
            YAML. A key that is not there is added.

    Attributes:
        data: The values.

    Raises:
        ConfigurationError: Not YAML, not a mapping, a key given twice, or an override that leads nowhere.
    """

    def __init__(self, name: str, text: str, overrides: Sequence[str] = ()):
        self.name = name
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if not isinstance(node, yaml.MappingNode):
                raise ConfigurationError(f"{name}:1: expected a mapping of keys to values")
            self._refuse_duplicates(node, set())
            self.data: dict[Any, Any] = loader.construct_document(node)
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            raise ConfigurationError(f"{name}:{line}: not valid YAML: {error.problem}") from None
        except (yaml.YAMLError, RecursionError) as error:
            raise ConfigurationError(f"{name}:1: not valid YAML: {str(error).splitlines()[0]}") from None
        finally:
            loader.dispose()
        self._root: yaml.MappingNode = node
        self._overrides: dict[Path, str] = {}
        for override in overrides:
            self._apply(override)

    def place(self, path: Sequence[str | int]) -> str:
        """Where the value at `path`, or the nearest one around it, was written: file and line, or the override."""
        for length in range(len(path), 0, -1):
            if override := self._overrides.get(tuple(path[:length])):
                return f"command line {override!r}"
        node: yaml.Node = self._root
        line = node.start_mark.line
        for i, key in enumerate(path):
            found = self._child(node, key)
            if found is None:
                start = tuple(path[: i + 1])
                added = (text for key, text in self._overrides.items() if key[: i + 1] == start)
                if (override := next(added, None)) is not None:
                    return f"command line {override!r}"
                break
            node, line = found
        return f"{self.name}:{line + 1}"

    def _child(self, node: yaml.Node, key: str | int) -> tuple[yaml.Node, int] | None:
        if isinstance(node, yaml.SequenceNode):
            if isinstance(key, int) and key < len(node.value):
                return node.value[key], node.value[key].start_mark.line
        elif isinstance(node, yaml.MappingNode):
            for key_node, value in node.value:
                if key_node.value == str(key):
                    return value, key_node.start_mark.line
        return None

    def _refuse_duplicates(self, node: yaml.Node, seen: set[int]) -> None:
        if id(node) in seen or not isinstance(node, yaml.CollectionNode):
            return
        seen.add(id(node))  # aliases make a graph of the tree
        if isinstance(node, yaml.MappingNode):
            keys: set[str] = set()
            for key, value in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value in keys:
                    raise ConfigurationError(
                        f"{self.name}:{key.start_mark.line + 1}: {key.value}: this key is given twice; remove one"
                    )
                keys.add(str(key.value))
                self._refuse_duplicates(value, seen)
        else:
            for item in node.value:
                self._refuse_duplicates(item, seen)

    def _apply(self, override: str) -> None:
        dotted, equals, text = override.partition("=")
        if not equals or not dotted:
            raise ConfigurationError(f"command line {override!r}: expected key=value, for example optimizer.lr=0.05")
        try:
            value = yaml.load(text, Loader=_Loader)
        except yaml.YAMLError as error:
            raise ConfigurationError(
                f"command line {override!r}: the value is not valid YAML: {str(error).splitlines()[0]}"
            ) from None
        path: list[str | int] = []
        holder: Any = self.data
        parts = dotted.split(".")
        for i, part in enumerate(parts):
            key: str | int = int(part) if part.isdecimal() and part not in holder else part
            last = i == len(parts) - 1
            if isinstance(holder, list):
                if not isinstance(key, int) or key >= len(holder):
                    where = ".".join(map(str, path))
                    raise ConfigurationError(
                        f"command line {override!r}: {where} is a list of {len(holder)}, it has no item {part!r}"
                    )
            elif not last and key not in holder:
                holder[key] = {}
            path.append(key)
            if last:
                holder[key] = value
            elif isinstance(holder[key], dict | list):
                holder = holder[key]
            else:
                raise ConfigurationError(
                    f"command line {override!r}: {'.'.join(map(str, path))} is {holder[key]!r}, which has no "
                    f"{parts[i + 1]!r}"
                )
        self._overrides[tuple(path)] = override
