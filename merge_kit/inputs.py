"""What a user names to be merged: opened, each content once, each under a name of its own."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from merge_kit import vector
from merge_kit.checkpoints import Checkpoint
from merge_kit.configuration import ModelConfig, read_config
from merge_kit.encoding import Stored
from merge_kit.errors import UsageError
from merge_kit.schema import Document, SiteName, parse

_NAMELESS = ("model", "payload", "vector")


class _Name(Document):
    name: SiteName


@dataclass(frozen=True, slots=True)
class Input:
    """A checkpoint, or a task vector, that is merged."""

    name: str
    path: Path
    file: Stored
    header: vector.VectorHeader | None
    """Of a task vector."""
    config: ModelConfig | None
    given: bool
    """Whether the user chose the name."""
    fingerprint: str = ""
    """Of the tensors and not of the files: shards and metadata make no other checkpoint."""

    @property
    def kind(self) -> str:
        """What provenance calls it."""
        return "vector" if self.header else "checkpoint"

    @property
    def id(self) -> str:
        """What the engine sorts by: the order of the arguments never matters."""
        return self.fingerprint.removeprefix("sha256:")


def open_input(text: Path, stack: ExitStack) -> Input:
    """Open what lies at ``PATH``, or at ``NAME=PATH``, until `stack` closes.

    A vector is called after its site, a checkpoint after its file or folder.

    Raises
    ------
    UsageError
        The name is not legal.
    TensorFileError
        Nothing readable lies there; see `Checkpoint`.
    """
    name, separator, rest = str(text).partition("=")
    given = bool(separator) and not text.exists()
    path = Path(rest) if given else text
    if given:
        parse(_Name, {"name": name}, str(text), UsageError)
    file: Stored = stack.enter_context(Checkpoint(path))
    header = vector.read_header(file) if vector.METADATA_KEY in file.metadata else None
    if header:
        file = vector.decoded(file)
    if not given:
        name = header.site if header else _name_from(path)
    return Input(name, path, file, header, None if header else read_config(path), given)


def _name_from(path: Path) -> str:
    """A legal name for what lies at a path; of the path, only its last telling part."""
    place = Path(os.path.abspath(path))
    stem = place.name if place.is_dir() else place.stem
    if stem in _NAMELESS:
        stem = place.parent.name
    ascii_only = unicodedata.normalize("NFKD", stem).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", ascii_only).strip("-")[:63].strip("-") or "checkpoint"


def each_once(found: Sequence[Input]) -> tuple[list[Input], list[str]]:
    """Each content once, sorted by it, and a sentence on every one that was there already."""
    kept: dict[str, Input] = {}
    notes = []
    for one in sorted(found, key=_rank):
        first = kept.get(one.id)
        if first is None:
            kept[one.id] = one
        elif first.path == one.path:
            notes.append(f"{one.path} is given twice: it counts once.")
        else:
            notes.append(f"{first.path} and {one.path} hold the same tensors: they count once.")
    return list(kept.values()), notes


def _rank(one: Input) -> tuple[object, ...]:
    """By content; of equal ones the first tells most."""
    return one.id, not one.given, one.config is None, one.name, str(one.path)


def named_apart(found: Sequence[Input]) -> list[Input]:
    """Numbers behind names that several have, in the order of their content.

    Raises
    ------
    UsageError
        Two have the same name because the user says so.
    """
    taken: set[str] = set()
    for one in found:
        if one.given and one.name in taken:
            raise UsageError(
                f"two checkpoints are called '{one.name}': tell them apart with NAME=PATH."
            )
        if one.given:
            taken.add(one.name)
    named = []
    for one in found:
        name, number = one.name, 2
        while not one.given and name in taken:
            name, number = f"{one.name[:58]}-{number}", number + 1
        taken.add(name)
        named.append(replace(one, name=name))
    return named


def choose(found: Sequence[Input], sites: Sequence[str], exclude: Sequence[str]) -> list[Input]:
    """Those that `sites` names, or all, without those that `exclude` names.

    Raises
    ------
    UsageError
        Nothing has one of the names, or nothing is left.
    """
    names = [one.name for one in found]
    if unknown := sorted({*sites, *exclude} - set(names)):
        raise UsageError(
            f"no checkpoint is called '{unknown[0]}'; there are {', '.join(sorted(names))}."
        )
    chosen = [o for o in found if (not sites or o.name in sites) and o.name not in exclude]
    if not chosen:
        raise UsageError("--site and --exclude leave nothing to merge: name one checkpoint fewer.")
    return chosen
