"""Shared memory between ranks: the heap, arrays that live there, deaths, what happens without it.

That the collectives are right over it is in test_collectives, that failures are told in
test_failures; ranks are threads there and processes here, where it matters.
"""

from __future__ import annotations

import errno
import gc
import logging
import os
import signal
import threading
import time
import warnings
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from dtrain.comm import collectives as c, window_algorithms
from dtrain.comm.point_to_point import Recv, Send
from dtrain.comm.reduce import AVG, MAX, PREMUL_SUM, SUM
from dtrain.comm.transports import futex, shm, window as windows
from dtrain.comm.transports.heap import ALIGNMENT, Heap
from dtrain.errors import PeerLost
from dtrain.testing.world import run_ranks, run_world

pytestmark = pytest.mark.skipif(not futex.AVAILABLE, reason="windows need x86-64 Linux")

# Elements of float32 around every border: of a step in place, of a half of staging.
BORDERS = [windows.HALF // 4, window_algorithms._STEP // 4, window_algorithms.LOOKED_UP // 4]
COUNTS = sorted({n + d for n in BORDERS for d in (-1, 0, 1)} | {3 * windows.HALF // 4 + 5})


# ---- the heap


@given(st.lists(st.tuples(st.integers(1, 300), st.booleans()), max_size=60))
@settings(max_examples=50, deadline=None)
def test_the_heap_never_hands_out_a_byte_twice(steps):
    heap, held = Heap(4096, 4096 + 4096), []
    for nbytes, keep in steps:
        found = heap.take(nbytes)
        if found is None:
            continue
        start, stop = found
        assert start % ALIGNMENT == 0
        assert stop - start >= nbytes
        assert 4096 <= start < stop <= 8192
        assert all(stop <= a or b <= start for a, b in held)
        held.append(found)
        if not keep:
            heap.give_back(*held.pop(len(held) // 2))
    for each in held:
        heap.give_back(*each)
    assert heap.take(4096) == (4096, 8192)  # all of it is one piece again
    assert heap.take(1) is None


# ---- cores


def _meet_often(group, times):
    for _ in range(times):
        group.submit(c.Barrier())


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="not run: needs two cores")
def test_a_rank_leaves_the_core_of_another_and_keeps_its_affinity(monkeypatch):
    """All are told that they are on one core: rank 1 asks for another, ever less often."""
    allowed = os.sched_getaffinity(0)
    first, asked = min(allowed), []
    monkeypatch.setattr(futex, "core", lambda: first)
    monkeypatch.setattr(
        os, "sched_setaffinity", lambda pid, cores: asked.append((pid, frozenset(cores)))
    )
    run_world(2, _meet_often, 500, transport="shm")
    moves, restored = asked[::2], asked[1::2]
    assert 1 <= len(moves) <= 3  # after 64, 192 and 448 phases
    assert all(pid == 0 and len(cores) == 1 and first not in cores for pid, cores in moves)
    assert restored == [(0, frozenset(allowed))] * len(moves)


# ---- arrays that live there


def _reduce_everywhere(group, dtype, ops, counts):
    """The bytes of results on arrays of all kinds: all here, all there, and mixed."""
    found = []
    for count in counts:
        rng = np.random.default_rng([group.rank, count])
        values = rng.normal(size=count).astype(dtype)
        for op in ops:
            for here in (True, False, group.rank == 0):
                buf = group.empty(count, dtype) if here else np.empty(count, dtype)
                buf[:] = values
                group.submit(c.AllReduce(buf, op))
                found.append(buf.tobytes())
    return found


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.complex64])
def test_same_bits_as_messages_at_every_border(dtype, size):
    ops = (SUM, AVG, PREMUL_SUM(1.7)) + ((MAX,) if np.dtype(dtype).kind != "c" else ())
    counts = COUNTS if dtype is np.float32 else COUNTS[-2:]
    by_way = [
        run_world(size, _reduce_everywhere, dtype, ops, counts, transport=transport)
        for transport in ("local", "shm")
    ]
    assert by_way[0] == by_way[1]
    assert by_way[0][0] == by_way[0][1]


@pytest.mark.parametrize("size", [3, 4])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int64])
def test_same_bits_over_the_conveyor(monkeypatch, dtype, size):
    monkeypatch.setattr(window_algorithms, "CONVEYED", 2 * window_algorithms.LOOKED_UP)
    ops = (SUM, PREMUL_SUM(1.7)) if np.dtype(dtype).kind == "f" else (SUM, MAX)
    counts = [200_000, windows.HALF + 3]  # less than one piece, and several with a rest
    by_way = [
        run_world(size, _reduce_everywhere, dtype, ops, counts, transport=transport)
        for transport in ("local", "shm")
    ]
    assert by_way[0] == by_way[1]


