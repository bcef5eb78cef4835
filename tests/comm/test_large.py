"""Arrays of more than 2 GiB: what counts in 32 bits somewhere would cut or wrap them.

Two ranks that are threads. Needs 4.3 GB for the two arrays and room for what is under way.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dtrain.comm import collectives as c
from dtrain.comm.point_to_point import Recv, Send
from dtrain.testing.world import run_world

COUNT = 2**31 + 17
BLOCK = 1 << 20
NEEDED = 12  # GiB; the two arrays, the messages under way, and what else runs on the machine


def available():
    """Memory that can be had without swapping, in GiB."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) / 2**20


def number(block, factor):
    """What the elements of a block hold: another number than its neighbours, and than 2 GiB on."""
    return factor * (block % 59 + 1)


def fill(array, factor):
    for block, start in enumerate(range(0, array.size, BLOCK)):
        array[start : start + BLOCK] = number(block, factor)


def holds(array, factor):
    """Whether every element is what `fill` writes."""
    blocks = enumerate(range(0, array.size, BLOCK))
    parts = ((array[start : start + BLOCK], number(block, factor)) for block, start in blocks)
    return all(part.min() == part.max() == wanted for part, wanted in parts)


@pytest.fixture(scope="module")
def arrays():
    """One for each rank, for all transports: most of the time goes into touching them first."""
    return [np.empty(COUNT, np.int8) for _ in range(2)]


def exchange(group, arrays):
    """A message, a sum and a broadcast of the same array."""
    buf = arrays[group.rank]
    if group.rank == 0:
        fill(buf, 1)
        group.submit(Send(buf, 1))
    else:
        group.submit(Recv(buf, 0))
        assert holds(buf, 1), "recv"
    group.submit(c.AllReduce(buf))
    assert holds(buf, 2), "all_reduce"
    if group.rank == 1:
        fill(buf, -1)
    group.submit(c.Broadcast(buf, 1))
    assert holds(buf, -1), "broadcast"


@pytest.mark.skipif(available() < NEEDED, reason=f"not run: needs {NEEDED} GiB of free memory")
@pytest.mark.timeout(150)  # 15 s for the first and 4 s for the second on two idle cores
@pytest.mark.parametrize("transport", ["shm", "zmq"])
def test_more_than_2_gib(transport, arrays):
    run_world(2, exchange, arrays, transport=transport, timeout=120.0)


def test_what_is_missing_or_misplaced_would_be_seen():
    array = np.empty(3 * BLOCK + 5, np.int8)
    fill(array, 2)
    assert holds(array, 2)
    array[:BLOCK], array[BLOCK : 2 * BLOCK] = array[BLOCK : 2 * BLOCK].copy(), array[:BLOCK].copy()
    assert not holds(array, 2)
    fill(array, 2)
    array[-1] = 0
    assert not holds(array, 2)
