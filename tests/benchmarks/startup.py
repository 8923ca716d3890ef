"""Start-up time of the program beside the interpreter's own, in one run.

    python tests/benchmarks/startup.py

Whole processes, interleaved, medians with the spread.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

RUNS = 15
COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "merge-kit --help": [str(Path(sys.executable).parent / "merge-kit"), "--help"],
    "import torch": [sys.executable, "-c", "import torch"],
    "merge-kit methods": [str(Path(sys.executable).parent / "merge-kit"), "methods"],
}


def main() -> None:
    """Time each command `RUNS` times, in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(RUNS):
        for name, command in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - start)
    reference = statistics.median(seconds["python -c pass"])
    for name, values in seconds.items():
        median = statistics.median(values)
        print(
            f"{name:<20} median {median:.3f} s  ({min(values):.3f} to {max(values):.3f})  "
            f"{median / reference:.1f} x python -c pass"
        )


if __name__ == "__main__":
    main()
