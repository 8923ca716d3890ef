"""Many publishers at once, some of which are killed at random moments and started again."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.merge_kit.hub.objects.conftest import ROOT


@dataclass(frozen=True)
class Story:
    """What has happened to one publisher."""

    kills: int
    """How many of its attempts were killed while they published."""
    seconds: float
    """From the start to the end of the attempt that went through."""


def start(uri: str, folder: str, payload: Path) -> subprocess.Popen[str]:
    """A publisher that waits for its signal to begin."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.merge_kit.hub.publisher", uri, folder, str(payload)],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    return process


def begin(process: subprocess.Popen[str]) -> None:
    """Let it publish."""
    assert process.stdin
    process.stdin.write("\n")
    process.stdin.flush()


def end(process: subprocess.Popen[str], patience: float = 120) -> str:
    """Wait until it has published; what it said."""
    said, faults = process.communicate(timeout=patience)
    assert process.returncode == 0, faults
    return said.strip()


def unbroken(uri: str, payload: Path) -> float:
    """Seconds that one publication takes when nobody else publishes."""
    process = start(uri, "contributions/first/alone", payload)
    begun = time.monotonic()
    begin(process)
    end(process)
    return time.monotonic() - begun


def publish_all(
    uri: str, payloads: Sequence[Path], doomed: int, window: float, seed: int
) -> list[Story]:
    """One publisher for each payload, all at once; the first `doomed` of them are killed once.

    A kill comes at a random moment of the `window` in seconds. Who had published by then is started
    again all the same.
    """
    rng = random.Random(seed)
    delays = [rng.uniform(0, window) if n < doomed else None for n in range(len(payloads))]
    waiting = [start(uri, f"contributions/s{n}/e", path) for n, path in enumerate(payloads)]
    stories: dict[int, Story] = {}
    faults: list[str] = []

    def go(number: int, process: subprocess.Popen[str], delay: float | None) -> None:
        kills, begun = 0, time.monotonic()
        try:
            begin(process)
            if delay is not None:
                time.sleep(delay)
                process.send_signal(signal.SIGKILL)
                process.communicate(timeout=60)
                kills = int(process.returncode == -signal.SIGKILL)
                process = start(uri, f"contributions/s{number}/e", payloads[number])
                begin(process)
            end(process)
        except Exception as error:  # a thread's own error would be lost
            faults.append(f"publisher {number}: {error}")
        stories[number] = Story(kills, time.monotonic() - begun)

    threads = [
        threading.Thread(target=go, args=(n, process, delay))
        for n, (process, delay) in enumerate(zip(waiting, delays, strict=True))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    return [stories[n] for n in range(len(payloads))]
