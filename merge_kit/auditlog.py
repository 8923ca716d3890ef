"""What has left a site, line by line: append-only, each line bound to the one before it.

``audit.jsonl`` in the site's folder. A line is canonical JSON and names the digest of the line
before it, so that no line can be changed, removed or put between without breaking the chain; that
the last lines were cut off shows only to whoever has kept the digest that `verify` prints.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal

from merge_kit.errors import AuditError, ContributionError
from merge_kit.files import canonical_json, sha256_bytes, storage_errors
from merge_kit.schema import Digest, Document, Timestamp, now, parse
from merge_kit.strictjson import loads

LOG = "audit.jsonl"
START = "sha256:" + "0" * 64
"""What the first line names in the place of a line before it."""


class Record(Document):
    """One line."""

    format: Literal[1] = 1
    number: int
    time: Timestamp
    action: Literal["publishing", "published", "withdrawing", "withdrawn"]
    """Before anything leaves the site or is taken back, and once it has."""
    hub: str
    place: str
    """Folder on the hub."""
    files: dict[str, Digest]
    """Digests of what leaves, by name."""
    previous: Digest


def append(
    root: Path,
    action: Literal["publishing", "published", "withdrawing", "withdrawn"],
    hub: str,
    place: str,
    files: Mapping[str, str],
) -> None:
    """Write one more line, through to the disk.

    Raises
    ------
    AuditError
        The chain is broken: nothing is added to it.
    MergeKitError
        The storage is full, read-only or gone.
    """
    path = root / LOG
    _is_there(path)
    with storage_errors(path), _locked(path) as file:
        number, previous, end = 0, START, 0
        for line, record in _checked(file, path):
            number, previous, end = record.number, sha256_bytes(line), end + len(line) + 1
        # A line without its end was being written by a process that died before it did anything.
        file.truncate(end)
        record = Record(
            number=number + 1, time=now(), action=action, hub=hub, place=place,
            files=dict(files), previous=previous,
        )  # fmt: skip
        file.seek(0, os.SEEK_END)
        file.write(canonical_json(record.model_dump(mode="json")) + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read(root: Path) -> list[Record]:
    """All lines; none where nothing has left the site yet.

    Raises
    ------
    AuditError
        The chain is broken; names the line.
    """
    path = root / LOG
    if not _is_there(path):
        return []
    with storage_errors(path), path.open("rb") as file:
        return [record for _, record in _checked(file, path)]


def heads(root: Path) -> list[str]:
    """The digest after each line, `START` first: whoever keeps the last one sees later whether
    lines were cut off."""
    path = root / LOG
    if not _is_there(path):
        return [START]
    with storage_errors(path), path.open("rb") as file:
        return [START, *(sha256_bytes(line) for line, _ in _checked(file, path))]


def check_there(root: Path) -> bool:
    """Whether there is a line at all; the site's folder tells whether there has to be one.

    Raises
    ------
    AuditError
        Something has left the site, and there is none: names what the folder still holds of it.
    """
    if len(heads(root)) > 1:
        return True
    # Both are written after the first line, and before anything leaves the site.
    left = sorted([*root.glob("*/*/*manifest.json"), *root.glob("withdrawals/*.json")])
    if left:
        raise AuditError(
            f"{root / LOG} holds no line, and {left[0]} has left this site: the log was removed or "
            "emptied; find out who did it, and put the file back if there is a copy."
        )
    return False


def is_unfinished(root: Path) -> bool:
    """Whether the log ends in a part of a line, which does not count and is written over."""
    path = root / LOG
    if not _is_there(path):
        return False
    with storage_errors(path), path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 1, 0))
        return file.read() not in (b"", b"\n")


def _is_there(path: Path) -> bool:
    """A link or a folder in the place of the log is no log that nothing was written to."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise AuditError(
            f"{path} is no file: somebody has put something else in its place; find out "
            "who, and move it away to start a new one."
        )
    return path.exists()


def _checked(file: BinaryIO, path: Path) -> Iterator[tuple[bytes, Record]]:
    file.seek(0)
    previous = START
    for number, whole in enumerate(file, 1):
        where = f"{path}, line {number}"
        if not whole.endswith(b"\n"):
            return
        line = whole.removesuffix(b"\n")
        try:
            content = loads(line)
        except ValueError as error:
            raise _broken(where, "it is no JSON") from error
        try:
            record = parse(Record, content, where, ContributionError)
        except ContributionError as error:
            raise _broken(where, "it is no record") from error
        if canonical_json(content) != line or record.number != number:
            raise _broken(where, "it is not as it was written")
        if record.previous != previous:
            raise _broken(where, "it does not follow from the line before it")
        previous = sha256_bytes(line)
        yield line, record


def _broken(where: str, reason: str) -> AuditError:
    return AuditError(
        f"{where} has been changed, or was never written by merge-kit ({reason}): keep the file "
        "for whoever looks into it, and move it away to start a new one."
    )


@contextmanager
def _locked(path: Path) -> Iterator[BinaryIO]:
    """The file, open for reading and adding, by this process alone."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    with os.fdopen(handle, "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file
