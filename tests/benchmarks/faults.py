"""Random faults between a client and a hub: nothing may be lost, and nothing damaged accepted.

    python -m tests.benchmarks.faults objects|huggingface --faults 1000 --seed 0

A proxy breaks about every sixth request, in the ways of `Chaos`, while entries are published,
listed and fetched. After each operation a second client, which nothing is broken for, looks at what
is there.
"""

from __future__ import annotations

import argparse
import contextlib
import email.utils
import hashlib
import json
import os
import random
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from types import SimpleNamespace

import pytest

from merge_kit.errors import MergeKitError
from merge_kit.files import sha256_bytes
from merge_kit.hub import repository
from merge_kit.hub.endpoint import Endpoint
from merge_kit.hub.huggingface import HuggingFaceHub
from merge_kit.hub.objects import ObjectHub
from merge_kit.hub.objectstores import Patience
from merge_kit.hub.remote import RemoteHub
from merge_kit.hub.repository import Repository
from tests.merge_kit.hub.huggingface.server import HubServer
from tests.merge_kit.hub.objects.conftest import client, start_server, stop_server
from tests.merge_kit.hub.objects.proxy import Answer, Fault, Handler, Proxy, Request, status

SHARE = 1 / 6
"""Of all requests, those that are broken."""
STATUSES = (500, 502, 503, 504, 429)
RETRY_AFTER = ("", "0", "1", "soon", "\xb2")
"""What busy servers ask to wait, in seconds; and what is no number, and still arrives."""
SOON = Patience(timeout=3, connect=1, pause=0.02)
"""As often as by default, and soon after another."""
SECRET = "the-secret-of-a-benchmark"
NAMES = ("payload.safetensors", "manifest.sig", "manifest.json")
GRAVE = ("answer_truncated", "answer_changed", "header_changed", "upload_changed", "clock_refused")
DATES = ("date", "last-modified", "expires")


