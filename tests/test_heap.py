"""The allocator keeps freed memory: large arrays made again and again cause no page faults."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource
import numpy as np
import dtrain
from dtrain.heap import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        arrays = [np.ones(1 << 19, np.float32) for _ in range(8)]  # too small for huge pages
        del arrays
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
print(keep_freed_memory(), faults())
"""

RETURN = """
import numpy as np
from dtrain.heap import keep_freed_memory, return_freed_memory

def resident():
    with open("/proc/self/statm") as numbers:
        return int(numbers.read().split()[1])

keep_freed_memory()
arrays = [np.ones(1 << 19, np.float32) for _ in range(32)]
last = np.ones(1000)  # above them in the heap
del arrays
before = resident()
return_freed_memory()
print(before - resident() > 12 * 1024, 0)  # pages of 4 KiB: of 64 MiB at least 48
"""


HUGE = """
import numpy as np
import dtrain

arrays = [np.ones(1 << 19, np.float32) for _ in range(32)]  # 64 MiB
with open("/proc/self/smaps") as lines:
    found = 0
    for line in lines:
        heap = line.rstrip().endswith("[heap]") if "-" in line.split()[0] else heap
        if heap and line.startswith("AnonHugePages"):
            found += int(line.split()[1])
print(True, found)
"""


def run(program=PROGRAM, **variables):
    env = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", program], env={**env, **variables}, capture_output=True, text=True,
        timeout=30, check=True,
    )  # fmt: skip
    kept, faults = done.stdout.split()
    return kept == "True", int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc's allocator")
def test_arrays_made_again_cause_no_page_faults():
    kept, faults = run()
    assert kept
    assert faults < 2000  # one pass touches 4096 pages, twenty 81,920


def test_the_environment_decides_when_it_says_something():
    kept, faults = run(MALLOC_TRIM_THRESHOLD_="131072", MALLOC_MMAP_THRESHOLD_="131072")
    assert not kept
    assert faults > 40_000


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc's allocator")
def test_freed_memory_is_returned_when_asked_for():
    assert run(RETURN) == (True, 0)


def huge_pages_on_request():
    try:
        with open("/sys/kernel/mm/transparent_hugepage/enabled") as modes:
            return "[never]" not in modes.read()
    except OSError:
        return False


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc's allocator")
@pytest.mark.skipif(not huge_pages_on_request(), reason="this system has no huge pages")
def test_arrays_in_the_heap_lie_in_huge_pages():
    """Unless the environment says how the allocator shall behave."""
    assert run(HUGE)[1] >= 32 * 1024  # KiB; some may not be found when memory is in pieces
    assert run(HUGE, MALLOC_TRIM_THRESHOLD_="131072")[1] == 0


def test_no_addresses_are_taken_where_they_are_limited():
    limit = "import resource; resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))"
    call = "from dtrain.heap import use_huge_pages; print(use_huge_pages() is False, 0)"
    assert run(f"{limit}; {call}") == (True, 0)
