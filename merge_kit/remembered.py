"""What was found in a large file when it was last read: digests are checked once and remembered.

One small JSON file for each, in the folder that the environment variable MERGE_KIT_CACHE names, or
else in XDG_CACHE_HOME or ~/.cache under merge-kit; ``MERGE_KIT_CACHE=off`` remembers nothing. What
is remembered counts only for the same path with the same device, inode, size and times, and a file
that was modified less than two seconds before it was read is read again: a second change within
one tick of the file system's clock would not show. Records are not signed: whoever can write into
the user's own cache folder can already run code as the user; a folder that belongs to somebody
else, or that others may write to, is not used.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol, TypeVar

from pydantic import ValidationError

from merge_kit.errors import MergeKitError, TensorFileError
from merge_kit.files import canonical_json, sha256_bytes, sha256_open, write_atomic
from merge_kit.schema import Digest, Document
from merge_kit.tensorfile import identity_of

VARIABLE = "MERGE_KIT_CACHE"
LIMIT = 10_000
"""Records that are kept; above it the oldest quarter goes."""
SETTLED = 2_000_000_000
"""Nanoseconds since its last change after which what a file holds is remembered."""
_RECORD_BYTES = 1 << 16
_OURS = re.compile(r"\.?[0-9a-f]{64}\.json(\.partial)?")

F = TypeVar("F", bound=Document)


class Identified(Protocol):
    """An open file, or several that make one checkpoint."""

    @property
    def path(self) -> Path:
        """Where it lies."""

    def identity(self) -> tuple[int, ...]:
        """Five numbers for each file, as `TensorFile.identity`; they change when its bytes do."""


I = TypeVar("I", bound=Identified)  # noqa: E741


class Content(Document):
    """What a file of any kind holds."""

    sha256: Digest


def look_at_content(path: Path) -> Content:
    """The digest of a file, read now or as it is remembered.

    Raises
    ------
    TensorFileError
        The file changed while it was read.
    """
    with path.open("rb") as file:
        found, _ = look(_Open(path, file), Content, lambda it: Content(sha256=sha256_open(it.file)))
    return found


@dataclass(frozen=True, slots=True)
class _Open:
    path: Path
    file: BinaryIO

    def identity(self) -> tuple[int, ...]:
        return identity_of(os.fstat(self.file.fileno()))


@dataclass(frozen=True, slots=True)
class Checked:
    """Which file was checked, and when."""

    identity: tuple[int, ...]
    """`TensorFile.identity` of what was read."""
    remembered: bool
    """Whether an earlier reading was relied on."""


class _Record(Document):
    format: Literal[1] = 1
    identity: tuple[int, ...]
    found: dict[str, Any]


def look(
    file: I, kind: type[F], find: Callable[[I], F], *, again: bool = False
) -> tuple[F, Checked]:
    """What is remembered of an open file, or with `again` in any case what `find` finds in it now.

    `kind` is what `find` gives; it must depend on the file's bytes alone.

    Raises
    ------
    TensorFileError
        The file changed while it was read.
    """
    begun, identity = time.time_ns(), file.identity()
    place = _place(file.path, kind)
    if place and not again and (known := _recall(place, identity, kind)):
        return known, Checked(identity, remembered=True)
    found, checked = find(file), Checked(identity, remembered=False)
    check_unchanged(file, checked)
    keep(file.path, checked, found, begun)
    return found, checked


def recall(path: Path, kind: type[F]) -> tuple[F, Checked] | None:
    """What is remembered of the file at a path as it is now."""
    identity, place = identity_of(os.stat(path)), _place(path, kind)
    known = _recall(place, identity, kind) if place else None
    return (known, Checked(identity, remembered=True)) if known else None


def keep(path: Path, checked: Checked, found: Document, begun: int) -> None:
    """Remember what was found in a file whose reading `begun` then (`time.time_ns`)."""
    place, times = _place(path, type(found)), checked.identity[3::5] + checked.identity[4::5]
    if place and max(times) + SETTLED <= begun:
        _keep(place, checked.identity, found)


def check_unchanged(file: Identified, checked: Checked) -> None:
    """Refuse an open file that is not, or not any more, what was checked.

    Raises
    ------
    TensorFileError
        Names the file.
    """
    if file.identity() != checked.identity:
        raise TensorFileError(
            f"{file.path} changed after it was checked: let whatever writes there finish, "
            "then run the same command again."
        )


def cache_folder(part: str) -> Path | None:
    """Where records of one part lie; None when nothing is remembered."""
    chosen = os.environ.get(VARIABLE, "")
    if chosen == "off":
        return None
    if chosen:
        return Path(os.path.abspath(os.path.expanduser(chosen))) / part
    cache = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(cache):
        cache = os.path.join(os.path.expanduser("~"), ".cache")
    return Path(cache) / "merge-kit" / part if os.path.isabs(cache) else None


def _place(path: Path, kind: type[Document]) -> Path | None:
    folder = cache_folder("checked")
    name = canonical_json([kind.__name__, os.path.abspath(path)])
    return folder / f"{sha256_bytes(name).removeprefix('sha256:')}.json" if folder else None


def _recall(place: Path, identity: tuple[int, ...], kind: type[F]) -> F | None:
    try:
        if not is_private(place.parent):
            return None
        with place.open("rb") as file:
            record = _Record.model_validate_json(file.read(_RECORD_BYTES), strict=True)
        return kind.model_validate(record.found) if record.identity == identity else None
    except (OSError, ValidationError):
        return None


def _keep(place: Path, identity: tuple[int, ...], found: Document) -> None:
    record = {"format": 1, "identity": identity, "found": found.model_dump(mode="json")}
    with suppress(OSError, MergeKitError):  # a cache that cannot be written is no error
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if is_private(place.parent):
            _prune(place.parent)
            write_atomic(place, canonical_json(record))


def is_private(folder: Path) -> bool:
    """Whether a folder is the user's own and nobody else may write to it."""
    found = folder.stat()
    owner = os.geteuid() if hasattr(os, "geteuid") else found.st_uid
    return found.st_uid == owner and not found.st_mode & 0o022


def _prune(folder: Path) -> None:
    with os.scandir(folder) as entries:
        ours = [entry for entry in entries if _OURS.fullmatch(entry.name)]
    if len(ours) < LIMIT:
        return
    oldest = sorted((entry.stat().st_mtime_ns, entry.path) for entry in ours)
    for _, path in oldest[: len(oldest) - LIMIT * 3 // 4]:
        os.unlink(path)
