"""YAML as merge-kit reads and writes it: plain values, each key once, nothing by reference.

Of YAML's types there are mappings with text for keys, lists, texts, numbers, true, false and null.
Anchors may be named but not referred to: a few lines of references can stand for more values than
any memory holds, and merge keys hide what a file says. ``1e-5`` is a number, as in YAML 1.2.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import SafeConstructor

from merge_kit.errors import MergeKitError
from merge_kit.schema import Document, Location, Place, shown

LIMIT = 1 << 20
"""Bytes of a file."""
_TAG = "tag:yaml.org,2002:"
_NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+")
_TEXTS = {"str", "timestamp", "merge", "value"}


@dataclass(frozen=True, slots=True)
class YamlFile:
    """What a file says, and where it says it."""

    data: Mapping[str, Any]
    place: Place


class _FaultError(Exception):
    """What cannot stand in our files, and in which line."""

    def __init__(self, message: str, line: int) -> None:
        super().__init__(message)
        self.line = line


def read_yaml(path: Path, error: type[MergeKitError]) -> YamlFile:
    """Read a YAML mapping from a file.

    Raises
    ------
    MergeKitError
        Of the class `error`: the file is missing, too large, or as `parse_yaml`.
    """
    try:
        with path.open("rb") as file:
            content = file.read(LIMIT + 1)
    except FileNotFoundError:
        raise error(f"{path} does not exist: check the path.") from None
    except OSError as fault:
        raise error(f"{path} cannot be read: {fault.strerror}.") from fault
    return parse_yaml(content, str(path), error)


def parse_yaml(content: bytes, where: str, error: type[MergeKitError]) -> YamlFile:
    """The YAML mapping in the bytes of a file that messages call `where`.

    Raises
    ------
    MergeKitError
        Of the class `error`: not UTF-8, not YAML, a key that stands twice, a reference (each with
        the line), or no mapping.
    """
    if len(content) > LIMIT:
        raise error(f"{where} is larger than {LIMIT} bytes: shorten it.")
    lines: dict[Location, int] = {}
    try:
        data = _loaded(content.decode("utf-8"), lines)
    except UnicodeDecodeError as fault:
        raise error(f"{where} is not UTF-8 text: save it as UTF-8.") from fault
    except _FaultError as fault:
        raise error(f"{where}, line {fault.line}: {fault}") from fault
    except (yaml.YAMLError, ValueError, RecursionError) as fault:
        mark = getattr(fault, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise error(f"{where}{line}: not valid YAML.") from fault
    if not isinstance(data, dict):
        raise error(f"{where} must hold keys and values (YAML mapping).")
    return YamlFile(data, Place(where, lines))


def yaml_value(text: str) -> Any:
    """One value of a command line, read as in a file.

    Raises
    ------
    ValueError
        It is no value.
    """
    try:
        return _loaded(text, {})
    except (yaml.YAMLError, RecursionError, _FaultError) as fault:
        raise ValueError(str(fault)) from fault


def dump_yaml(document: Document) -> str:
    """A document as YAML, in the order of its fields."""
    data = document.model_dump(mode="json")
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


class _Dumper(yaml.SafeDumper):
    """Quotes a text that reads like a number, and writes out what stands twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_implicit_resolver(_TAG + "float", _NUMBER, list("-+.0123456789"))


def _loaded(text: str, lines: dict[Location, int]) -> Any:
    node = yaml.compose(text, yaml.SafeLoader)
    return None if node is None else _Reading(lines).value(node, (), node.start_mark.line + 1)


@dataclass(frozen=True, slots=True)
class _Reading:
    lines: dict[Location, int]
    seen: set[int] = field(default_factory=set)

    def value(self, node: yaml.Node, path: Location, line: int) -> Any:
        if id(node) in self.seen:
            raise _FaultError("a reference (*name) has no place here: write it out.", line)
        self.seen.add(id(node))
        self.lines[path] = line
        kind = node.tag.removeprefix(_TAG)
        if isinstance(node, yaml.MappingNode) and kind == "map":
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and kind == "seq":
            return [
                self.value(entry, (*path, index), max(line, entry.start_mark.line + 1))
                for index, entry in enumerate(node.value)
            ]
        if isinstance(node, yaml.ScalarNode) and kind in _TEXTS:
            return float(node.value) if _is_number(node) else node.value
        if isinstance(node, yaml.ScalarNode) and kind in _SCALARS:
            return _SCALARS[kind](node)
        raise _FaultError(f"'{shown(kind)}' is no type of our files: leave it out.", line)

    def _mapping(self, node: yaml.MappingNode, path: Location) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, entry in node.value:
            line, name = key.start_mark.line + 1, key.value
            if key.tag == _TAG + "merge":
                raise _FaultError("a merge key (<<) has no place here: write it out.", line)
            if key.tag != _TAG + "str":
                said = f"'{shown(name)}'" if isinstance(name, str) else "of several values"
                raise _FaultError(f"the key {said} is no text: put it in quotes.", line)
            if name in found:
                place: Location = (*path, name)
                first = self.lines[place]
                raise _FaultError(
                    f"the key '{shown(name)}' stands there already, in line {first}: leave one of "
                    "the two.",
                    line,
                )
            found[name] = self.value(entry, (*path, name), line)
        return found


def _is_number(node: yaml.ScalarNode) -> bool:
    return node.style is None and _NUMBER.fullmatch(node.value) is not None


_read = SafeConstructor()
_SCALARS: Mapping[str, Callable[[yaml.ScalarNode], Any]] = {
    "null": lambda node: None,
    "bool": _read.construct_yaml_bool,
    "int": _read.construct_yaml_int,
    "float": _read.construct_yaml_float,
}
