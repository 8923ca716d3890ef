"""Connections to an SFTP server, from a program that does not wait for events.

One connection serves all threads of a hub. What breaks off is tried again on a new one, with
growing pauses; a server that says nothing at all for a while counts as broken off.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import random
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from socket import gaierror
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

import asyncssh

from merge_kit.errors import HubError, UnreachableError
from merge_kit.hub.sshhost import Denied, Host, Secrets

PAUSES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Seconds before each further attempt, each drawn between a half and one and a half of it."""
PATIENCE = 60.0
"""Seconds without any answer after which a connection counts as broken; for so long, too, a new one
is tried for."""
_JUMPS = 8
_NETWORK = {
    errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ETIMEDOUT,
    errno.EADDRNOTAVAIL,
}  # fmt: skip

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Address:
    """What ``sftp://user@host:port/path`` names; ~/.ssh/config says what it leaves out."""

    uri: str
    host: str
    port: int | None
    user: str | None
    path: str
    """Absolute, or relative to the user's home where the URI's begins with ``/~``."""


def parse_address(uri: str) -> Address:
    """Take a hub's URI apart.

    Raises
    ------
    HubError
        It is malformed, or holds a password.
    """
    authority, _, rest = uri.partition("://")[2].partition("/")
    if ":" in authority.rpartition("@")[0] or "@" in rest:
        raise HubError(
            "an address of a hub holds no password, as it is written into files: write "
            "sftp://user@host:port/path (an @ in the path as %40), and use a key, or type the "
            "password when you are asked."
        )
    try:
        parts = urlsplit(uri)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = None
    if not host or parts.query or parts.fragment:
        raise HubError(f"'{uri}' is no address of a hub: write sftp://user@host:port/path.")
    path = unquote(parts.path).rstrip("/") or "/"
    if path == "/~" or path.startswith("/~/"):
        path = f".{path[2:]}"
    user = unquote(parts.username) if parts.username else None
    return Address(uri.rstrip("/"), unquote(host), port, user, path)


class Broken(UnreachableError):
    """The connection broke, or could not be made: trying again may help."""


class Session:
    """An open connection, and the hosts that it leads through."""

    def __init__(self, sftp: asyncssh.SFTPClient, through: list[asyncssh.SSHClientConnection]):
        self.sftp = sftp
        self.through = through
        self._heard = 0.0
        self._told: set[asyncio.Future[Any]] = set()

    def ask(self, request: Awaitable[T], patience: float | None = None) -> Awaitable[T]:
        """Send a request; the server's answer is to be awaited.

        That raises TimeoutError when nothing came from the server for `patience` seconds, and
        ConnectionLost, never an SFTPError, when the connection is gone.
        """
        return self._answer(self._sent(request), PATIENCE if patience is None else patience)

    def tell(self, request: Awaitable[object]) -> None:
        """Send a request whose answer does not matter."""
        self._told.add(self._sent(request))

    def _sent(self, request: Awaitable[T]) -> asyncio.Future[T]:
        task = asyncio.ensure_future(request)

        def over(task: asyncio.Future[T]) -> None:
            self._told.discard(task)
            if not task.cancelled():
                task.exception()  # nobody may be left to look at it

        task.add_done_callback(over)
        return task

    async def _answer(self, task: asyncio.Future[T], patience: float) -> T:
        now = asyncio.get_running_loop().time
        begun = now()
        try:
            while not task.done():
                left = max(begun, self._heard) + patience - now()
                if left <= 0:
                    raise TimeoutError(f"no answer for {patience:.0f} s")
                await asyncio.wait({task}, timeout=left)
        finally:
            task.cancel()
        self._heard = now()
        try:
            return task.result()
        except (asyncssh.SFTPNoConnection, asyncssh.SFTPConnectionLost) as error:
            raise asyncssh.ConnectionLost(str(error)) from error


Step = Callable[[Session], Awaitable[T]]


