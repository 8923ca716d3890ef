"""What lies in a repository at a commit, and what a commit is to change."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha1
from pathlib import Path
from typing import TypeAlias

from huggingface_hub import CommitOperationAdd, CommitOperationDelete

from merge_kit.files import sha256_bytes, sha256_file

Operation: TypeAlias = CommitOperationAdd | CommitOperationDelete
Plan: TypeAlias = Callable[[str], Sequence[Operation] | None]


@dataclass(frozen=True, slots=True)
class Found:
    """A file at a commit; `digest` is ``sha256:<hex>`` or, of a small one, ``git:<hex>``."""

    size: int
    digest: str

    def is_of(self, content: Path | bytes) -> bool:
        """Whether a file here has the same bytes."""
        if self.digest.startswith("git:"):
            data = content if isinstance(content, bytes) else content.read_bytes()
            blob = sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False)
            return self.digest == f"git:{blob.hexdigest()}"
        found = sha256_bytes(content) if isinstance(content, bytes) else sha256_file(content)
        return self.digest == found


@dataclass(frozen=True, slots=True)
class Done:
    """What became of a change."""

    revision: str
    """A commit, or a pull request's reference, with it."""
    ours: bool
    """Whether it was, or may have been, a commit of ours that did it."""
    pull_request: str | None = None
    """Where it waits to be let in."""
    left_out: tuple[str, ...] = ()
    """Files that the repository's own rules do not let in."""


def unlike(there: Mapping[str, Found], operations: Sequence[Operation]) -> list[Operation]:
    """Those of the operations that the files there do not show."""
    return [each for each in operations if not _shown(there.get(each.path_in_repo), each)]


def afresh(operation: Operation) -> Operation:
    """The same once more: the library takes none twice."""
    if isinstance(operation, CommitOperationDelete):
        return operation
    return CommitOperationAdd(operation.path_in_repo, operation.path_or_fileobj)


def _shown(found: Found | None, operation: Operation) -> bool:
    if isinstance(operation, CommitOperationDelete):
        return found is None
    if found is None:
        return False
    if found.digest.startswith("git:"):
        with operation.as_file() as file:
            return found.is_of(file.read())
    return found.digest == f"sha256:{operation.upload_info.sha256.hex()}"
