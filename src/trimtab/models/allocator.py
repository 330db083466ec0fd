"""What the C library does with memory that was freed."""

from __future__ import annotations

import ctypes
import sys
from functools import cache

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
NEVER = 2**31 - 1


@cache
def keep_freed_memory() -> None:
    """Let glibc keep what a step frees for the next step, instead of giving it back to the kernel.

    A block above 32 MiB is otherwise mapped and unmapped at every use, and the top of the heap is given back as soon as twice as much
    is free. The kernel hands it out again page by page, zeroed: ten times slower than memory that is warm. Other C libraries are left
    as they are. The process stays as large as its largest step was.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, NEVER)