class Server:
    """The server of one hub, connected when it is first needed."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()
        self._asking = threading.Lock()
        self._connecting: asyncio.Lock | None = None
        self._session: Session | None = None
        self._was_there = False
        self._secrets = Secrets()

    def run(self, step: Step[T], moved: Callable[[], int] = lambda: 0, tries: int = 0) -> T:
        """What a step gives; where the connection breaks it is begun anew on another one.

        A step that may have done its work before must look first. Whenever `moved` has grown, the
        attempts are counted anew; `tries` is how many there are, if not one more than `PAUSES`.

        Raises
        ------
        UnreachableError
            The server cannot be reached, is not known, or does not let us in.
        """
        limit, count, before, since = tries or len(PAUSES) + 1, 0, moved(), 0.0
        while True:
            try:
                return self._attempt(step)
            except Broken:
                if not count or moved() > before:
                    count, before, since = 0, moved(), time.monotonic()
                count += 1
                if count >= limit or time.monotonic() - since > PATIENCE:
                    raise
                time.sleep(PAUSES[min(count, len(PAUSES)) - 1] * random.uniform(0.5, 1.5))

    def close(self) -> None:
        """Hang up; a further step would connect anew."""
        with self._starting:
            loop, thread, session = self._loop, self._thread, self._session
            self._loop = self._connecting = self._session = None
        if loop is None or thread is None or sys.is_finalizing():
            return

        async def hang_up() -> None:
            if session:
                await _close(session.through)
            loop.stop()

        asyncio.run_coroutine_threadsafe(hang_up(), loop)
        if thread is not threading.current_thread():
            thread.join(PATIENCE)

    def _attempt(self, step: Step[T]) -> T:
        """One attempt, or more where passphrases are found or typed between them."""
        while True:
            count = self._secrets.count
            try:
                return self._wait(self._take(step))
            except Denied as denied:
                with self._asking:
                    if self._secrets.count == count:  # else another thread has found one
                        self._secrets.find(denied)

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        with self._starting:
            if self._loop is None:
                logging.getLogger("asyncio").addFilter(_is_told)
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=_serve, args=(self._loop,), daemon=True)
                self._thread.start()
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    async def _take(self, step: Step[T]) -> T:
        session = await self._open()
        try:
            return await step(session)
        except Exception as error:
            if not _is_break(error):
                raise
            if self._session is session:
                self._session = None
            await _close(session.through)
            raise Broken(
                f"the connection to {self.address.uri} broke off ({_said(error)}): run the same "
                "command again."
            ) from error

    async def _open(self) -> Session:
        if self._connecting is None:
            self._connecting = asyncio.Lock()
        async with self._connecting:
            if self._session is None:
                self._session = await self._connect()
                self._was_there = True
            return self._session

    async def _connect(self) -> Session:
        address, through = self.address, list[asyncssh.SSHClientConnection]()
        host = Host.of(address.host, address.port, address.user)
        try:
            await self._reach(host, through)
            sftp = await asyncio.wait_for(_sftp(through[-1], host), host.timeout)
            session = Session(sftp, through)
            await _check_root(session, address)
        except BaseException as error:
            await _close(through)
            if isinstance(error, (UnreachableError, Denied)) or not isinstance(error, Exception):
                raise
            raise self._unreachable(error, host) from error
        return session

    async def _reach(
        self, host: Host, through: list[asyncssh.SSHClientConnection], depth: int = 0
    ) -> None:
        """Connect to a host, the hosts first that ~/.ssh/config puts before it: asyncssh would not
        insist that these are known."""
        if depth > _JUMPS:
            raise UnreachableError(f"ProxyJump in ~/.ssh/config leads to {host.alias} in a circle.")
        if not through:
            for jump in host.jumps:
                await self._reach(jump, through, depth + 1)
        tunnel = through[-1] if through else None
        through.append(await host.connect(tunnel, self._secrets))

    def _unreachable(self, error: Exception, host: Host) -> UnreachableError:
        if isinstance(error, gaierror):
            return UnreachableError(
                f"{self.address.uri}: this machine knows no host {host.name}: check the name, and "
                "the network."
            )
        # A server that was there comes back; one that never was is an address.
        lasting = Broken if self._was_there else UnreachableError
        if isinstance(error, (TimeoutError, asyncio.TimeoutError)):
            return lasting(
                f"{host.label} did not let us in within {host.timeout:.0f} s: try again later, or "
                "set a longer ConnectTimeout in ~/.ssh/config."
            )
        text = (
            f"{host.label} cannot be reached ({_said(error)}): check the address, and that its SSH "
            "server runs."
        )
        # Servers that are busy hang up on some of those who call.
        hung_up = _is_break(error) and not isinstance(error, OSError)
        return Broken(text) if hung_up or _is_reset(error) else lasting(text)


def _is_told(record: logging.LogRecord) -> bool:
    """A connection that broke is said in a sentence of ours, if it could not be made up for."""
    return record.msg != "socket.send() raised exception."


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    async def end() -> None:
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        await loop.shutdown_asyncgens()
        await loop.shutdown_default_executor()

    try:
        loop.run_forever()
        loop.run_until_complete(end())
    finally:
        loop.close()


async def _close(through: list[asyncssh.SSHClientConnection]) -> None:
    async def close(connection: asyncssh.SSHClientConnection) -> None:
        process = connection.get_extra_info("subprocess")  # of a ProxyCommand
        connection.close()
        await connection.wait_closed()
        while process and process.returncode is None:
            await asyncio.sleep(0.01)

    for connection in reversed(through):
        with suppress(Exception):
            await asyncio.wait_for(close(connection), 5)


async def _sftp(connection: asyncssh.SSHClientConnection, host: Host) -> asyncssh.SFTPClient:
    try:
        # Nothing of this machine's environment is sent along.
        return await connection.start_sftp_client(
            env={}, send_env=[], path_errors="surrogateescape"
        )
    except (asyncssh.ChannelOpenError, asyncssh.SFTPError) as error:
        if connection.is_closed():
            raise asyncssh.ConnectionLost(str(error)) from error
        raise UnreachableError(
            f"{host.label} lets us in, but offers no SFTP ({_said(error)}): ask who runs it."
        ) from error


async def _check_root(session: Session, address: Address) -> None:
    missing = UnreachableError(
        f"the hub {address.uri} is not there: check the path, or make the folder on the server."
    )
    try:
        found = await session.ask(session.sftp.stat(address.path))
    except (asyncssh.SFTPNoSuchFile, asyncssh.SFTPNoSuchPath) as error:
        raise missing from error
    except asyncssh.SFTPPermissionDenied as error:
        raise UnreachableError(
            f"the hub {address.uri} may not be seen by this user: ask who runs the server."
        ) from error
    if found.type != asyncssh.FILEXFER_TYPE_DIRECTORY:
        raise missing


def _is_break(error: Exception) -> bool:
    """Whether a connection broke off, which another one may not."""
    final = (
        asyncssh.HostKeyNotVerifiable, asyncssh.KeyExchangeFailed, asyncssh.PermissionDenied,
        asyncssh.IllegalUserName, asyncssh.ProtocolNotSupported,
    )  # fmt: skip
    broken = (
        asyncssh.DisconnectError, asyncssh.ChannelOpenError, asyncio.TimeoutError, TimeoutError,
    )  # fmt: skip
    if isinstance(error, broken):
        return not isinstance(error, final)
    return _is_reset(error) or (isinstance(error, OSError) and error.errno in _NETWORK)


def _is_reset(error: Exception) -> bool:
    return isinstance(error, ConnectionError) and not isinstance(error, ConnectionRefusedError)


def _said(error: Exception) -> str:
    text = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
    return text.partition("\n")[0] or type(error).__name__
