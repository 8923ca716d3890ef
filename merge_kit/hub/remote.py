"""Hubs on other machines: what is fetched is kept here, and checked.

Files of contributions never change: one that is kept under its digest is not fetched again. Other
files are kept as long as the storage shows the same stamp for them.
"""

from __future__ import annotations

import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import mkdtemp
from uuid import uuid4

from merge_kit.errors import HubError
from merge_kit.files import sha256_bytes, sha256_file, storage_errors
from merge_kit.hub.base import SMALL, check_name
from merge_kit.remembered import cache_folder


class RemoteHub(ABC):
    """What the storages have in common; each says how it lists, reads and writes."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        place = cache_folder("hubs")
        if place is None:
            self._cache = Path(mkdtemp(prefix="merge-kit-hub-"))
            self._kept = False
        else:
            self._cache = place / sha256_bytes(uri.encode()).removeprefix("sha256:")[:16]
            self._kept = True

    @property
    def uri(self) -> str:
        """How a user writes this hub."""
        return self._uri

    @abstractmethod
    def list(self, folder: str) -> Iterator[str]:
        """See `Hub`."""

    @abstractmethod
    def publish(self, folder: str, files: Mapping[str, Path | bytes]) -> bool:
        """See `Hub`."""

    @abstractmethod
    def replace(self, name: str, data: bytes, expected: bytes | None) -> None:
        """See `Hub`."""

    @abstractmethod
    def remove(self, name: str) -> bool:
        """See `Hub`."""

    @abstractmethod
    def _look(self, name: str) -> tuple[int, str] | None:
        """Bytes of a file, and a stamp that another content would not have; None where it is
        not."""

    @abstractmethod
    def _copy(self, name: str, target: Path) -> None:
        """Write the file's bytes to a new local file; raises HubError when they break off."""

    def has(self, name: str) -> bool:
        """Whether a file is there."""
        check_name(name)
        return self._look(name) is not None

    def size(self, name: str) -> int:
        """Bytes of a file; raises HubError when it is not there."""
        return self._found(name)[0]

    def _found(self, name: str) -> tuple[int, str]:
        check_name(name)
        found = self._look(name)
        if found is None:
            raise HubError(f"{self.uri} has no file {name}: is it the right hub, and complete?")
        return found

    def read(self, name: str) -> bytes:
        """The bytes of a small file.

        Raises
        ------
        HubError
            The file is not there, or is not small.
        """
        size, _ = self._found(name)
        if size > SMALL:
            raise HubError(
                f"{self.uri}/{name} is larger than {SMALL} bytes: it is no file of a federation."
            )
        path = self._fresh(name)
        try:
            data = path.read_bytes()
        finally:
            path.unlink(missing_ok=True)
        if len(data) > SMALL:
            raise HubError(f"{self.uri}/{name} grew while it was read: try again.")
        return data

    def fetch(self, name: str, digest: str | None = None) -> Path:
        """A local copy of a file; with a `digest` the copy has it.

        Raises
        ------
        HubError
            The file is not there, or its bytes are not those that were promised.
        """
        path, seal = self._local(name)
        promised = digest or ""
        if not digest:
            size, stamp = self._found(name)
            promised = f"{size} {stamp}"
        if path.is_file() and _text(seal) == promised:
            return path
        fresh = self._fresh(name)
        try:
            if digest and (found := sha256_file(fresh)) != digest:
                raise HubError(
                    f"{self.uri}/{name} was promised as {digest} and arrived as {found}: it was "
                    "damaged or changed; try again, and ask its site if it stays so."
                )
            with storage_errors(path):
                seal.unlink(missing_ok=True)
                fresh.replace(path)
                seal.write_text(promised)
        finally:
            fresh.unlink(missing_ok=True)
        return path

    def forget(self, name: str) -> None:
        """Remove the local copy of a file."""
        path, seal = self._local(name)
        seal.unlink(missing_ok=True)
        path.unlink(missing_ok=True)

    def _local(self, name: str) -> tuple[Path, Path]:
        """Where the copy of a file lies, and the note of what it is a copy of."""
        check_name(name)
        path = self._cache.joinpath("files", *name.split("/"))
        return path, path.with_name(f"{path.name}.seal")

    def _fresh(self, name: str) -> Path:
        """The file's bytes in a new local file."""
        path = self._cache / "arriving" / uuid4().hex
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._cache.joinpath("files", *name.split("/")).parent.mkdir(
                parents=True, exist_ok=True
            )
        try:
            self._copy(name, path)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return path

    def close(self) -> None:
        """Remove copies that are not to be kept."""
        if not self._kept:
            shutil.rmtree(self._cache, ignore_errors=True)

    def __del__(self) -> None:
        with suppress(Exception):
            self.close()


def _text(path: Path) -> str | None:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return None


def content_size(content: Path | bytes) -> int:
    """Bytes of what is to be published."""
    return len(content) if isinstance(content, bytes) else os.stat(content).st_size
