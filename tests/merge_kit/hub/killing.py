"""Many publishers at once, some of which are killed at random moments and started again."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.forked import CONTEXT
from tests.merge_kit.hub import publisher


@dataclass(frozen=True)
class Story:
    """What has happened to one publisher."""

    kills: int
    """How many of its attempts were killed while they published."""
    seconds: float
    """From the start to the end of the attempt that went through."""


class Publisher:
    """One that waits for its signal to begin."""

    def __init__(self, uri: str, folder: str, payload: Path) -> None:
        self._line, there = CONTEXT.Pipe()
        self._process = CONTEXT.Process(
            target=publisher.main, args=(uri, folder, payload, there, dict(os.environ))
        )
        self._process.start()
        there.close()
        assert self._said() == "ready"

    def begin(self) -> None:
        """Let it publish."""
        self._line.send(None)

    def signal(self, number: int) -> None:
        """SIGKILL, or what a keyboard sends."""
        assert self._process.pid
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            os.kill(self._process.pid, number)

    def end(self, patience: float = 120) -> tuple[int, str]:
        """Wait for its end: the exit status, negative for a signal, and what it said last."""
        assert self._line.poll(patience), "it does not end"
        said = self._said()
        self._process.join(patience)
        assert self._process.exitcode is not None, "it does not end"
        return self._process.exitcode, said

    def _said(self) -> str:
        try:
            return str(self._line.recv())
        except EOFError:  # killed
            return ""


def publish(one: Publisher) -> None:
    """Let it publish, and wait until it has."""
    one.begin()
    status, said = one.end()
    assert status == 0, said


def unbroken(uri: str, payload: Path) -> float:
    """Seconds that one publication takes when nobody else publishes."""
    one = Publisher(uri, "contributions/first/alone", payload)
    begun = time.monotonic()
    publish(one)
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
    waiting = [Publisher(uri, f"contributions/s{n}/e", path) for n, path in enumerate(payloads)]
    stories: dict[int, Story] = {}
    faults: list[str] = []

    def go(number: int, one: Publisher, delay: float | None) -> None:
        kills, begun = 0, time.monotonic()
        try:
            if delay is not None:
                one.begin()
                time.sleep(delay)
                one.signal(signal.SIGKILL)
                status, _ = one.end(60)
                kills = int(status == -signal.SIGKILL)
                one = Publisher(uri, f"contributions/s{number}/e", payloads[number])
            publish(one)
        except Exception as error:  # a thread's own error would be lost
            faults.append(f"publisher {number}: {error}")
        stories[number] = Story(kills, time.monotonic() - begun)

    threads = [
        threading.Thread(target=go, args=(n, one, delay))
        for n, (one, delay) in enumerate(zip(waiting, delays, strict=True))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    return [stories[n] for n in range(len(payloads))]
