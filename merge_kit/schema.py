"""What all checked documents share: strict models, one sentence per fault."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Annotated, Any, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, StringConstraints, ValidationError

from merge_kit.errors import MergeKitError

_SHOWN = 120
_LISTED = 40
_TIME = "%Y-%m-%dT%H:%M:%SZ"
_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")


def _check_name(text: str) -> str:
    if not _NAME.fullmatch(text):
        raise ValueError("a name has 1 to 63 characters: a-z, 0-9, and hyphens inside")
    return text


def _check_time(text: str) -> str:
    datetime.strptime(text, _TIME)
    return text


def now() -> str:
    """The time of this moment, UTC, as a `Timestamp`."""
    return datetime.now(timezone.utc).strftime(_TIME)


# Names become folders on every kind of storage; plain ASCII leaves no room for look-alikes.
SiteName = Annotated[str, AfterValidator(_check_name)]
Digest = Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]
Timestamp = Annotated[
    str,
    StringConstraints(pattern=r"^[0-9]{4}(-[0-9]{2}){2}T[0-9]{2}(:[0-9]{2}){2}Z$"),
    AfterValidator(_check_time),
]


class Document(BaseModel):
    """Base of the documents that cross a file boundary: frozen, and no unknown fields."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


D = TypeVar("D", bound=Document)
Location = tuple[str | int, ...]
"""Keys, and numbers of entries in lists, that lead to a value."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a document stands, for messages: a file, and the line of each of its values."""

    name: str
    lines: Mapping[Location, int] = field(default_factory=dict)
    path: Location = ()
    """What leads from the file's top to the document."""

    def __str__(self) -> str:
        return self.name

    def inside(self, name: str, *path: str | int) -> Place:
        """The place of a document within this one."""
        return Place(name, self.lines, (*self.path, *path))

    def at(self, *path: str | int) -> str:
        """The file and the line of a value, or of what holds it; no line at the top."""
        whole = (*self.path, *path)
        holders = (self.lines.get(whole[:length]) for length in range(len(whole), 0, -1))
        line = next(filter(None, holders), None)
        return f"{self.name}, line {line}" if line else self.name


def parse(model: type[D], data: Any, where: str | Place, error: type[MergeKitError]) -> D:
    """Check `data`, of types that JSON has, against a document model.

    Nothing is converted: a text is no number, true is no 1, and 1.0 is no whole number.

    Raises
    ------
    MergeKitError
        Of the class `error`: one sentence that names the first field at fault, `where`, and for an
        unknown field the nearest known one.
    """
    try:
        # Strict on Python's values would also refuse a list in the place of a tuple.
        return model.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as fault:
        place = where if isinstance(where, Place) else Place(where)
        raise error(_sentence(fault, model, place)) from fault


def _sentence(fault: ValidationError, model: type[Document], place: Place) -> str:
    first = fault.errors(include_url=False)[0]
    where = place.at(*first["loc"])
    field = shown(".".join(str(part) for part in first["loc"])) or "the document"
    if first["type"] == "extra_forbidden":
        return f"{where}: unknown key '{field}'{_nearest(first['loc'], model)}"
    if first["type"] == "json_invalid":
        return f"{where} holds a text that is no Unicode, or nests too deeply: correct it."
    if first["type"] == "missing":
        return f"{where}: the key '{field}' is missing."
    message = first["msg"].removeprefix("Value error, ")
    got = first.get("input")
    given = f" (got {shown(repr(got))})" if isinstance(got, str | int | float | None) else ""
    return f"{where}: '{field}': {message[0].lower()}{message[1:]}{given}."


def shown(text: str) -> str:
    """What a stranger wrote, made safe for a terminal and kept to about a line."""
    safe = "".join(c if c.isprintable() else "?" for c in text)
    return safe if len(safe) <= _SHOWN else f"{safe[:_SHOWN]}..."


def _nearest(location: tuple[int | str, ...], model: type[Document]) -> str:
    found: type[Document] | None = model
    for part in location[:-1]:
        found = _document_in(found, str(part)) if found else None
    return suggestion(str(location[-1]), list(found.model_fields) if found else [])


def _document_in(model: type[Document], field: str) -> type[Document] | None:
    """The document that a field holds, also as one of several possibilities."""
    if field not in model.model_fields:
        return None
    annotation = model.model_fields[field].annotation
    kinds = get_args(annotation) or (annotation,)
    return next((k for k in kinds if isinstance(k, type) and issubclass(k, Document)), None)


def suggestion(name: str, known: list[str]) -> str:
    """The end of a sentence on an unknown name: ``; did you mean 'x'?``, or what there is."""
    if near := difflib.get_close_matches(name, known, n=1):
        return f"; did you mean '{near[0]}'?"
    return f"; known are {', '.join(known)}." if 0 < len(known) <= _LISTED else "."
