"""A YAML text that remembers where each value stands, so that an error can name the line; and `key=value` overrides."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Sequence
from typing import Any

import yaml

from gossamer.errors import ConfigurationError


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    """How plain scalars are told apart, by their first character: as in YAML 1.1, but for three of its traps.

    `1e-3` is a number, as everywhere else; `2:4` is a text and no number of base 60; a date is a text.
    """
    own = {
        "tag:yaml.org,2002:int": r"[-+]?(0b[01_]+|0x[0-9a-fA-F_]+|0[0-7_]*|[1-9][0-9_]*)",
        "tag:yaml.org,2002:float": r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?"
        r"|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
    }
    left_out = {*own, "tag:yaml.org,2002:timestamp"}
    resolvers = {
        first: [(tag, pattern) for tag, pattern in known if tag not in left_out]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    for tag, pattern in own.items():
        for first in "-+.0123456789":
            resolvers.setdefault(first, []).append((tag, re.compile(f"^({pattern})$")))
    return resolvers


class _Loader(yaml.SafeLoader):
    """Builds plain values only; a scalar that is not what its tag says is an error with its line."""

    yaml_implicit_resolvers = _resolvers()

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, OverflowError, LookupError, AttributeError):
            kind = node.tag.rpartition(":")[2]
            problem = f"{reprlib.repr(node.value)} cannot be read as {kind}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None


class _Dumper(yaml.SafeDumper):
    """Quotes a text exactly where `_Loader` would take it for something else."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def dump(values: Any) -> str:
    """The YAML text of plain values, which `Source` reads back as the same."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


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
        node, data = _read(text, lambda line: f"{name}:{line}")
        if not isinstance(node, yaml.MappingNode):
            raise ConfigurationError(f"{name}:1: expected a mapping of keys to values")
        self.data: dict[Any, Any] = data
        self._root: yaml.MappingNode = node
        self._overrides: dict[tuple[str, ...], str] = {}  # by keys as texts: overrides do not tell 0 from "0"
        for override in overrides:
            self._apply(override)

    def place(self, path: Sequence[str | int]) -> str:
        """Where the value at `path`, or the nearest one around it, was written: file and line, or the override."""
        keys = tuple(map(str, path))
        for length in range(len(keys), 0, -1):
            if override := self._overrides.get(keys[:length]):
                return f"command line {override!r}"
        node: yaml.Node = self._root
        line = node.start_mark.line
        for i, key in enumerate(path):
            found = self._child(node, key)
            if found is None:
                start = keys[: i + 1]
                added = (text for key, text in self._overrides.items() if key[: i + 1] == start)
                if (override := next(added, None)) is not None:
                    return f"command line {override!r}"
                break
            node, line = found
        # What is wrong with one part of a section may be wrong because of what the command line changed beside it.
        section = keys[:-1] if isinstance(node, yaml.ScalarNode) else keys
        changed = [repr(text) for key, text in self._overrides.items() if section and key[: len(section)] == section]
        if changed:
            return f"{self.name}:{line + 1} with {', '.join(changed)} on the command line"
        return f"{self.name}:{line + 1}"

    def _child(self, node: yaml.Node, key: str | int) -> tuple[yaml.Node, int] | None:
        if isinstance(node, yaml.SequenceNode):
            if isinstance(key, int) and key < len(node.value):
                return node.value[key], node.value[key].start_mark.line
        elif isinstance(node, yaml.MappingNode):
            for key_node, value in node.value:
                is_null = str(key) == "None" and key_node.tag.endswith(":null")
                if is_null or key_node.value.lower() == str(key).lower():
                    return value, key_node.start_mark.line
        return None

    def _apply(self, override: str) -> None:
        if any("\ud800" <= character <= "\udfff" for character in override):
            raise ConfigurationError(f"command line {override!a}: is no UTF-8 text")
        dotted, equals, text = override.partition("=")
        if not equals or not dotted:
            raise ConfigurationError(f"command line {override!r}: expected key=value, for example optimizer.lr=0.05")
        _, value = _read(text, lambda line: f"command line {override!r}")
        path: list[str | int] = []
        holder: Any = self.data
        parts = dotted.split(".")
        for i, part in enumerate(parts):
            key: str | int = int(part) if part.isdecimal() and len(part) < 10 and part not in holder else part
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
        self._overrides[tuple(map(str, path))] = override


def _read(text: str, place: Callable[[int], str]) -> tuple[yaml.Node | None, Any]:
    """The nodes and the value of a YAML text; `place` says where its line of that number is."""
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None, None
            _refuse_duplicates(node, set(), place)
            return node, loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigurationError(f"{place(line)}: not valid YAML: {error.problem}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        reason = str(error).splitlines()[0]
        raise ConfigurationError(f"{place(line)}: not valid YAML: {reason}") from None
    except RecursionError:
        raise ConfigurationError(f"{place(1)}: not valid YAML: nested too deeply") from None


def _refuse_duplicates(node: yaml.Node, seen: set[int], place: Callable[[int], str]) -> None:
    if id(node) in seen or not isinstance(node, yaml.CollectionNode):
        return
    seen.add(id(node))  # aliases make a graph of the tree
    if isinstance(node, yaml.MappingNode):
        keys: set[str] = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in keys:
                where = place(key.start_mark.line + 1)
                raise ConfigurationError(f"{where}: {key.value}: this key is given twice; remove one")
            keys.add(str(key.value))
            _refuse_duplicates(value, seen, place)
    else:
        for item in node.value:
            _refuse_duplicates(item, seen, place)
