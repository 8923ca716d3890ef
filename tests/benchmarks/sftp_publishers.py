"""Fifty publishers at once on an SFTP server, twenty of them killed at random moments.

    python -m tests.benchmarks.sftp_publishers --out sftp-publishers.json

Each is a process of its own; the server is OpenSSH's on this machine with its own defaults, which
hang up on some of those who call at the same time. The seconds say nothing about a real one: what
counts is that all entries are there, whole and once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import tempfile
import time
from pathlib import Path

from merge_kit.hub import open_hub
from tests.merge_kit.hub.objects.killing import publish_all, unbroken
from tests.merge_kit.hub.sftp.sshd import Sshd, running


def main() -> None:
    """Run it, check it, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--publishers", type=int, default=50)
    parser.add_argument("--killed", type=int, default=20)
    parser.add_argument("--mebibytes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        with running(place / "sshd", lines="MaxStartups 10:30:100\nLogLevel VERBOSE\n") as server:
            os.environ |= {"HOME": str(server.home), "MERGE_KIT_CACHE": f"{scratch}/cache"}
            os.environ.pop("SSH_AUTH_SOCK", None)
            found = run(given, server, place)
    given.out.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


def run(given: argparse.Namespace, server: Sshd, scratch: Path) -> dict[str, object]:
    """The figures, once all that must hold has been checked."""
    payloads, root = [], scratch / "hub"
    root.mkdir()
    for number in range(given.publishers):
        path = scratch / str(number)
        path.write_bytes(number.to_bytes(2, "little") * int(given.mebibytes * 2**19))
        payloads.append(path)
    uri = server.uri(root)
    alone, begun = unbroken(uri, payloads[0]), time.monotonic()
    stories = publish_all(uri, payloads, given.killed, alone * given.publishers / 4, given.seed)
    seconds = time.monotonic() - begun
    hub = open_hub(uri)
    entries = [f"{site}/{name}" for site in hub.list("contributions")
               for name in hub.list(f"contributions/{site}")]  # fmt: skip
    assert sorted(entries) == sorted(["first/alone", *(f"s{n}/e" for n in range(given.publishers))])
    for number, path in enumerate(payloads):
        digest = f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
        hub.fetch(f"contributions/s{number}/e/payload.safetensors", digest)
    files = sum(path.is_file() for path in root.rglob("*"))
    assert files == 3 * len(entries)
    log = (server.folder / "log").read_text()
    return {
        "publishers": given.publishers,
        "MiB each": given.mebibytes,
        "killed while they published": sum(story.kills for story in stories),
        "entries there, whole, once": len(entries) - 1,
        "other files on the server": files - 3 * len(entries),
        "seconds, one alone": round(alone, 2),
        "seconds, all": round(seconds, 1),
        "slowest publisher, seconds": round(max(story.seconds for story in stories), 1),
        "logins": log.count("Accepted publickey"),
        "calls that the server hung up on": log.count("drop connection"),
    }


if __name__ == "__main__":
    main()
