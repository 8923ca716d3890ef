"""A publisher as a process of its own: ``python -m`` this with a hub, a folder and a file.

Says ``ready``, waits for a line, publishes, and says whether the entry is new.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from merge_kit.hub import open_hub


def main(uri: str, folder: str, payload: str) -> None:
    # The children of a suite that runs in a shell's background would not notice Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    hub = open_hub(uri)
    print("ready", flush=True)
    sys.stdin.readline()
    files = {"payload.safetensors": Path(payload), "manifest.sig": b"s", "manifest.json": b"m"}
    print(hub.publish(folder, files), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
