"""Many publishers at once, as processes of their own; some are killed and started again."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from merge_kit.hub.endpoint import Endpoint
from merge_kit.hub.huggingface import HuggingFaceHub
from merge_kit.hub.repository import Repository
from tests.merge_kit.hub.huggingface.server import HubServer

ROOT = Path(__file__).resolve().parents[4]


def payload_of(site: str, size: int) -> bytes:
    """A payload that no other site has."""
    return hashlib.sha256(site.encode()).digest() * (size // 32)


def folder_of(site: str) -> str:
    """Where a site publishes."""
    return f"contributions/{site}/{hashlib.sha256(site.encode()).hexdigest()}"


@dataclass(frozen=True)
class Race:
    """What happened."""

    answers: dict[str, str]
    """What each site's last publisher said: True, or False where it was there already."""
    killed: int
    """Publishers that were killed before they had ended."""
    arrived: int
    """Of these, those whose entry was there all the same."""
    seconds: float
    commits: int
    """Requests for one, each of which either went through or found the head moved."""


def race(server: HubServer, name: str, token: str, *, count: int, kill: int, within: float,
         size: int, seed: int, cache: Path) -> Race:  # fmt: skip
    """`count` sites publish at once, `kill` of them are killed `within` so many seconds."""
    random_of = random.Random(seed)
    sites = [f"site{number}" for number in range(count)]

    def start(site: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", __name__, server.url, name, token, site, str(size)]
        environment = {**os.environ, "MERGE_KIT_CACHE": str(cache / site), "PYTHONPATH": str(ROOT),
                       "HF_HUB_DISABLE_TELEMETRY": "1"}  # fmt: skip
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, env=environment, cwd=ROOT,
        )  # fmt: skip

    def go(process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()

    running = {site: start(site) for site in sites}
    for process in running.values():
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", process.communicate()[1]
    begun = time.monotonic()
    for process in running.values():
        go(process)
    moments = sorted((random_of.uniform(0, within), site) for site in random_of.sample(sites, kill))
    killed = []
    for moment, site in moments:
        time.sleep(max(0.0, begun + moment - time.monotonic()))
        if running[site].poll() is None:
            running[site].send_signal(signal.SIGKILL)
            killed.append(site)
    for site in killed:
        running[site].communicate()
    there = server.repos[name].files()
    arrived = sum(f"{folder_of(site)}/manifest.json" in there for site in killed)
    for site in killed:
        running[site] = start(site)
        go(running[site])
    answers = {}
    for site, process in running.items():
        said, complaint = process.communicate(timeout=300)
        assert process.returncode == 0, complaint
        answers[site] = said.split()[-1]
    return Race(answers, len(killed), arrived, time.monotonic() - begun,
                server.asked("POST", "/commit/"))  # fmt: skip


def check(server: HubServer, name: str, *, count: int, size: int) -> None:
    """All entries are there, whole and once, and nothing else is visible."""
    repo, sites = server.repos[name], [f"site{number}" for number in range(count)]
    expected = {
        f"{folder_of(site)}/{file}": content
        for site in sites
        for file, content in files_of(site, size).items()
    }
    found = {path: blob.data for path, blob in repo.files().items() if path != ".gitattributes"}
    assert found.keys() == expected.keys()
    assert found == expected
    titles = sorted(commit.title for commit in repo.commits.values())
    assert titles == sorted(["initial commit", *(f"Add {folder_of(site)}" for site in sites)])


def files_of(site: str, size: int) -> dict[str, bytes]:
    """What a site publishes; the manifest comes last."""
    return {"payload.safetensors": payload_of(site, size), "manifest.sig": site.encode(),
            "manifest.json": f"manifest of {site}".encode()}  # fmt: skip


def main() -> None:
    """Publish one entry when told to."""
    url, name, token, site, size = sys.argv[1:]
    hub = HuggingFaceHub(Repository(name, Endpoint(url, token)))
    print("ready", flush=True)
    sys.stdin.readline()
    print(hub.publish(folder_of(site), files_of(site, int(size))))


if __name__ == "__main__":
    main()
