"""Fifty publishers at once on a hub, twenty of them killed at random moments and started again.

    python -m tests.benchmarks.publishers folder|objects|sftp|huggingface

Each is a process of its own. The servers run on this machine (moto's S3 server, OpenSSH's with its
own defaults, the tests' Hugging Face Hub), so the seconds say nothing about real ones: what counts
is that all entries are there, whole and once, and that nothing else is to be seen.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from merge_kit.files import sha256_file
from merge_kit.hub import open_hub
from tests.merge_kit.hub.huggingface.server import HubServer
from tests.merge_kit.hub.killing import publish_all, unbroken
from tests.merge_kit.hub.objects.conftest import client, start_server, stop_server
from tests.merge_kit.hub.objects.proxy import Proxy
from tests.merge_kit.hub.sftp.sshd import running


@dataclass(frozen=True)
class Place:
    """An empty hub on a server of its own."""

    uri: str
    files: Callable[[], int]
    """How many files the storage holds by its own account, hidden ones too."""
    more: Callable[[], dict[str, int]] = dict
    """Further figures, at the end."""
    port: int = 0
    """Of the server itself, where it is asked for over a line that counts."""


@contextmanager
def folder(scratch: Path) -> Iterator[Place]:
    """A folder on this machine's disk."""
    root = scratch / "hub"
    root.mkdir()
    yield Place(str(root), lambda: sum(path.is_file() for path in root.rglob("*")))


@contextmanager
def objects(scratch: Path) -> Iterator[Place]:
    """A bucket of moto's S3 server, behind a proxy that counts requests."""
    process, port = start_server()
    s3 = client(port)
    s3.create_bucket(Bucket="bucket")

    def files() -> int:
        pages = s3.get_paginator("list_objects_v2").paginate(Bucket="bucket")
        return sum(len(page.get("Contents", [])) for page in pages)

    def more() -> dict[str, int]:
        uploads = s3.list_multipart_uploads(Bucket="bucket").get("Uploads", [])
        return {"requests": len(line.seen), "unfinished uploads that nobody sees": len(uploads)}

    try:
        with Proxy(port) as line:
            os.environ |= {
                "AWS_ENDPOINT_URL": line.url, "AWS_ALLOW_HTTP": "true",
                "AWS_ACCESS_KEY_ID": "benchmark", "AWS_SECRET_ACCESS_KEY": "benchmark",
            }  # fmt: skip
            yield Place("s3://bucket/hub", files, more, port)
    finally:
        stop_server(process)


@contextmanager
def sftp(scratch: Path) -> Iterator[Place]:
    """A folder on OpenSSH's server, which hangs up on some of those who call at the same time."""
    lines = "MaxStartups 10:30:100\nLogLevel VERBOSE\n"
    with running(scratch / "sshd", lines=lines) as server, folder(scratch) as local:
        os.environ["HOME"] = str(server.home)
        os.environ.pop("SSH_AUTH_SOCK", None)

        def more() -> dict[str, int]:
            log = (server.folder / "log").read_text()
            return {"logins": log.count("Accepted publickey"),
                    "calls that the server hung up on": log.count("drop connection")}  # fmt: skip

        yield Place(server.uri(scratch / "hub"), local.files, more)


@contextmanager
def huggingface(scratch: Path) -> Iterator[Place]:
    """A repository of the tests' server, which follows the Hugging Face Hub's protocol."""
    with HubServer() as server:
        server.tokens = {"token": "hospital"}
        repo = server.create("hospital/federation", writers="hospital")
        os.environ |= {"HF_ENDPOINT": server.url, "HF_TOKEN": "token",
                       "HF_HUB_DISABLE_TELEMETRY": "1"}  # fmt: skip

        def more() -> dict[str, int]:
            titles = [commit.title for commit in repo.commits.values()]
            return {"tries to commit": server.asked("POST", "/commit/"),
                    "commits that repeat another": len(titles) - len(set(titles))}  # fmt: skip

        uri = f"hf+{server.url}/hospital/federation"
        yield Place(uri, lambda: len(repo.files()) - 1, more)  # but for .gitattributes


KINDS: dict[str, Callable[[Path], AbstractContextManager[Place]]] = {
    "folder": folder, "objects": objects, "sftp": sftp, "huggingface": huggingface,
}  # fmt: skip


def run(
    place: Place, scratch: Path, count: int, killed: int, mebibytes: float, seed: int
) -> dict[str, object]:
    """The figures, once all that must hold has been checked."""
    payloads = []
    for number in range(count):
        path = scratch / str(number)
        path.write_bytes(number.to_bytes(2, "little") * int(mebibytes * 2**19))
        payloads.append(path)
    alone, begun = unbroken(place.uri, payloads[0]), time.monotonic()
    stories = publish_all(place.uri, payloads, killed, alone * count / 4, seed)
    seconds = time.monotonic() - begun
    hub = open_hub(place.uri)
    entries = [f"{site}/{name}" for site in hub.list("contributions")
               for name in hub.list(f"contributions/{site}")]  # fmt: skip
    assert sorted(entries) == sorted(["first/alone", *(f"s{n}/e" for n in range(count))])
    for number, path in enumerate(payloads):
        place_of = f"contributions/s{number}/e"
        names = sorted(hub.list(place_of))
        assert names == ["manifest.json", "manifest.sig", "payload.safetensors"], names
        found = hub.fetch(f"{place_of}/payload.safetensors", sha256_file(path))
        assert sha256_file(found) == sha256_file(path)
        assert hub.read(f"{place_of}/manifest.json") == b"m"
        assert hub.read(f"{place_of}/manifest.sig") == b"s"
    other = place.files() - 3 * len(entries)
    assert other == 0
    return {
        "publishers": count,
        "MiB each": mebibytes,
        "killed while they published": sum(story.kills for story in stories),
        "entries there, whole, once": len(entries) - 1,
        "other files in the storage": other,
        "seconds, one alone": round(alone, 2),
        "seconds, all": round(seconds, 1),
        "slowest publisher, seconds": round(max(story.seconds for story in stories), 1),
        **place.more(),
    }


def main() -> None:
    """Run it, check it, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--publishers", type=int, default=50)
    parser.add_argument("--killed", type=int, default=20)
    parser.add_argument("--mebibytes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        os.environ["MERGE_KIT_CACHE"] = f"{name}/cache"
        with KINDS[given.kind](scratch) as place:
            found = run(place, scratch, given.publishers, given.killed, given.mebibytes, given.seed)
    text = json.dumps(found, indent=2)
    if given.out:
        given.out.write_text(f"{text}\n")
    print(text)


if __name__ == "__main__":
    main()