class Chaos:
    """Breaks requests at random, in one of the ways that have methods below."""

    def __init__(self, seed: int, end: int) -> None:
        self.random, self.end = random.Random(seed), end
        self.counts: Counter[str] = Counter()
        self.damaged = 0
        """Answers whose bytes were others than the server's, and whole by all signs."""
        self.grave = 0
        """Faults that nobody can live through unseen: bytes are others, or a clock is refused."""
        self.taken = 0
        """Requests whose bytes were others than the client's, and that the server took."""
        self.kinds: list[Callable[[Handler, Request], None]] = [
            self.request_cut, self.answer_lost, self.answer_cut, self.answer_truncated,
            self.answer_changed, self.header_changed, self.refused, self.refused_when_done,
            self.dates_skewed,
        ]  # fmt: skip

    def __call__(self, handler: Handler, request: Request) -> bool:
        if self.counts.total() >= self.end or self.random.random() > SHARE:
            return self._sound(handler, request)
        kinds = [*self.kinds]
        if request.length:  # what few requests can suffer, they suffer more often
            kinds += [self.upload_changed] * (6 if "/commit/" in request.target else 2)
        if is_signed(request):
            kinds += [self.clock_refused] * (1 if "x-amz-date" in request.headers else 4)
        kind = self.random.choice(kinds)
        self.counts[kind.__name__.replace("_", " ")] += 1
        self.grave += kind.__name__ in GRAVE
        kind(handler, request)
        return True

    def _sound(self, handler: Handler, request: Request) -> bool:
        """A store checks the digest that an upload comes with; moto does not."""
        said = {k.lower(): v for k, v in request.headers.items()}.get("x-amz-content-sha256", "")
        if len(said) == 64 and said != hashlib.sha256(request.body).hexdigest():
            return status(400, "XAmzContentSHA256Mismatch")(handler, request)
        return False

    def request_cut(self, handler: Handler, request: Request) -> None:
        """The server hangs up at any byte of the body that the client sends, and does nothing."""
        if request.length:
            request.rest.read(self.random.randrange(request.length))
        handler.cut(orderly=self.random.random() < 0.5)

    def answer_lost(self, handler: Handler, request: Request) -> None:
        """The server does what was asked, and the line breaks."""
        handler.server.proxy.ask(request)
        handler.cut(orderly=self.random.random() < 0.5)

    def answer_cut(self, handler: Handler, request: Request) -> None:
        """The line breaks at any byte of the answer: in its headers as often as in its body."""
        head, body = handler.packed(handler.server.proxy.ask(request))
        part = head if self.random.random() < 0.5 or not body else head + body
        shortest = 1 if part is head else len(head)
        handler.wfile.write(part[: self.random.randrange(shortest, len(part))])
        handler.cut(orderly=self.random.random() < 0.5)

    def answer_truncated(self, handler: Handler, request: Request) -> None:
        """The answer's body is shorter, and says that it is whole."""
        answer = handler.server.proxy.ask(request)
        self._damage(handler, answer, answer.body[: self.random.randint(0, len(answer.body))])

    def answer_changed(self, handler: Handler, request: Request) -> None:
        """One byte of the answer's body is another."""
        answer = handler.server.proxy.ask(request)
        self._damage(handler, answer, self._changed(answer.body))

    def header_changed(self, handler: Handler, request: Request) -> None:
        """One of the answer's headers is gone, cut, another number, or has one byte another: its
        length, digest, range, place, or whatever else it says."""
        answer = handler.server.proxy.ask(request)
        self.damaged += 1
        head, body = handler.packed(answer)
        first, *lines = head.removesuffix(b"\r\n\r\n").split(b"\r\n")
        number = self.random.randrange(len(lines))
        name, _, value = lines[number].partition(b": ")
        lines[number] = self.random.choice((
            lambda: name + b": " + printable(self._changed(value)),
            lambda: name + b": " + value[: self.random.randint(0, len(value))],
            lambda: printable(self._changed(name)) + b": " + value,
            lambda: name + b": %d" % self.random.choice((0, 1, 7, 2**31, 2**70)),
            lambda: b"X-Gone: 1",
        ))()  # fmt: skip
        handler.wfile.write(b"\r\n".join([first, *lines, b"", b""]) + body)
        handler.cut(orderly=True)  # where one length is told and another sent, nothing can follow

    def upload_changed(self, handler: Handler, request: Request) -> None:
        """One byte of what the client sends is another: of a file, a commit, or a question."""
        request.body = self._changed(request.body)
        if not self._sound(handler, request):
            answer = handler.server.proxy.ask(request)
            self.taken += answer.status < 400
            handler.answer(answer)

    def refused(self, handler: Handler, request: Request) -> None:
        """The server is busy, or fails."""
        self._refusal()(handler, request)

    def refused_when_done(self, handler: Handler, request: Request) -> None:
        """The server fails after it has done what was asked."""
        self._refusal(after=True)(handler, request)

    def dates_skewed(self, handler: Handler, request: Request) -> None:
        """The server's clock is hours ahead or behind: its dates are of another day."""
        answer = handler.server.proxy.ask(request)
        by = self.random.choice((-1, 1)) * self.random.uniform(1, 48)
        dates = [(k, shifted(v, by)) for k, v in answer.headers if k.lower() in DATES]
        assert dates, "the server has told no date"
        kept = [(k, v) for k, v in answer.headers if k.lower() not in DATES]
        handler.answer(Answer(answer.status, [*kept, *dates], answer.body))

    def clock_refused(self, handler: Handler, request: Request) -> None:
        """A server whose clock is hours ahead or behind ours does not take our signature."""
        by = self.random.choice((-1, 1)) * self.random.uniform(1, 48)
        date = shifted(email.utils.formatdate(usegmt=True), by)
        code, said = "RequestTimeTooSkewed", "The difference is too large"
        if "X-Signature=" in request.target:  # which somebody else has signed, for a time
            code, said = "AccessDenied", "Request has expired"
        body = f"<Error><Code>{code}</Code><Message>{said}</Message></Error>".encode()
        handler.answer(Answer(403, [("Content-Type", "application/xml"), ("Date", date)], body))

    def _refusal(self, *, after: bool = False) -> Fault:
        code, wait = self.random.choice(STATUSES), self.random.choice(RETRY_AFTER)
        if code not in (429, 503):
            wait = ""
        return status(code, after=after, headers={"Retry-After": wait} if wait else None)

    def _changed(self, body: bytes) -> bytes:
        changed = bytearray(body)
        if changed:
            changed[self.random.randrange(len(changed))] ^= self.random.randrange(1, 256)
        return bytes(changed)

    def _damage(self, handler: Handler, answer: Answer, body: bytes) -> None:
        self.damaged += body != answer.body
        handler.answer(Answer(answer.status, answer.headers, body))


def printable(data: bytes) -> bytes:
    """The same without what would end a header."""
    return data.translate(bytes.maketrans(b"\r\n\0:", b"????"))


def is_signed(request: Request) -> bool:
    """Whether a request has a signature with a time in it, as object stores want."""
    names = {name.lower() for name in request.headers}
    return "x-amz-date" in names or "X-Signature=" in request.target


def shifted(date: str, hours: float) -> str:
    """A date of HTTP, hours later."""
    moment = email.utils.parsedate_to_datetime(date) + timedelta(hours=hours)
    return email.utils.format_datetime(moment, usegmt=True)


@dataclass
class Hubs:
    """One hub over two lines."""

    line: Proxy
    faulty: Callable[[], RemoteHub]
    sound: Callable[[], RemoteHub]
    files: Callable[[], set[str]]
    """All that the storage holds by its own account, but for what is hidden."""
    more: Callable[[], dict[str, int]] = dict
    """Further figures."""


