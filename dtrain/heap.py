"""How the C library's allocator treats the large arrays of a training step.

By default glibc returns freed memory to the system as soon as more than a few megabytes lie at the
top of the heap, and the next step pays for it again, page by page: of a GPT step in 16,000 page
faults, 75 ms of a second. `keep_freed_memory` makes it keep what a step will want again. The price:
the process's resident memory stays near its peak. `use_huge_pages` lets the heap grow in pages of
2 MiB, where the system gives them to who asks: NumPy asks for arrays of 4 MiB and more alone, and
most of a step's are smaller.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import resource

# glibc, malloc.h; arrays beyond MMAP_THRESHOLD (its largest value) still come and go by mmap
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
MMAP_THRESHOLD = 32 << 20
MMAP_MAX = 65536  # glibc's own
TRIM_THRESHOLD = 2**31 - 1

HUGE_PAGE = 2 << 20
HUGE_BYTES = 1 << 30  # of the heap; what grows beyond is in small pages


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


def use_huge_pages() -> bool:
    """Let the next `HUGE_BYTES` by which the heap grows be in pages of 2 MiB; whether they will.

    For use after `keep_freed_memory` has returned True. The heap is made that long once, advised,
    and freed: addresses are taken, no memory is, until something is written there. A GPT's step
    is 658 ms in place of 686, medians of four processes each, with the same resident memory. False
    where the process has a limit of addresses, which are then not ours to take, or the system knows
    no such pages.
    """
    limits = (resource.RLIMIT_AS, resource.RLIMIT_DATA)
    if any(resource.getrlimit(limit)[0] != resource.RLIM_INFINITY for limit in limits):
        return False
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
    libc.free.argtypes = (ctypes.c_void_p,)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    libc.mallopt(M_MMAP_MAX, 0)  # or so much would be mapped apart, not in the heap
    start = libc.malloc(HUGE_BYTES)
    libc.mallopt(M_MMAP_MAX, int(os.environ.get("MALLOC_MMAP_MAX_", MMAP_MAX)))
    if start is None:
        return False
    first = -(-start // HUGE_PAGE) * HUGE_PAGE
    length = (start + HUGE_BYTES - first) // HUGE_PAGE * HUGE_PAGE
    advised = libc.madvise(first, length, mmap.MADV_HUGEPAGE) == 0
    libc.free(start)
    return advised


def return_freed_memory() -> None:
    """Give all freed memory back to the system, once, where the allocator is glibc's.

    What the heap grows by afterwards is in small pages.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