def _all_kinds(group):
    """Every collective on arrays that live in the window, beside ordinary ones."""
    n, size, rank = 70_001, group.size, group.rank

    def filled(make, count, add=0):
        array = make(count, np.float32)
        array[:] = np.arange(count) % 1000 * 0.1 + rank + add
        return array

    found = []
    for make in (group.empty, np.empty):
        one, many = filled(make, n), filled(make, n * size)
        root, out, gathered = size - 1, filled(make, n), filled(make, n * size)
        calls = [
            c.AllGather(one, gathered),
            c.ReduceScatter(many, out),
            c.Broadcast(filled(make, n), root),
            c.Reduce(filled(make, n), root),
            c.Gather(one, filled(make, n * size) if rank == root else None, root),
            c.Scatter(many if rank == root else None, filled(make, n), root),
            c.AllToAll(many, filled(make, n * size)),
            c.ReduceScatter(many, many[rank * n : (rank + 1) * n]),
        ]
        for call in calls:
            group.submit(call)
        found.append([None if call.output is None else call.output.tobytes() for call in calls])
        found.append([one.tobytes()])  # inputs keep their values
    assert found[0] == found[2]
    assert found[1] == found[3]
    return found[0]


@pytest.mark.parametrize("size", [2, 4])
def test_every_collective_on_arrays_in_the_window(size):
    assert run_world(size, _all_kinds, transport="shm") == run_world(size, _all_kinds)


def _live_and_die(group):
    window = group.transport.window
    first = group.empty((3, 5), np.float64)
    place = window.place_of(first)
    assert first.shape == (3, 5)
    assert first.flags.writeable
    assert place % ALIGNMENT == 0
    view = first[1:].reshape(-1)[2:]
    assert window.place_of(view) == place + 7 * 8
    del first
    gc.collect()
    assert window.place_of(group.empty(15, np.float64)) != place  # the view keeps it
    del view
    gc.collect()
    again = group.empty(15, np.float64)
    assert window.place_of(again) == place
    for _ in range(200):
        group.submit(c.AllReduce(group.empty(1 << 20, np.float32)))
    used = os.fstat(window._segment.descriptor).st_blocks * 512
    assert used < windows.Segment.needed + (12 << 20)
    assert group.empty(0, np.int8).size == 0
    assert window.place_of(np.empty(9)) == windows.NOWHERE
    return again


def test_memory_comes_back_and_arrays_outlive_the_group():
    for kept in run_world(2, _live_and_die, transport="shm"):
        kept[:] = 7.0
        assert kept.sum() == 105
    del kept
    gc.collect()


def _full(group):
    """Rank 1 gets no memory for its array; all compute with what they have."""
    window = group.transport.window
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if group.rank == 1:
            window._heap = Heap(0, 64)
        buf = group.empty(100_000, np.float32)
    buf[:] = group.rank + 1
    group.submit(c.AllReduce(buf))
    return [str(w.message) for w in caught], float(buf.sum()), window.place_of(buf) >= 0


def test_an_array_is_an_ordinary_one_when_there_is_no_memory_to_share():
    well, short = run_world(2, _full, transport="shm", processes=True)
    assert well == [[], 300_000.0, True]
    assert short[1:] == [300_000.0, False]
    assert "no 400,000 bytes of shared memory" in short[0][0]


# ---- no window


def _says(group):
    group.submit(c.AllReduce(np.ones(10_000)))
    return group.transport.name


def test_all_ranks_do_without_when_one_has_no_memory(monkeypatch):
    made = []

    def allocate():
        made.append(1)
        if len(made) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return windows.Segment()

    monkeypatch.setattr(shm, "Segment", allocate)
    monkeypatch.setattr(allocate, "needed", windows.Segment.needed, raising=False)
    with pytest.warns(RuntimeWarning, match=r"No space left on device.*needs [\d,]+ bytes"):
        assert run_world(3, _says, transport="shm") == ["zmq"] * 3


