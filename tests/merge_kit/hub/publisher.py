"""A publisher in a process of its own, which waits for its signal to begin."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path

from merge_kit.hub import open_hub


def main(
    uri: str, folder: str, payload: Path, line: Connection, environment: Mapping[str, str]
) -> None:
    """Say that it is ready, wait, publish, and say whether the entry is new, or what went wrong."""
    # The children of a suite that runs in a shell's background would not notice Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    try:
        hub = open_hub(uri)
        line.send("ready")
        line.recv()
        files = {"payload.safetensors": payload, "manifest.sig": b"s", "manifest.json": b"m"}
        line.send(str(hub.publish(folder, files)))
    except BaseException:
        line.send(traceback.format_exc())
        sys.exit(1)
