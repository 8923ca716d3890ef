"""The one interface that every storage offers. A hub knows names and bytes, never tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

from merge_kit.errors import HubError

SMALL = 8 * 2**20
"""Bytes above which no file is small."""
READERS = 8
"""Entries that are read at the same time: each takes a few requests, and a hub elsewhere takes its
time to answer them."""


class Hub(Protocol):
    """Where contributions lie. Names are relative, with forward slashes.

    Three things hold on every storage, whoever else is publishing: an entry is there with all its
    files or not at all; what is there is never overwritten; and what is fetched by its digest has
    that digest.
    """

    @property
    def uri(self) -> str:
        """How a user writes this hub."""

    def list(self, folder: str) -> Iterator[str]:
        """Names of the entries of a folder, sorted; nothing when the folder is not there."""

    def has(self, name: str) -> bool:
        """Whether a file is there."""

    def size(self, name: str) -> int:
        """Bytes of a file; raises HubError when it is not there."""

    def read(self, name: str) -> bytes:
        """The bytes of a small file."""

    def fetch(self, name: str, digest: str | None = None) -> Path:
        """A local path with the bytes of a file of any size.

        With a `digest` (``sha256:<hex>``) of a file that is copied here, other bytes are refused.
        """

    def forget(self, name: str) -> None:
        """Give up the copy that `fetch` has made of a file, where it has made one."""

    def publish(self, folder: str, files: Mapping[str, Path | bytes]) -> bool:
        """Put a whole folder in place, all files or none; False when it is there already.

        Where a storage has no such step, the last of `files` is written last, and without it the
        folder counts as not there.
        """

    def replace(self, name: str, data: bytes, expected: bytes | None) -> None:
        """Replace the federation file, if it still holds what was `expected` (None: nothing).

        Nothing else on a hub is ever rewritten. Raises HubError when somebody else was faster.
        """

    def remove(self, name: str) -> bool:
        """Remove a file; False where the storage keeps its bytes all the same."""


def places(hub: Hub, root: str, site: str | None = None) -> Iterator[tuple[str, str]]:
    """The entries below a folder of the hub, or those of one site there: sites and names."""
    for one in hub.list(root) if site is None else [site]:
        for name in hub.list(f"{root}/{one}"):
            yield one, name


def check_name(name: str) -> list[str]:
    """The parts of a name inside a hub.

    Raises
    ------
    HubError
        It leads out of the hub.
    """
    parts = name.split("/")
    if any(part in ("", ".", "..") or "\\" in part or "\0" in part for part in parts):
        raise HubError(f"'{name}' is no name inside a hub: it must be relative and plain.")
    return parts


def is_plain(name: str) -> bool:
    """Whether a publisher writes such a name: others could not be addressed, or would drive the
    terminal that shows them."""
    return not name.startswith(".") and name.isprintable() and "\\" not in name


def changed_meanwhile(where: str) -> HubError:
    """What whoever was slower is told."""
    return HubError(
        f"{where} has been changed by somebody else meanwhile: run the same command again."
    )
