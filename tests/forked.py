"""Processes that are forked off one which has imported everything already, so that a test which
starts many does not wait for the same imports again and again."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from merge_kit.cli import COMMANDS

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    sorted(
        {place.partition(":")[0] for place, _ in COMMANDS.values()}
        | {f"merge_kit.hub.{name}" for name in ("huggingface", "objects", "sftp")}
        | {"timm", "merge_kit.cli"}
    )
)


class Forked:
    """A running command of the program; what it says on stderr goes to a file."""

    def __init__(self, arguments: Sequence[object], said: Path) -> None:
        self._said = said
        told = [str(argument) for argument in arguments]
        self._process = CONTEXT.Process(target=_run, args=(told, dict(os.environ), str(said)))
        self._process.start()

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self._process.exitcode is None

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()

    def wait(self, patience: float) -> tuple[int, str]:
        """Wait for the end: its exit status, negative for a signal, and what it said."""
        end = time.monotonic() + patience
        self._process.join(patience)
        assert time.monotonic() < end, "it does not end"
        status = self._process.exitcode
        assert status is not None
        return status, self._said.read_text(errors="replace") if self._said.exists() else ""


def _run(arguments: list[str], environment: Mapping[str, str], said: str) -> None:
    """In the process: what ``python -m merge_kit`` does."""
    from merge_kit.cli import main

    os.environ.clear()
    os.environ.update(environment)
    for number, path in ((1, os.devnull), (2, said)):
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(handle, number)
        os.close(handle)
    main(arguments)