@contextmanager
def objects(patch: pytest.MonkeyPatch) -> Iterator[Hubs]:
    """A bucket of moto's S3 server."""
    process, port = start_server()
    s3 = client(port)

    def files() -> set[str]:
        pages = s3.get_paginator("list_objects_v2").paginate(Bucket="bucket")
        found = (one["Key"].removeprefix("hub/") for page in pages for one in page["Contents"])
        return {path for path in found if "/." not in path}

    try:
        s3.create_bucket(Bucket="bucket")
        with Proxy(port) as line:
            for name, value in (("ALLOW_HTTP", "true"), ("ACCESS_KEY_ID", "a-benchmark"),
                                ("SECRET_ACCESS_KEY", SECRET)):  # fmt: skip
                patch.setenv(f"AWS_{name}", value)

            def opened(url: str) -> ObjectHub:
                patch.setenv("AWS_ENDPOINT_URL", url)
                return ObjectHub("s3://bucket/hub", SOON)

            with contextlib.closing(opened(f"http://127.0.0.1:{port}")) as sound:
                yield Hubs(line, lambda: opened(line.url), lambda: sound, files)
    finally:
        stop_server(process)


@contextmanager
def huggingface(patch: pytest.MonkeyPatch) -> Iterator[Hubs]:
    """A repository of the tests' server, which follows the Hugging Face Hub's protocol."""
    with HubServer() as server, Proxy(server.port) as line:
        server.tokens = {SECRET: "hospital"}
        repo = server.create("hospital/federation", writers="hospital")
        patch.setattr(repository, "PAUSES", (0.01, 0.01, 0.02, 0.02))
        patch.setattr(repository, "FIRST_PAUSE", 0.02)
        patch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY", True)
        at_once = SimpleNamespace(sleep=lambda seconds: None)
        patch.setattr("huggingface_hub.utils._http.time", at_once)

        def opened(url: str) -> HuggingFaceHub:
            server.upload_root = url  # what is large goes over the same line
            return HuggingFaceHub(Repository("hospital/federation", Endpoint(url, SECRET)))

        def files() -> set[str]:
            return {path for path in repo.files() if path != ".gitattributes"}

        def more() -> dict[str, int]:
            titles = [commit.title for commit in repo.commits.values()]
            return {"commits that arrived damaged and were mended": sum(
                title.startswith("Mend: ") for title in titles)}  # fmt: skip

        yield Hubs(line, lambda: opened(line.url), lambda: opened(server.url), files, more)


KINDS: dict[str, Callable[[pytest.MonkeyPatch], AbstractContextManager[Hubs]]] = {
    "objects": objects, "huggingface": huggingface,
}  # fmt: skip


