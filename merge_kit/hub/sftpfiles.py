"""Single files on an SFTP server: sent, fetched and locked, in steps that may be begun anew."""

from __future__ import annotations

import asyncio
import io
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO, TypeVar, cast
from uuid import uuid4

import asyncssh
from asyncssh import FXF_CREAT, FXF_EXCL, FXF_READ, FXF_TRUNC, FXF_WRITE

from merge_kit.errors import HubError
from merge_kit.files import sha256_bytes, storage_errors
from merge_kit.hub import ssh
from merge_kit.hub.ssh import Server, Session

ABSENT = (asyncssh.SFTPNoSuchFile, asyncssh.SFTPNoSuchPath)
LOCK_LASTS = 60.0
"""Seconds for which a lock must stay as it is before whoever made it is taken for dead."""
_LOOKS = 0.25
"""Seconds between two looks at a lock."""
_TRIES = 3
_CHUNK = 1 << 16
_AT_ONCE = 32
"""Chunks on their way at the same time: 2 MiB keep a line of 100 ms busy up to 20 MB/s."""

T = TypeVar("T")
Attributes = asyncssh.SFTPAttrs


@asynccontextmanager
async def opened(session: Session, path: str, flags: int) -> AsyncIterator[asyncssh.SFTPClientFile]:
    """An open file, which is closed without waiting for the answer."""
    # Without blocks of its own: asyncssh would leave their tasks behind when one of them fails.
    file = await session.ask(session.sftp.open(path, flags, encoding=None, block_size=0))
    try:
        yield file
    finally:
        session.tell(file.close())


async def _in_turn(requests: Iterable[Awaitable[T]]) -> AsyncGenerator[T, None]:
    """What requests give, in their order; some are on their way at the same time."""
    waiting: deque[asyncio.Future[T]] = deque()
    try:
        for request in requests:
            waiting.append(asyncio.ensure_future(request))
            if len(waiting) >= _AT_ONCE:
                yield await waiting.popleft()
        while waiting:
            yield await waiting.popleft()
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


async def receive(
    session: Session, path: str, begin: int, end: int, take: Callable[[bytes], object]
) -> None:
    """Give a stretch of a file to `take`, in order; HubError where the file ends before."""
    async with opened(session, path, FXF_READ) as file:

        async def whole(start: int) -> bytes:
            data, size = bytearray(), min(step, end - start)
            while len(data) < size:
                asked = file.read(size - len(data), start + len(data))
                found = cast(bytes, await session.ask(asked))
                if not found:
                    raise HubError(
                        f"{path} on the server became shorter while it was read: try again."
                    )
                data += found
            return bytes(data)

        step = min(_CHUNK, session.sftp.limits.max_read_len or _CHUNK)
        async with aclosing(_in_turn(map(whole, range(begin, end, step)))) as answers:
            async for data in answers:
                take(data)


class Upload:
    """A new file, of bytes or of a local file; where it breaks off it goes on behind what has
    arrived."""

    def __init__(self, path: str, content: Path | bytes) -> None:
        self._path = path
        self._content = content
        self._arrived = 0

    def run(self, server: Server) -> None:
        """Send it; where the server can be asked to, its disk has it at the end.

        Raises
        ------
        HubError
            The local file cannot be read, or the connection is lost for good.
        SFTPError
            The server cannot write it.
        """
        with self._opened() as source:
            server.run(lambda session: self._send(session, source), lambda: self._arrived)

    def _opened(self) -> BinaryIO:
        if isinstance(self._content, bytes):
            return io.BytesIO(self._content)
        with self._reading():
            return self._content.open("rb")

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise HubError(
                f"{self._content!s} cannot be read: {error.strerror}: check the path, and that the "
                "file may be read."
            ) from error

    async def _send(self, session: Session, source: BinaryIO) -> None:
        flags = FXF_WRITE if self._arrived else FXF_WRITE | FXF_CREAT | FXF_TRUNC
        async with opened(session, self._path, flags) as file:
            if ((await session.ask(file.stat())).size or 0) < self._arrived:
                self._arrived = 0  # the server went down before its disk had all of it
            async with aclosing(_in_turn(self._written(session, file, source))) as answers:
                async for count in answers:
                    self._arrived += count
            with suppress(asyncssh.SFTPOpUnsupported):
                await session.ask(file.fsync(), 10 * ssh.PATIENCE)
            if (await session.ask(file.stat())).size != self._arrived:
                raise asyncssh.SFTPFailure("it has another size than what was sent")
            await session.ask(file.close())  # some servers write only now

    def _written(
        self, session: Session, file: asyncssh.SFTPClientFile, source: BinaryIO
    ) -> Iterator[Awaitable[int]]:
        place, size = self._arrived, min(_CHUNK, session.sftp.limits.max_write_len or _CHUNK)
        with self._reading():
            source.seek(place)
            while chunk := source.read(size):
                yield session.ask(file.write(chunk, place))
                place += len(chunk)