def test_other_machines_use_messages_and_say_so(monkeypatch, caplog):
    monkeypatch.setattr(futex, "AVAILABLE", False)
    with caplog.at_level(logging.INFO, "dtrain.comm"):
        assert run_world(2, _says, transport="shm") == ["zmq"] * 2
    assert "needs x86-64 Linux" in caplog.text


# ---- processes


def _compare(group):
    ours = group.empty(300_000, np.float32)
    plain = np.empty_like(ours)
    for buf in (ours, plain):
        buf[:] = np.random.default_rng(group.rank).normal(size=buf.size)
        group.submit(c.AllReduce(buf, AVG))
    group.submit(c.Barrier())
    return [ours.tobytes() == plain.tobytes(), float(ours.sum()), group.statistics().messages_sent]


@pytest.mark.parametrize("size", [2, 4])
def test_processes_agree_and_send_no_message(size):
    """4 ranks are more than this machine may have cores."""
    results = run_world(size, _compare, transport="shm", processes=True)
    assert results == [results[0]] * size
    assert results[0][0]
    assert results[0][2] == 0


def _victim_dies(group, count):
    """Rank 1 kills itself when the others wait for it; how long each takes to see that."""
    buf = group.empty(max(count, 1), np.float32)
    group.submit(c.AllReduce(buf))
    clock = np.zeros(1)
    if group.rank == 1:
        group.submit(c.Barrier())
        clock[0] = time.monotonic()
        group.submit(c.Broadcast(clock, 1))
        os.kill(os.getpid(), signal.SIGKILL)
    group.submit(c.Barrier())
    group.submit(c.Broadcast(clock, 1))
    try:
        while True:
            group.submit(c.AllReduce(buf) if count else c.Barrier())
    except PeerLost as error:
        return [error.rank, error.orderly, time.monotonic() - clock[0], str(error)]


@pytest.mark.parametrize("count", [0, 4 << 20])
def test_a_killed_rank_is_seen_at_once(count):
    outcomes = run_ranks(3, _victim_dies, count, transport="shm", processes=True)
    assert outcomes[1].status == -signal.SIGKILL
    for survivor in (outcomes[0], outcomes[2]):
        assert survivor.error is None
        rank, orderly, seconds, text = survivor.value
        assert (rank, orderly) == (1, False)
        assert "rank 1" in text
        assert seconds < 0.5  # 0.02 s on an idle machine


def _all_die(group):
    group.submit(c.AllReduce(group.empty(100_000, np.float32)))
    os.kill(os.getpid(), signal.SIGKILL)


def test_nothing_is_left_when_all_are_killed():
    before = set(os.listdir("/dev/shm"))
    outcomes = run_ranks(3, _all_die, transport="shm", processes=True)
    assert [outcome.status for outcome in outcomes] == [-signal.SIGKILL] * 3
    assert not {name for name in set(os.listdir("/dev/shm")) - before if "dtrain" in name}
    named = Path("/proc/net/unix").read_text()
    assert f"@dtrain-{os.getpid()}-" not in named


def _count_while_waiting(group):
    """Rank 1 comes to the barrier when a thread of rank 0, which waits there, has counted."""
    if group.rank == 1:
        group.submit(Recv(np.zeros(1), 0))
        group.submit(c.Barrier())
        return None

    def count():
        total = 0
        for step in range(1_000_000):
            total += step
        group.submit(Send(np.zeros(1), 1))

    counter = threading.Thread(target=count)
    counter.start()
    started, own = time.monotonic(), time.thread_time()
    group.submit(c.Barrier())
    waited, spent = time.monotonic() - started, time.thread_time() - own
    counter.join()
    return waited, spent


def test_who_waits_leaves_the_interpreter_and_the_core_to_others():
    waited, spent = run_world(2, _count_while_waiting, transport="shm", processes=True)[0]
    assert spent < 0.02 + waited / 4


def _sub_groups(group):
    """Groups have windows of their own, used in turn and given back."""
    pairs = [[0, 1], [1, 2], [0, 1, 2]]
    mine = [group.split(ranks) for ranks in pairs if group.rank in ranks]
    buf = mine[0].empty(50_000, np.float64)
    for sub in mine:
        buf[:] = 1
        sub.submit(c.AllReduce(buf))
        assert buf[0] == sub.size
        assert sub.transport.name == "shm"
        sub.close()
    buf[:] = 1
    group.submit(c.AllReduce(buf))
    return buf[-1]


def test_sub_groups_have_windows_of_their_own():
    assert run_world(3, _sub_groups, transport="shm") == [3.0] * 3
