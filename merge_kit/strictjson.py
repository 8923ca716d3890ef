"""JSON that may come from anybody, read so that every reader finds the same in it.

Of a key that stands twice Python takes the last value, other readers the first (RFC 8259, section
4): who signs one value could have another one merged. NaN and Infinity are no JSON.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn

from merge_kit.errors import MergeKitError
from merge_kit.schema import shown


class RepeatedKeyError(ValueError):
    """An object names a key twice."""

    def __init__(self, key: str) -> None:
        self.key = shown(repr(key))
        super().__init__(f"the key {self.key} stands there twice")


def loads(data: bytes | str) -> Any:
    """What a JSON text says.

    Raises
    ------
    ValueError
        It is no JSON, holds NaN or Infinity, nests too deeply; or `RepeatedKeyError`.
    """
    try:
        return json.loads(data, object_pairs_hook=_once, parse_constant=_refuse)
    except RecursionError as error:
        raise ValueError("it nests too deeply") from error


def read_json(data: bytes | str, where: str, error: type[MergeKitError], otherwise: str) -> Any:
    """The same of a file; `otherwise` is the whole sentence for what is no JSON.

    Raises
    ------
    MergeKitError
        Of the class `error`.
    """
    try:
        return loads(data)
    except RepeatedKeyError as fault:
        raise error(f"{where} names the key {fault.key} twice: it is refused.") from fault
    except ValueError as fault:
        raise error(otherwise) from fault


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names: set[str] = set()
        for name, _ in pairs:
            if name in names:
                raise RepeatedKeyError(name)
            names.add(name)
    return found


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")
