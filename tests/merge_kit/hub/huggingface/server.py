"""A Hugging Face Hub on 127.0.0.1, for the unmodified client: model repositories, no Xet.

It answers as the real one does, as far as merge-kit asks: codes, bodies and the X-Error headers;
LFS uploads in one piece and in several; pull requests; private repositories. `HubServer.fault`
makes a coming request fail.
"""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import unquote

import uvicorn
from starlette.requests import Request
from starlette.responses import Response

from tests.merge_kit.hub.huggingface.repos import ATTRIBUTES, Blob, Refused, Repo
from tests.merge_kit.hub.huggingface.routes import ROUTES


@dataclass
class Fault:
    """What happens to the next `times` requests of a method whose path has `part` in it."""

    method: str
    part: str
    kind: str
    value: object = None
    times: int = 1
    skip: int = 0
    """How many pass before."""


class HubServer:
    """Start it with `with`; `url` is its endpoint."""

    def __init__(self, prefix: str = "", **ssl: str):
        self.prefix, self.host, self.scheme = prefix, "127.0.0.1", "https" if ssl else "http"
        self.tokens: dict[str, str] = {}
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.faults: list[Fault] = []
        self.log: list[tuple[str, str, str]] = []
        """Method, path and authorization of every request."""
        self.ranges: list[str] = []
        """Which parts of files were asked for."""
        self.part_size, self.page_size, self.delay = 1 << 20, 1000, 0.0
        self.whole = False
        """Whether parts of files are not to be had."""
        self.upload_root: str | None = None
        """Another address that uploads and verifications are sent to."""
        config = uvicorn.Config(self, host=self.host, port=0, log_level="critical", lifespan="off",
                                loop="asyncio", http="h11", ws="none", **ssl)  # fmt: skip
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    def __enter__(self) -> HubServer:
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        self.port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"{self.scheme}://{self.host}:{self.port}{self.prefix}"
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(timeout=10)

    def create(self, name: str, *, writers: str, readers: str = "", private: bool = True) -> Repo:
        repo = Repo(name, private, set(writers.split()), set(readers.split()))
        repo.add("main", {".gitattributes": Blob(ATTRIBUTES)}, "initial commit", name)
        self.repos[name] = repo
        return repo

    def clear(self) -> None:
        """Forget everything but the tokens."""
        self.repos, self.objects, self.parts, self.faults = {}, {}, {}, []
        self.log, self.ranges, self.upload_root = [], [], None
        self.part_size, self.page_size, self.whole = 1 << 20, 1000, False

    def asked(self, method: str, part: str) -> int:
        """How many requests of a method had `part` in their path."""
        return sum(m == method and part in path for m, path, _ in self.log)

    def fault(self, method: str, part: str, kind: str, value: object = None, **more: int) -> Fault:
        self.faults.append(Fault(method, part, kind, value, **more))
        return self.faults[-1]

    # The program: one request at a time, so what stands between two `await`s is atomic.

    async def __call__(self, scope, receive, send) -> None:
        request = Request(scope, receive)
        path = scope["raw_path"].decode().partition("?")[0].removeprefix(self.prefix)
        asked = request.headers.get("authorization", "")
        self.log.append((request.method, path, asked))
        if "range" in request.headers:
            self.ranges.append(request.headers["range"])
        fault = self._fault(request.method, path)
        kind, value = (fault.kind, fault.value) if fault else ("", None)
        transport = receive.__self__.transport
        if kind == "slow" or self.delay:
            await asyncio.sleep(float(value or self.delay))
        if kind == "drop":
            return transport.abort()
        if kind == "cut upload":
            got = 0
            async for chunk in request.stream():
                got += len(chunk)
                if got >= value:
                    break
            return transport.abort()
        if kind == "status":
            response: Response = Refused(int(value), f"fault {value}").response
        elif kind == "answer":
            response = value
        else:
            try:
                await request.body()
                response = await self._answer(request, path)
            except Refused as refused:
                response = refused.response
        if kind == "lost":
            return transport.abort()
        if kind == "corrupt":
            body = bytearray(response.body)
            body[len(body) // 2] ^= 1
            response.body = bytes(body)
        if kind == "cut":
            headers = response.raw_headers
            await send({"type": "http.response.start", "status": response.status_code,
                        "headers": headers})  # fmt: skip
            await send({"type": "http.response.body", "body": response.body[:value],
                        "more_body": True})  # fmt: skip
            await asyncio.sleep(0.05)
            return transport.close()
        await response(scope, receive, send)

    def _fault(self, method: str, path: str) -> Fault | None:
        for fault in self.faults:
            if fault.method == method and fault.part in path:
                if fault.skip:
                    fault.skip -= 1
                    return None
                fault.times -= 1
                if fault.times <= 0:
                    self.faults.remove(fault)
                return fault
        return None

    async def _answer(self, request: Request, path: str) -> Response:
        for (method, pattern), handler in ROUTES.items():
            found = re.fullmatch(pattern, path)
            if found and method == request.method:
                try:
                    return await handler(self, request, *map(unquote, found.groups()))
                except (ValueError, LookupError, TypeError, AttributeError) as error:
                    if method != "POST":
                        raise
                    raise Refused(400, f"Malformed request ({type(error).__name__})") from error
        raise Refused(404, f"no such page: {request.method} {path}")

    def user(self, request: Request) -> str | None:
        sent = request.headers.get("authorization")
        if sent is None:
            return None
        user = self.tokens.get(sent.removeprefix("Bearer "))
        if user is None:
            raise Refused(401, "Invalid credentials in Authorization header")
        return user

    def repo(self, request: Request, name: str, *, write: bool = False) -> Repo:
        user, repo = self.user(request), self.repos.get(name)
        if repo is None or (repo.private and user not in repo.writers | repo.readers):
            raise Refused(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and user is None:
            raise Refused(401, "Invalid username or password.")
        if write and user not in repo.writers:
            raise Refused(403, "Forbidden: you must use a write token to upload to a repository.")
        return repo

    @staticmethod
    def at(repo: Repo, revision: str) -> tuple[str, Mapping[str, Blob]]:
        oid = repo.refs.get(revision, revision)
        if oid not in repo.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid, repo.commits[oid].files
