"""What the C library does with large pieces of memory that are freed."""

from __future__ import annotations

import ctypes
import sys

LARGE = 1 << 23
"""Bytes. Smaller pieces are used again sooner, and cost fewer page faults, within the heap."""
_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD in glibc's malloc.h


def return_large() -> bool:
    """Give pieces of 8 MB and more back to the system when they are freed; False where not known.

    glibc raises that size by itself, to 32 MB, and keeps such pieces for each thread: of matrices
    that come and go, the holes take as much memory as the matrices. For the whole process, from
    now on: glibc cannot be asked what was set before.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    return mallopt is not None and mallopt(_MMAP_THRESHOLD, LARGE) == 1