class Download:
    """A new local file; where it breaks off it goes on, if the server's file is still the same."""

    def __init__(self, path: str, target: Path) -> None:
        self._path = path
        self._target = target
        self._arrived = 0
        self._stamp: tuple[int | None, ...] | None = None

    def run(self, server: Server, look: Callable[[Session], Awaitable[Attributes]]) -> None:
        """Fetch it; `look` gives what the file is, or raises HubError.

        Raises
        ------
        HubError
            The file is not there, became shorter, or the connection is lost for good.
        SFTPError
            The server cannot read it.
        """
        with storage_errors(self._target):
            file = self._target.open("wb", buffering=0)
        with file:
            server.run(lambda session: self._fetch(session, look, file), lambda: self._arrived)

    async def _fetch(
        self,
        session: Session,
        look: Callable[[Session], Awaitable[Attributes]],
        file: io.FileIO,
    ) -> None:
        found = await look(session)
        stamp = (found.size, found.mtime)
        if stamp != self._stamp:
            self._stamp, self._arrived = stamp, 0
        with storage_errors(self._target):
            file.truncate(self._arrived)
            file.seek(self._arrived)

        def take(data: bytes) -> None:
            left = memoryview(data)
            with storage_errors(self._target):
                while left:
                    left = left[file.write(left) :]
            self._arrived += len(data)

        await receive(session, self._path, self._arrived, found.size or 0, take)


class Lock:
    """A file that one client at a time can make; its content says which.

    Whoever is killed leaves it. Others take it for dead when they have seen the very same lock for
    `LOCK_LASTS` seconds, and rename it to a name that only one of them can give. A holder that was
    only asleep finds another's lock, or none, before its last step.
    """

    def __init__(self, server: Server, path: str) -> None:
        self._server = server
        self._path = path
        self._token = uuid4().hex.encode()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Wait for the lock, and give it back at the end.

        Raises
        ------
        SFTPError
            It cannot be made.
        """
        seen, since = self._server.run(self._make), time.monotonic()
        while seen != self._token:
            time.sleep(_LOOKS)
            found = self._server.run(self._make)
            if found != seen:
                seen, since = found, time.monotonic()
            elif time.monotonic() - since > LOCK_LASTS:
                self._server.run(partial(self._break, seen))
        try:
            yield
        finally:
            with suppress(HubError, asyncssh.SFTPError):
                self._server.run(self._remove)

    async def is_ours(self, session: Session) -> bool:
        """Whether nobody has taken it meanwhile."""
        found = await self._look(session)
        return found is not None and found[1] == self._token

    async def _make(self, session: Session) -> bytes:
        """Our token if the lock is ours now, else what tells the lock that is there."""
        flags = FXF_WRITE | FXF_CREAT | FXF_EXCL
        for left in range(_TRIES, 0, -1):
            try:
                file = await session.ask(
                    session.sftp.open(self._path, flags, encoding=None, block_size=0)
                )
            except asyncssh.SFTPError:
                found = await self._look(session)
                if found is not None:
                    # Where the answer was lost when it was made it may be our own.
                    return self._token if found[1] == self._token else b"%d %s" % found
                if left == 1:
                    raise  # nobody has it, and still it cannot be made
            else:
                break
        try:
            await session.ask(file.write(self._token, 0))
            await session.ask(file.close())
        except asyncssh.SFTPError:
            await session.ask(session.sftp.remove(self._path))
            raise
        return self._token

    async def _look(self, session: Session) -> tuple[int, bytes] | None:
        try:
            async with opened(session, self._path, FXF_READ) as file:
                found = await session.ask(file.stat())
                return found.mtime or 0, cast(bytes, await session.ask(file.read(_CHUNK, 0)))
        except ABSENT:
            return None

    async def _break(self, seen: bytes, session: Session) -> None:
        tomb = f"{self._path}.{sha256_bytes(seen)[-32:]}"
        with suppress(asyncssh.SFTPFailure, *ABSENT):  # another one was faster
            await session.ask(session.sftp.rename(self._path, tomb))

    async def _remove(self, session: Session) -> None:
        if await self.is_ours(session):
            await session.ask(session.sftp.remove(self._path))
