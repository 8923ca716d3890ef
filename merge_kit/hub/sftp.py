"""A hub on an SFTP server: a folder that is reached over SSH.

Version 3 of the protocol, as OpenSSH speaks it, and its extensions where the server has them.
Symbolic links below the hub's folder are refused: they may lead to any file of the server's.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeGuard
from uuid import uuid4

import asyncssh

from merge_kit.errors import HubError
from merge_kit.hub.base import SMALL, changed_meanwhile, check_name, is_plain
from merge_kit.hub.remote import RemoteHub
from merge_kit.hub.sftpfiles import ABSENT, Attributes, Download, Lock, Upload, receive
from merge_kit.hub.ssh import Broken, Server, Session, Step, parse_address

_HEX = "[0-9a-f]{32}"
_LITTLE = 1 << 20
"""Bytes below which a disk counts as full."""
_READ_ONLY = 1


class SftpHub(RemoteHub):
    """A hub in a folder of an SFTP server; entries appear whole through one rename."""

    def __init__(self, uri: str) -> None:
        address = parse_address(uri)
        super().__init__(address.uri)
        self._root = address.path.rstrip("/")
        self._server = Server(address)

    def list(self, folder: str) -> Iterator[str]:
        """Names of the entries of a folder, sorted.

        Left out are those that are still being written, and names that no publisher writes.

        Raises
        ------
        HubError
            It may not be seen, or is a link.
        """
        parts = check_name(folder)

        async def names(session: Session) -> Sequence[str]:
            try:
                if not _is_folder(await self._walk(session, parts)):
                    return ()
                return await session.ask(session.sftp.listdir(self._path(parts)))
            except ABSENT:
                return ()

        with self._reading(folder):
            found = self._server.run(names)
        yield from sorted(name for name in found if is_plain(name) and "/" not in name)

    def read(self, name: str) -> bytes:
        """The bytes of a small file.

        Raises
        ------
        HubError
            The file is not there, cannot be read, or is not small.
        """
        parts = check_name(name)

        async def content(session: Session) -> bytes | None:
            found, data = await self._walk(session, parts), bytearray()
            if not _is_file(found) or found.size is None or found.size > SMALL:
                return None
            await receive(session, self._path(parts), 0, found.size, data.extend)
            return bytes(data)

        with self._reading(name):
            data = self._server.run(content)
        return super().read(name) if data is None else data  # where it says what is wrong

    def publish(self, folder: str, files: Mapping[str, Path | bytes]) -> bool:
        """Upload beside, then rename the folder into place.

        Whoever is killed leaves a hidden folder, which nobody reads and the next publisher of the
        same entry removes. It may be that of a slower publisher who is alive: that one then finds
        the entry there.
        """
        parts = check_name(folder)
        for name in files:
            if len(check_name(name)) != 1:
                raise HubError(f"'{name}' cannot be published: an entry's files lie in no folders.")
        if self._is_there(parts):
            self._clear(parts)
            return False
        partial = [*parts[:-1], f".{parts[-1]}.{uuid4().hex}"]
        try:
            with self._writing(folder):
                self._server.run(lambda session: self._make(session, partial))
                for name, content in files.items():
                    Upload(self._path([*partial, name]), content).run(self._server)
                published = self._into_place(partial, parts)
        except Broken:
            raise
        except HubError:
            if self._is_there(parts):  # whoever was faster has removed our folder, too
                return False
            raise
        finally:
            self._once(lambda session: _remove(session, self._path(partial)))
        self._clear(parts)
        return published

    def replace(self, name: str, data: bytes, expected: bytes | None) -> None:
        """Replace a small file in one step, while no other client does.

        Raises
        ------
        HubError
            It does not hold what was expected, or the server cannot.
        """
        parts = check_name(name)
        beside = [*parts[:-1], f".{parts[-1]}.{uuid4().hex}"]
        lock = Lock(self._server, self._path([*parts[:-1], f".{parts[-1]}.lock"]))
        with self._writing(name), lock.held():
            self._clear(parts, rf"(lock\.)?{_HEX}")  # of those who were killed here
            if (self.read(name) if self.has(name) else None) != expected:
                raise changed_meanwhile(f"{self.uri}/{name}")
            try:
                Upload(self._path(beside), data).run(self._server)
                self._swap(beside, parts, lock, fresh=expected is None)
            finally:
                self._once(lambda session: _remove(session, self._path(beside)))

    def remove(self, name: str) -> bool:
        """Remove a file."""
        parts = check_name(name)

        async def go(session: Session) -> None:
            if await self._walk(session, parts):
                with suppress(*ABSENT):
                    await session.ask(session.sftp.remove(self._path(parts)))

        with self._writing(name):
            self._server.run(go)
        return True

    def close(self) -> None:
        """Hang up, and remove copies that are not to be kept."""
        self._server.close()
        super().close()

    def _look(self, name: str) -> tuple[int, str] | None:
        parts = check_name(name)
        with self._reading(name):
            found = self._server.run(lambda session: self._walk(session, parts))
        if not _is_file(found):
            return None
        size = found.size or 0
        # Times are whole seconds here, so what may be replaced is never taken for the same.
        return size, uuid4().hex if size <= SMALL else str(found.mtime)

    def _copy(self, name: str, target: Path) -> None:
        parts = check_name(name)

        async def look(session: Session) -> Attributes:
            found = await self._walk(session, parts)
            if not _is_file(found):
                raise HubError(f"{self.uri} has no file {name}: is it the right hub, and complete?")
            return found

        with self._reading(name):
            Download(self._path(parts), target).run(self._server, look)

    def _path(self, parts: Sequence[str]) -> str:
        return "/".join([self._root, *parts])

    async def _walk(self, session: Session, parts: Sequence[str]) -> Attributes | None:
        """What lies at a place of the hub, None where nothing does; no link leads there."""
        steps = [parts[: depth + 1] for depth in range(len(parts))]
        asked = [session.ask(session.sftp.lstat(self._path(step))) for step in steps]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        last = None
        for step, found in zip(steps, answers, strict=True):
            if isinstance(found, ABSENT):
                return None
            if isinstance(found, BaseException):
                raise found
            if found.type == asyncssh.FILEXFER_TYPE_SYMLINK:
                raise HubError(
                    f"{self.uri}/{'/'.join(step)} is a symbolic link: a hub must hold the files "
                    "themselves."
                )
            last = found
        return last

    def _is_there(self, parts: Sequence[str]) -> bool:
        with self._reading("/".join(parts)):
            return _is_folder(self._server.run(lambda session: self._walk(session, parts)))

    async def _make(self, session: Session, folder: Sequence[str]) -> None:
        """Make a folder and those above it; they may be there already."""
        above = len(folder) - 1
        first = above if _is_folder(await self._walk(session, folder[:above])) else 0
        for depth in range(first, len(folder)):
            part = folder[: depth + 1]
            try:
                await session.ask(session.sftp.mkdir(self._path(part)))
            except asyncssh.SFTPError:
                if not _is_folder(await self._walk(session, part)):
                    raise

    def _into_place(self, partial: Sequence[str], parts: Sequence[str]) -> bool:
        """Rename an entry's folder; False when another one has the name.

        OpenSSH refuses any name that is there, and where two ask at once the second rename finds
        a folder that is not empty.
        """
        asked = False

        async def step(session: Session) -> bool:
            nonlocal asked
            if asked and not await self._walk(session, partial):  # only the answer was lost
                if _is_folder(await self._walk(session, parts)):
                    return True
                raise HubError(
                    f"{self.uri}/{'/'.join(parts)} disappeared while it was published: run the "
                    "same command again."
                )
            asked = True
            try:
                await session.ask(session.sftp.rename(self._path(partial), self._path(parts)))
            except asyncssh.SFTPError:
                if _is_folder(await self._walk(session, parts)):
                    return False
                raise
            return True

        return self._server.run(step)

    def _swap(
        self, beside: Sequence[str], parts: Sequence[str], lock: Lock, *, fresh: bool
    ) -> None:
        """Rename a file into place, over the one that is there if it is not `fresh`."""
        asked, where = False, f"{self.uri}/{'/'.join(parts)}"
        names = self._path(beside), self._path(parts)

        async def step(session: Session) -> None:
            nonlocal asked
            if asked and not await self._walk(session, beside):
                return  # only the answer was lost
            if not await lock.is_ours(session):
                raise changed_meanwhile(where)
            asked = True
            try:
                await session.ask(
                    session.sftp.rename(*names) if fresh else session.sftp.posix_rename(*names)
                )
            except asyncssh.SFTPFailure as error:
                if fresh and await self._walk(session, parts):
                    raise changed_meanwhile(where) from error
                raise
            except asyncssh.SFTPOpUnsupported as error:
                raise HubError(
                    f"{where} cannot be replaced: the server does not offer to rename a file over "
                    "another one (posix-rename@openssh.com); change the file on the server."
                ) from error

        self._server.run(step)

    def _clear(self, parts: Sequence[str], ending: str = _HEX) -> None:
        """Remove what killed publishers of an entry have left; what cannot be removed stays."""
        stale = re.compile(rf"\.{re.escape(parts[-1])}\.{ending}")
        above = parts[:-1]

        async def go(session: Session) -> None:
            for name in await session.ask(session.sftp.listdir(self._path(above) or "/")):
                if stale.fullmatch(name):
                    await _remove(session, self._path([*above, name]))

        self._once(go)

    def _once(self, step: Step[None]) -> None:
        """Tidy up, if it can be done."""
        with suppress(HubError, asyncssh.SFTPError):
            self._server.run(step, tries=1)

    @contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        try:
            yield
        except asyncssh.SFTPError as error:
            raise HubError(
                f"{self.uri}/{name} cannot be read: the server says '{error.reason}': ask whoever "
                "published it to make it readable."
            ) from error

    @contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        try:
            yield
        except asyncssh.SFTPError as error:
            raise HubError(f"{self.uri}/{name} cannot be written: {self._why(error)}.") from error

    def _why(self, error: asyncssh.SFTPError) -> str:
        """What has failed: this version of the protocol has one word for most of it."""
        if isinstance(error, asyncssh.SFTPPermissionDenied):
            return "the server denies it to this user: ask who runs it for the right to write there"
        disk: list[asyncssh.SFTPVFSAttrs] = []

        async def look(session: Session) -> None:
            disk.append(await session.ask(session.sftp.statvfs(self._root or "/")))

        self._once(look)
        if disk and disk[0].flags & _READ_ONLY:
            return "the server's file system is read-only: ask who runs it"
        free = disk[0].bavail * disk[0].frsize if disk else _LITTLE
        if free < _LITTLE or isinstance(error, asyncssh.SFTPNoSpaceOnFilesystem):
            return (
                f"no space left on the server ({free // 2**20} MiB free): make room and run the "
                "same command again"
            )
        return f"the server says '{error.reason}': ask who runs it, a quota may be used up"


def _is_folder(found: Attributes | None) -> bool:
    return found is not None and found.type == asyncssh.FILEXFER_TYPE_DIRECTORY


def _is_file(found: Attributes | None) -> TypeGuard[Attributes]:
    return found is not None and found.type == asyncssh.FILEXFER_TYPE_REGULAR


async def _remove(session: Session, path: str) -> None:
    """Remove a file, or a folder with all that it holds."""
    try:
        found = await session.ask(session.sftp.lstat(path))
    except ABSENT:
        return
    if _is_folder(found):
        await session.ask(session.sftp.rmtree(path, ignore_errors=True))
    else:
        await session.ask(session.sftp.remove(path))
