"""A hub that is a folder: a local disk, a share, a stick that travels."""

from __future__ import annotations

import os
import shutil
import stat
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

from merge_kit.errors import HubError, MergeKitError
from merge_kit.files import storage_errors, sync_folder, write_atomic
from merge_kit.hub.base import SMALL, changed_meanwhile, check_name, is_plain

_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)


class FolderHub:
    """A hub in a folder; entries appear whole through one rename."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def uri(self) -> str:
        """The folder's path."""
        return str(self.root)

    def list(self, folder: str) -> Iterator[str]:
        """Names of the entries of a folder, sorted.

        Left out are those that are still being written, and names that no publisher writes.
        """
        path = self._path(folder)
        if path.is_dir():
            yield from sorted(filter(is_plain, os.listdir(path)))

    def has(self, name: str) -> bool:
        """Whether a file is there."""
        return self._path(name).is_file()

    def size(self, name: str) -> int:
        """Bytes of a file.

        Raises
        ------
        HubError
            The file is not there, or is a link.
        """
        return self.fetch(name).stat().st_size

    def read(self, name: str) -> bytes:
        """The bytes of a small file.

        Raises
        ------
        HubError
            The file is not there, cannot be read, or is not small.
        """
        path = self.fetch(name)
        try:
            # One that has become a link since it was looked at is not followed.
            with os.fdopen(os.open(path, os.O_RDONLY | _NOFOLLOW), "rb") as file:
                data = file.read(SMALL + 1)
        except OSError as error:
            raise HubError(
                f"{path} cannot be read: {error.strerror}: ask whoever published it to make it "
                "readable."
            ) from error
        if len(data) > SMALL:
            raise HubError(f"{path} is larger than {SMALL} bytes: it is no file of a federation.")
        return data

    def fetch(self, name: str, digest: str | None = None) -> Path:
        """The file's own path; symbolic links are refused, they may lead out of the hub.

        Nothing is copied, so no `digest` is checked: whoever reads the file checks what it reads.

        Raises
        ------
        HubError
            The file is not there, or is a link.
        """
        path = self._unlinked(name)
        if not path.is_file():
            raise HubError(f"{self.root} has no file {name}: is it the right hub, and complete?")
        return path

    def forget(self, name: str) -> None:
        """Nothing to do: nothing was copied."""

    def publish(self, folder: str, files: Mapping[str, Path | bytes]) -> bool:
        """Write beside, then rename the folder into place.

        Whoever is killed leaves a hidden folder, which nobody reads and the next publisher of the
        same entry removes. Two publishers of one entry cannot disturb each other: the second
        rename finds the place taken.
        """
        target = self._unlinked(folder)
        if target.is_dir():
            return False
        partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        try:
            with storage_errors(target):
                partial.mkdir(parents=True)
                for name, content in files.items():
                    _write_through(partial / name, content)
                sync_folder(partial)
                published = _rename_new(partial, target)
                sync_folder(target.parent)
        except MergeKitError as error:
            if target.is_dir():  # the other publisher of this entry has cleaned up after itself
                return False
            raise HubError(str(error)) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        for stale in target.parent.glob(f".{target.name}.*"):
            shutil.rmtree(stale, ignore_errors=True)
        return published

    def replace(self, name: str, data: bytes, expected: bytes | None) -> None:
        """Replace a small file atomically.

        Raises
        ------
        HubError
            It does not hold what was expected.
        """
        path = self._unlinked(name)
        if (self.read(name) if self.has(name) else None) != expected:
            raise changed_meanwhile(str(path))
        write_atomic(path, data)

    def remove(self, name: str) -> bool:
        """Remove a file."""
        path = self._unlinked(name)
        with storage_errors(path):
            path.unlink(missing_ok=True)
        return True

    def _unlinked(self, name: str) -> Path:
        """A place inside; refused where a symbolic link may lead out of the hub."""
        part = str(self.root)  # a thousand entries are thousands of paths: as texts they take less
        for step in check_name(name):
            part = f"{part}/{step}"
            try:
                mode = os.lstat(part).st_mode
            except (FileNotFoundError, NotADirectoryError):
                break
            if stat.S_ISLNK(mode):
                raise HubError(f"{part} is a symbolic link: a hub must hold the files themselves.")
        return self._path(name)

    def _path(self, name: str) -> Path:
        return self.root.joinpath(*check_name(name))


def _write_through(path: Path, content: Path | bytes) -> None:
    with path.open("wb") as file:
        if isinstance(content, bytes):
            file.write(content)
        else:
            with content.open("rb") as source:
                shutil.copyfileobj(source, file, 1 << 20)
        file.flush()
        os.fsync(file.fileno())


def _rename_new(partial: Path, target: Path) -> bool:
    try:
        partial.rename(target)
    except OSError:
        if target.is_dir():
            return False
        raise
    return True
