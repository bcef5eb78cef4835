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
