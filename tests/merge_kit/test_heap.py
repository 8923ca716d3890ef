"""Large pieces of memory that are freed go back to the system."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
from pathlib import Path
from merge_kit.heap import LARGE, return_large

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))

if not return_large():
    sys.exit("not known")
# One that is freed would raise glibc's own threshold; the last one keeps the others below the top.
pieces = [bytearray(b"x") * LARGE for _ in range(10)]
del pieces[0]
pieces = [*pieces, *(bytearray(b"x") * LARGE for _ in range(10))]
before = anonymous()
del pieces[:-1]
print(before - anonymous())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to ask for memory")
def test_large_pieces_go_back_to_the_system_when_they_are_freed():
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False
    )
    if "not known" in found.stderr:
        pytest.skip("the C library is not glibc")
    assert int(found.stdout) >= 17 << 23
