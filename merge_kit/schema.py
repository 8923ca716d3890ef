"""What all checked documents share: strict models, one sentence per fault."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, StringConstraints, ValidationError

from merge_kit.errors import MergeKitError

_SHOWN = 120
_LISTED = 30
_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")


def _check_name(text: str) -> str:
    if not _NAME.fullmatch(text):
        raise ValueError("a name has 1 to 63 characters: a-z, 0-9, and hyphens inside")
    return text


# Names become folders on every kind of storage; plain ASCII leaves no room for look-alikes.
SiteName = Annotated[str, AfterValidator(_check_name)]
Digest = Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]


class Document(BaseModel):
    """Base of the documents that cross a file boundary: frozen, and no unknown fields."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


D = TypeVar("D", bound=Document)


def parse(model: type[D], data: Any, where: str, error: type[MergeKitError]) -> D:
    """Check `data` against a document model.

    Raises
    ------
    MergeKitError
        Of the class `error`: one sentence that names the first field at fault, `where`, and for an
        unknown field the nearest known one.
    """
    try:
        return model.model_validate(data)
    except ValidationError as fault:
        raise error(_sentence(fault, model, where)) from fault


def _sentence(fault: ValidationError, model: type[Document], where: str) -> str:
    first = fault.errors(include_url=False)[0]
    field = shown(".".join(str(part) for part in first["loc"])) or "the document"
    if first["type"] == "extra_forbidden":
        return f"{where}: unknown key '{field}'{_nearest(first['loc'], model)}"
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


def read_yaml(path: Path, error: type[MergeKitError]) -> Mapping[str, Any]:
    """Read a YAML mapping with the safe loader.

    Raises
    ------
    MergeKitError
        Of the class `error`: the file is missing, not UTF-8, not YAML (with the line), or no
        mapping.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(f"{path} does not exist: check the path.") from None
    except UnicodeDecodeError as fault:
        raise error(f"{path} is not UTF-8 text: save it as UTF-8.") from fault
    except OSError as fault:
        raise error(f"{path} cannot be read: {fault.strerror}.") from fault
    except (yaml.YAMLError, ValueError, RecursionError) as fault:
        mark = getattr(fault, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise error(f"{path}{line}: not valid YAML.") from fault
    if not isinstance(data, dict):
        raise error(f"{path} must hold keys and values (YAML mapping).")
    return data


def dump_yaml(document: Document) -> str:
    """A document as YAML, in the order of its fields."""
    data = document.model_dump(mode="json")
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100)
