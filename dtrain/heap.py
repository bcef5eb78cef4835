"""How the C library's allocator treats the large arrays of a training step.

By default glibc returns freed memory to the system as soon as more than a few megabytes lie at the
top of the heap, and the next step pays for it again, page by page: of a GPT step in 16,000 page
faults, 75 ms of a second. `keep_freed_memory` makes it keep what a step will want again. The price:
the process's resident memory stays near its peak.
"""

from __future__ import annotations

import ctypes
import os

# glibc, malloc.h; arrays beyond MMAP_THRESHOLD (its largest value) still come and go by mmap
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
MMAP_THRESHOLD = 32 << 20
TRIM_THRESHOLD = 2**31 - 1


def keep_freed_memory() -> bool:
    """Tell the allocator to keep freed memory; whether it will.

    False, and nothing is changed, where the allocator is not glibc's or the environment says how it
    shall behave (MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_THRESHOLD_).
    """
    if {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"} & os.environ.keys():
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD)) and bool(
        mallopt(M_TRIM_THRESHOLD, TRIM_THRESHOLD)
    )


def return_freed_memory() -> None:
    """Give all freed memory back to the system, once, where the allocator is glibc's."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
