"""A real HTTP proxy on loopback that counts requests and, when told to, breaks them."""

from __future__ import annotations

import http.client
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, BinaryIO

_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "server"}


@dataclass
class Request:
    """What a client sends, and what is done with it."""

    method: str
    target: str
    headers: dict[str, str]
    rest: BinaryIO
    """Where the body arrives."""
    length: int
    """Bytes of the body."""
    _body: bytes | None = None

    @property
    def body(self) -> bytes:
        """The bytes; until they are asked for, the client may be sending them still."""
        if self._body is None:
            self._body = self.rest.read(self.length)
            if len(self._body) < self.length:
                raise ConnectionAbortedError("the client has hung up")
        return self._body

    @body.setter
    def body(self, data: bytes) -> None:
        assert self.body is not None  # what was sent has to be read, or it would be the next one
        self._body = data


@dataclass
class Answer:
    """What a server answered."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes


Fault = Callable[["Handler", Request], bool]
"""Deals with a request in its own way; False leaves it to be passed on."""


@dataclass
class _Rule:
    pattern: re.Pattern[str]
    fault: Fault
    times: int
    skip: int


@dataclass
class Proxy:
    """Passes requests on to `upstream`; see `faulty`."""

    upstream: int
    certificate: Path | None = None
    """A file with a certificate and its key: it then speaks TLS."""
    seen: list[str] = field(default_factory=list)
    """Each request as ``METHOD target``, in the order of arrival."""
    headers: list[dict[str, str]] = field(default_factory=list)
    _rules: list[_Rule] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __enter__(self) -> Proxy:
        self._server = _Server(("127.0.0.1", 0), Handler)
        self._server.proxy = self
        if self.certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self.certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def port(self) -> int:
        """Where it listens."""
        return self._server.server_port

    @property
    def url(self) -> str:
        """What clients are given as their endpoint."""
        return f"http{'s' if self.certificate else ''}://127.0.0.1:{self.port}"

    @property
    def host(self) -> str:
        """How errors name it."""
        return f"127.0.0.1:{self.port}"

    @contextmanager
    def faulty(
        self, pattern: str, fault: Fault, *, times: int = 10**9, skip: int = 0
    ) -> Iterator[None]:
        """Within the block, `times` requests like ``METHOD target`` are broken after `skip`."""
        rule = _Rule(re.compile(pattern), fault, times, skip)
        with self._lock:
            self._rules.append(rule)
        try:
            yield
        finally:
            with self._lock:
                self._rules.remove(rule)

    @contextmanager
    def counted(self) -> Iterator[list[str]]:
        """The requests that arrive within the block."""
        begin, found = len(self.seen), []
        yield found
        found += self.seen[begin:]

    def _arrived(self, request: Request) -> Fault | None:
        text = f"{request.method} {request.target}"
        with self._lock:
            self.seen.append(text)
            self.headers.append(request.headers)
            for rule in self._rules:
                if rule.pattern.search(text):
                    if rule.skip:
                        rule.skip -= 1
                    elif rule.times:
                        rule.times -= 1
                        return rule.fault
        return None

    def ask(self, request: Request) -> Answer:
        """The server's answer to a request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.upstream, timeout=60)
        try:
            connection.request(request.method, request.target, request.body, request.headers)
            answer = connection.getresponse()
            return Answer(answer.status, answer.getheaders(), answer.read())
        finally:
            connection.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    proxy: Proxy

    def handle_error(self, *_: Any) -> None:
        """A client that was killed is no news."""


class Handler(BaseHTTPRequestHandler):
    """One connection of a client."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def _any(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        headers = dict(self.headers.items())
        request = Request(self.command, self.path, headers, self.rfile, length)
        fault = self.server.proxy._arrived(request)
        if fault is None or not fault(self, request):
            self.answer(self.server.proxy.ask(request))
        if not self.close_connection:
            _ = request.body  # some faults answer before all has arrived

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _any

    def answer(self, answer: Answer, *, until: int | None = None) -> None:
        """Send an answer, or only the first bytes of its body."""
        head, body = self.packed(answer)
        self.wfile.write(head + body[:until])
        if until is not None:
            self.cut()

    def packed(self, answer: Answer) -> tuple[bytes, bytes]:
        """Status line with headers, and body, as they go over the line."""
        head = self.command == "HEAD"
        lines = [f"HTTP/1.1 {answer.status} {self.responses.get(answer.status, ['?'])[0]}"]
        length = str(len(answer.body))
        for name, value in answer.headers:
            if name.lower() == "content-length" and head:
                length = value
            if name.lower() not in _HOP:
                lines.append(f"{name}: {value}")
        if answer.status not in (204, 304):
            lines.append(f"Content-Length: {length}")
        return "\r\n".join([*lines, "", ""]).encode("latin-1"), b"" if head else answer.body

    def cut(self, *, orderly: bool = False) -> None:
        """Break the connection off, as a dead line does, or as one who hangs up."""
        self.close_connection = True
        if not orderly:  # what was sent and not read yet is lost, too
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def cut_upload(handler: Handler, request: Request) -> bool:
    """The connection breaks in the middle of what the client sends."""
    request.rest.read(request.length // 2)
    handler.cut()
    return True


def cut_answer(handler: Handler, request: Request) -> bool:
    """The server does what was asked, and nobody hears of it."""
    handler.server.proxy.ask(request)
    handler.cut()
    return True


def cut_download(handler: Handler, request: Request) -> bool:
    """The connection breaks in the middle of the server's answer."""
    answer = handler.server.proxy.ask(request)
    handler.answer(answer, until=len(answer.body) // 2)
    return True


def flip(handler: Handler, request: Request) -> bool:
    """One bit of the answer's body is another."""
    answer = handler.server.proxy.ask(request)
    body = bytearray(answer.body)
    body[len(body) // 2] ^= 1
    handler.answer(Answer(answer.status, answer.headers, bytes(body)))
    return True


def status(
    code: int, error: str = "", *, after: bool = False, headers: Mapping[str, str] | None = None
) -> Fault:
    """An error of the server's, before or `after` it has done what was asked."""

    def fault(handler: Handler, request: Request) -> bool:
        if after:
            handler.server.proxy.ask(request)
        body = f"<Error><Code>{error}</Code><Message>m</Message></Error>".encode() if error else b""
        said = [("Content-Type", "application/xml"), *(headers or {}).items()]
        handler.answer(Answer(code, said, body))
        return True

    return fault


def slow(seconds: float) -> Fault:
    """The answer comes late."""

    def fault(handler: Handler, request: Request) -> bool:
        time.sleep(seconds)
        return False

    return fault


def late(seconds: float) -> Fault:
    """The server does what was asked, and says so too late."""

    def fault(handler: Handler, request: Request) -> bool:
        answer = handler.server.proxy.ask(request)
        time.sleep(seconds)
        handler.answer(answer)
        return True

    return fault


def without(*names: str) -> Fault:
    """The server does not hear of these headers."""
    gone = {name.lower() for name in names}

    def fault(handler: Handler, request: Request) -> bool:
        request.headers = {k: v for k, v in request.headers.items() if k.lower() not in gone}
        return False

    return fault


def redirect(url: str) -> Fault:
    """The client is sent to another place."""

    def fault(handler: Handler, request: Request) -> bool:
        handler.answer(Answer(307, [("Location", f"{url}{request.target}")], b""))
        return True

    return fault
