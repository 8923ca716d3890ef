"""Fifty publishers at once on an object store, twenty of them killed at random moments.

    python -m tests.benchmarks.object_publishers --out object-publishers.json

Each is a process of its own; the store is moto's S3 server on this machine, so the seconds say
nothing about a real one: what counts is that all entries are there, whole and once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import tempfile
import time
from pathlib import Path

from merge_kit.hub.objects import ObjectHub
from tests.merge_kit.hub.objects.conftest import client, start_server, stop_server
from tests.merge_kit.hub.objects.killing import publish_all, unbroken
from tests.merge_kit.hub.objects.proxy import Proxy


def main() -> None:
    """Run it, check it, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--publishers", type=int, default=50)
    parser.add_argument("--killed", type=int, default=20)
    parser.add_argument("--mebibytes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    process, port = start_server()
    try:
        client(port).create_bucket(Bucket="bucket")
        with Proxy(port) as line, tempfile.TemporaryDirectory() as scratch:
            os.environ |= {
                "AWS_ENDPOINT_URL": line.url, "AWS_ALLOW_HTTP": "true",
                "AWS_ACCESS_KEY_ID": "benchmark", "AWS_SECRET_ACCESS_KEY": "benchmark",
                "MERGE_KIT_CACHE": f"{scratch}/cache",
            }  # fmt: skip
            found = run(given, line, port, Path(scratch))
    finally:
        stop_server(process)
    given.out.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


def run(given: argparse.Namespace, line: Proxy, port: int, scratch: Path) -> dict[str, object]:
    """The figures, once all that must hold has been checked."""
    payloads = []
    for number in range(given.publishers):
        path = scratch / str(number)
        path.write_bytes(number.to_bytes(2, "little") * int(given.mebibytes * 2**19))
        payloads.append(path)
    uri = "s3://bucket/hub"
    alone = unbroken(uri, payloads[0])
    before, begun = len(line.seen), time.monotonic()
    stories = publish_all(uri, payloads, given.killed, alone * given.publishers / 4, given.seed)
    seconds = time.monotonic() - begun
    requests = len(line.seen) - before
    hub = ObjectHub(uri)
    begin = len(line.seen)
    entries = [f"{site}/{name}" for site in hub.list("contributions")
               for name in hub.list(f"contributions/{site}")]  # fmt: skip
    listing = len(line.seen) - begin
    assert sorted(entries) == sorted(["first/alone", *(f"s{n}/e" for n in range(given.publishers))])
    for number, path in enumerate(payloads):
        digest = f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
        hub.fetch(f"contributions/s{number}/e/payload.safetensors", digest)
    s3 = client(port)
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket="bucket")
    objects = sum(len(page.get("Contents", [])) for page in pages)
    assert objects == 3 * len(entries)
    return {
        "publishers": given.publishers,
        "MiB each": given.mebibytes,
        "killed while they published": sum(story.kills for story in stories),
        "entries there, whole, once": len(entries) - 1,
        "other objects in the bucket": objects - 3 * len(entries),
        "unfinished uploads that nobody sees": len(
            s3.list_multipart_uploads(Bucket="bucket").get("Uploads", [])
        ),
        "seconds, one alone": round(alone, 2),
        "seconds, all": round(seconds, 1),
        "requests, all": requests,
        "requests to list all": listing,
    }


if __name__ == "__main__":
    main()
