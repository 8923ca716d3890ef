"""Runs a program as a process of its own, with its time and its memory."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PAUSE = 0.005
_MEGA = 2**20


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a program."""

    seconds: float
    private: float
    """Peak of the anonymous memory, in MiB: what the process itself has taken."""
    total: float
    """Peak of the resident memory, in MiB: with the pages of files that are mapped."""
    said: dict[str, Any]
    """What the program printed as JSON objects, a line each."""


class Failed(Exception):
    """A program that did not end well; the last line that it printed."""


def measure(command: Sequence[str], environment: Mapping[str, str]) -> Run:
    """Run a command to its end.

    The process that calls this should be small: the kernel counts its memory as the child's until
    the child's program starts.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        started, private = time.perf_counter(), 0
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=errors)
        while True:
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
            if ended:
                break
            private = max(private, _anonymous(process.pid))
            time.sleep(_PAUSE)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        texts = []
        for file in (out, errors):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
        if process.returncode:
            lines = [line for text in texts for line in text.splitlines() if line.strip()]
            raise Failed(lines[-1].strip() if lines else f"exit status {process.returncode}")
        said: dict[str, Any] = {}
        for line in texts[0].splitlines():
            if line.startswith("{"):
                said |= json.loads(line)
        return Run(seconds, private / _MEGA, usage.ru_maxrss * 1024 / _MEGA, said)


def _anonymous(pid: int) -> int:
    """Bytes of anonymous memory that a process has now; 0 when it has just ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)