@dataclass
class Run:
    """Operations at random on a hub whose line breaks, and what must hold after each."""

    hubs: Hubs
    chaos: Chaos
    wanted: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """The entries that were to be published, with their files."""
    there: set[str] = field(default_factory=set)
    """Those that have been seen."""
    told: Counter[str] = field(default_factory=Counter)
    """How operations ended."""
    said: Counter[str] = field(default_factory=Counter)
    """The sentences, without what differs."""
    latest: str = ""
    """The entry that was to be published at last."""
    given_up: int = 0
    """Operations that ended with an error though the line only broke, or the server was busy."""

    @property
    def sound(self) -> RemoteHub:
        """Who looks at what is there."""
        return self.hubs.sound()

    def go(self) -> None:
        """Until all faults have been."""
        while self.chaos.counts.total() < self.chaos.end:
            action = self.chaos.random.choice((self.publish, self.publish, self.fetch, self.list))
            hub, damaged, taken = self.hubs.faulty(), self.chaos.damaged, self.chaos.taken
            grave = self.chaos.grave
            failed = False
            try:
                action(hub, lambda before=damaged: self.chaos.damaged > before)
            except MergeKitError as error:
                failed, text = True, str(error)
                assert "\n" not in text, text
                assert text.endswith((".", "?")), text
                assert SECRET not in text, text
                self.told[f"{action.__name__}: an error"] += 1
                self.given_up += self.chaos.grave == grave
                self.said[re.sub(r"contributions/\S+?(?=[\s:,]|$)", "<name>", text).replace(
                    self.hubs.line.host, "<host>")] += 1  # fmt: skip
            finally:
                hub.close()
            if action == self.publish and not failed:
                folder = self.latest
                assert folder in listing(self.sound), f"lost: {folder}"
                assert whole(self.sound, folder, self.wanted[folder]), f"not whole: {folder}"
                self.there.add(folder)
            if failed and self.chaos.taken > taken:
                self.put_right()
            self.check()
        for folder, files in self.wanted.items():  # who was told of an error tries again
            if folder not in self.there:
                self.sound.publish(folder, files)
        self.check(all_there=True)

    def put_right(self) -> None:
        """A publisher was told of an error, and the server has taken what the line had changed:
        whoever may remove files does so, and what was published whole is left alone."""
        for path in self.hubs.files():
            folder, _, name = path.rpartition("/")
            files = self.wanted.get(folder, {})
            if name in files and (
                folder in self.there or self.sound.fetch(path).read_bytes() == files[name]
            ):
                continue
            self.told["damaged, told so, removed by hand"] += 1
            self.sound.remove(path)
        for folder in listing(self.sound) - self.there:
            if not whole(self.sound, folder, self.wanted[folder]):
                for name in self.sound.list(folder):
                    self.sound.remove(f"{folder}/{name}")

    def publish(self, hub: RemoteHub, damaged: Callable[[], bool]) -> None:
        """A new entry, or one whose publication ended with an error."""
        rng = self.chaos.random
        left = sorted(self.wanted.keys() - self.there)
        if left and rng.random() < 0.5:
            folder = rng.choice(left)
        else:
            number = len(self.wanted)
            folder = f"contributions/s{number % 7}/e{number}"
            size = rng.choice((1_000, 50_000, 300_000, 1_500_000))
            self.wanted[folder] = dict(zip(NAMES, (
                rng.randbytes(size), rng.randbytes(100), f"the manifest of {number}".encode(),
            ), strict=True))  # fmt: skip
        self.latest = folder
        new = hub.publish(folder, self.wanted[folder])
        self.told[f"publish: {new}"] += 1

    def fetch(self, hub: RemoteHub, damaged: Callable[[], bool]) -> None:
        """One file of an entry that is there."""
        if self.there:
            folder = self.chaos.random.choice(sorted(self.there))
            name, data = self.chaos.random.choice(list(self.wanted[folder].items()))
            found = hub.fetch(f"{folder}/{name}", sha256_bytes(data)).read_bytes()
            assert found == data
            self.told["fetch: right"] += 1

    def list(self, hub: RemoteHub, damaged: Callable[[], bool]) -> None:
        """All entries; a listing has no digest, so a damaged one may be wrong at that moment."""
        if listing(hub) == self.there:
            self.told["list: right"] += 1
            return
        assert damaged(), "a listing is wrong though nothing was damaged"
        self.told["list: wrong while its bytes were damaged"] += 1

    def check(self, *, all_there: bool = False) -> None:
        """What is to be seen are whole entries that were to be published, and none is lost."""
        seen = listing(self.sound)
        assert seen >= self.there, f"lost: {self.there - seen}"
        assert seen <= self.wanted.keys(), f"unknown: {seen - self.wanted.keys()}"
        if all_there:
            assert seen == self.wanted.keys()
            files = {f"{place}/{n}" for place, files in self.wanted.items() for n in files}
            assert self.hubs.files() == files
        for folder in seen if all_there else seen - self.there:
            assert whole(self.sound, folder, self.wanted[folder]), f"not whole: {folder}"
        self.there = seen


def listing(hub: RemoteHub) -> set[str]:
    """The entries' folders."""
    return {f"contributions/{site}/{entry}" for site in hub.list("contributions")
            for entry in hub.list(f"contributions/{site}")}  # fmt: skip


def whole(hub: RemoteHub, folder: str, files: dict[str, bytes]) -> bool:
    """Whether an entry has just these files."""
    there = set(hub.list(folder))
    if there != files.keys():
        return False
    return all(hub.fetch(f"{folder}/{n}").read_bytes() == data for n, data in files.items())


def run(kind: str, faults: int, seed: int) -> dict[str, object]:
    """The figures, once all that must hold has been checked after each operation."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as scratch:
        patch.setenv("MERGE_KIT_CACHE", "off")
        patch.setenv("TMPDIR", scratch)
        chaos = Chaos(seed, faults)
        with KINDS[kind](patch) as hubs, hubs.line.faulty("", chaos):
            found, begun = Run(hubs, chaos), time.monotonic()
            found.go()
            return {
                "faults": dict(sorted(chaos.counts.items())),
                "faults in all": chaos.counts.total(),
                "requests": len(hubs.line.seen),
                "entries published, whole, once": len(found.there),
                "operations": dict(sorted(found.told.items())),
                "seconds": round(time.monotonic() - begun, 1),
                "given up though nothing was damaged": found.given_up,
                **hubs.more(),
                "sentences": dict(found.said.most_common(20)),
            }


def main() -> None:
    """Run it, check it, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--faults", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    for name in [*os.environ]:  # nothing of the user's own
        if name.startswith(("AWS_", "HF_")):
            del os.environ[name]
    print(json.dumps(run(given.kind, given.faults, given.seed), indent=2))


if __name__ == "__main__":
    main()
