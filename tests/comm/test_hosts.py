"""Groups that span hosts: the placement, every collective over islands, what crosses between hosts.

Ranks are threads here and told which host they are on. That failures are told everywhere is in
test_failures, real hosts (network namespaces) are in tests/dtrun.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import signal
import threading
import time

import ml_dtypes
import numpy as np
import pytest

from dtrain.comm import chain, collectives as c, island_algorithms
from dtrain.comm.parts import slices
from dtrain.comm.reduce import AVG, MAX, PREMUL_SUM, SUM
from dtrain.comm.topology import Placement
from dtrain.comm.transports import futex, shm, window as windows
from dtrain.errors import PeerLost
from dtrain.testing.conformance import COLLECTIVES, check_group
from dtrain.testing.world import run_ranks, run_world
from tests.comm.hosts import islands, pairs, placed

pytestmark = pytest.mark.skipif(not futex.AVAILABLE, reason="windows need x86-64 Linux")

WORLDS = ((2, 2), (1, 3), (3, 1), (2, 1, 2))


# ---- who is where


def test_each_contribution_has_one_carrier_on_every_other_host():
    for sizes in itertools.product((1, 2, 3), repeat=3):
        placement = Placement([h for h, size in enumerate(sizes) for _ in range(size)])
        for rank, here in enumerate(placement.host_of):
            carried = [r for mate in placement.hosts[here] for r in placement.carried(mate)]
            assert sorted(carried) == [r for r, h in enumerate(placement.host_of) if h != here]
            for host in set(range(3)) - {here}:
                assert rank in placement.carried(placement.carrier(rank, host))


def test_hosts_are_numbered_by_their_first_ranks():
    placement = Placement(["b", "a", "a", "b"])
    assert placement.hosts == [[0, 3], [1, 2]]
    assert placement.host_of == [0, 1, 1, 0]
    assert not placement.in_runs
    assert Placement(["b", "b", "a"]).in_runs


# ---- every collective


OVER_HOSTS = [kind for kind in COLLECTIVES if hasattr(island_algorithms, kind)]


@pytest.mark.parametrize("kind", OVER_HOSTS)
@pytest.mark.parametrize("sizes", WORLDS, ids=str)
def test_conformance_over_islands(kind, sizes):
    check_group(islands(*sizes), [sum(sizes)], [kind], (0, 7, 20_003) if sizes == (2, 2) else (7,))


@pytest.mark.parametrize("kind", sorted(set(COLLECTIVES) - set(OVER_HOSTS)))
def test_conformance_of_what_goes_by_messages(kind):
    check_group(islands(2, 1), [3], [kind], (7,))


@pytest.mark.parametrize("hosts", ["abab", "aba", "abc"])
def test_other_placements_use_messages_and_say_so_once(hosts, caplog):
    def name(group):
        group.submit(c.AllReduce(np.ones(10_000)))
        return group.transport.name

    with caplog.at_level(logging.INFO, "dtrain.comm"):
        assert run_world(len(hosts), name, transport=placed(hosts)) == ["zmq"] * len(hosts)
    said = [text for text in caplog.messages if "transport 'shm'" in text]
    assert len(said) == 1
    why = "a host to itself" if hosts == "abc" else "consecutive ranks, and they have [[0, 2], [1"
    assert why in said[0]


def test_islands_are_what_the_group_says():
    def look(group):
        transport = group.transport
        here = group.empty(10, np.float32)
        assert transport.window is None
        assert transport.memory.place_of(here) != windows.NOWHERE
        return transport.name, transport.island.members, transport.memory.rank

    assert run_world(5, look, transport=islands(3, 2)) == [
        ("shm", [0, 1, 2], 0),
        ("shm", [0, 1, 2], 1),
        ("shm", [0, 1, 2], 2),
        ("shm", [3, 4], 0),
        ("shm", [3, 4], 1),
    ]


def test_one_rank_without_memory_is_enough_for_all_hosts(monkeypatch):
    made = itertools.count()

    def allocate():
        return (None, "cannot allocate") if next(made) == 2 else (windows.Segment(), "")

    monkeypatch.setattr(shm, "_allocate", allocate)
    with pytest.warns(RuntimeWarning, match=r"cannot allocate; each rank of a group needs"):
        names = run_world(4, lambda group: group.transport.name, transport=islands(2, 2))
    assert names == ["zmq"] * 4


# ---- the same bits


def _sums(group, dtype, counts):
    """The bytes of all-reduces and reduce-scatters whose order of addition shows.

    For some operators the arrays live in the memory of all hosts, or of some.
    """
    found = []
    ops = ((SUM, 4), (AVG, 0), (PREMUL_SUM(1.7), 2), (MAX, 0))
    for count, (op, there) in itertools.product(counts, ops):
        rng = np.random.default_rng([group.rank, count])
        make = group.empty if group.rank < there else np.empty
        whole = make(group.size * count, dtype)
        whole[:] = rng.normal(size=whole.size)
        part = np.empty(count, dtype)
        group.submit(c.ReduceScatter(whole, part, op))
        group.submit(c.AllReduce(whole, op))
        found += [part.tobytes(), whole.tobytes()]
    return found


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("sizes", [(2, 2), (1, 1, 2), (3, 1)], ids=str)
def test_same_bits_as_messages_in_one_round_and_in_many(sizes, dtype, monkeypatch):
    """With room for 16 KiB the longer ones take 8 to 60 rounds, the last of which are uneven."""
    monkeypatch.setattr(chain, "HALF", 16 * 1024)
    counts = (5_000, 20_011)
    assert run_world(4, _sums, dtype, counts, transport=islands(*sizes)) == run_world(
        4, _sums, dtype, counts
    )


def test_in_place_forms_that_fsdp_uses():
    """Rank r holds r + 1 in its part of the big buffer, here of 400 KB."""

    def gather(group):
        whole = np.zeros((4, 25_000), np.float32)
        whole[group.rank] = group.rank + 1
        group.submit(c.AllGather(whole[group.rank], whole))
        assert (whole[:, 0] == [1, 2, 3, 4]).all()
        group.submit(c.ReduceScatter(whole, whole[group.rank]))
        return np.unique(whole[group.rank]).tolist()

    assert run_world(4, gather, transport=islands(2, 2)) == [[4.0 * (r + 1)] for r in range(4)]


# ---- what crosses between hosts


def _sent(group, calls):
    """Messages and bytes that this rank sends in each call; none of them stays on its host."""
    found = []
    for call in calls(group):
        before = group.statistics()
        group.submit(call)
        after = group.statistics()
        found.append(
            (after.messages_sent - before.messages_sent, after.bytes_sent - before.bytes_sent)
        )
    return found


def _chained(hosts, count, itemsize, wide, rows_up, rows_back):
    """The closed forms of `chain` per rank: `rows_back[h]` is what hosts 0..h want."""
    lanes = slices(count, min(map(len, hosts)))
    kept = max(b - a for a, b in itertools.pairwise([0, *rows_back])) if rows_up > 1 else 1
    step = windows.HALF // itemsize // (rows_up * len(lanes) + kept)
    rounds = math.ceil(lanes[0].stop / step)
    expected = []
    for h, ranks in enumerate(hosts):
        for place in range(len(ranks)):
            width = lanes[place].stop - lanes[place].start if place < len(lanes) else 0
            up, back = h + 1 < len(hosts), h > 0
            sent = up * width * rows_up * wide + back * width * rows_back[h - 1] * itemsize
            expected.append((rounds * (up + back) if place < len(lanes) else 0, sent))
    return expected


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("sizes", WORLDS, ids=str)
def test_large_sums_send_the_closed_forms_of_the_chain(sizes, dtype):
    size, count, itemsize = sum(sizes), 100_003, np.dtype(dtype).itemsize

    def calls(group):
        whole = np.zeros(size * count, dtype)
        return [c.AllReduce(np.zeros(count, dtype)), c.ReduceScatter(whole, np.zeros(count, dtype))]

    found = run_world(size, _sent, calls, transport=islands(*sizes))
    hosts = Placement([h for h, n in enumerate(sizes) for _ in range(n)]).hosts
    ends = list(itertools.accumulate(sizes))
    assert [f[0] for f in found] == _chained(hosts, count, itemsize, 4, 1, [1] * len(sizes))
    assert [f[1] for f in found] == _chained(hosts, count, itemsize, 4, size, ends)


@pytest.mark.parametrize("sizes", WORLDS, ids=str)
def test_what_all_get_crosses_to_each_host_once(sizes):
    """40 bytes and 4 MB: all_gather and a small sum, a small and a large broadcast, a barrier."""
    size, others, root = sum(sizes), len(sizes) - 1, sum(sizes) - 1

    def calls(group):
        small, large = np.zeros(10, np.float32), np.zeros(1_000_000, np.float32)
        return [
            c.AllGather(small, np.zeros(10 * size, np.float32)),
            c.AllReduce(small),
            c.ReduceScatter(np.zeros(10 * size, np.float32), small),
            c.AllGather(large, np.zeros(1_000_000 * size, np.float32)),
            c.Broadcast(small, root),
            c.Broadcast(large, root),
            c.Barrier(),
        ]

    found = run_world(size, _sent, calls, transport=islands(*sizes))
    placement = Placement([h for h, n in enumerate(sizes) for _ in range(n)])
    depth = 1 + max(len(placement.carried(r)) for r in range(size))
    gathers = math.ceil(4_000_000 / (windows.HALF // depth // 64 * 64))
    cuts = math.ceil(4_000_000 / windows.HALF)
    for rank, sent in enumerate(found):
        first = rank in [ranks[0] for ranks in placement.hosts]
        assert sent[:2] == [(others, others * 40)] * 2
        assert sent[2] == (others, others * 40 * size)
        assert sent[3] == (gathers * others, others * 4_000_000)
        here = placement.host_of[rank]
        relays = rank == root or (first and here != placement.host_of[root])
        last = here == len(sizes) - 2  # of the ring that begins with the root's host
        assert sent[4] == ((others, others * 40) if rank == root else (int(relays), 0))
        passed = (cuts, 4_000_000) if relays and not last else (0, 0)
        assert sent[5] == (passed[0] + (relays and rank != root), passed[1])
        assert sent[6] == (math.ceil(math.log2(len(sizes))) if first else 0, 0)


# ---- a rank dies


def _killed_in_mid_sum(group, victim):
    """The victim kills itself while all add; what each survivor says, and after how long."""
    wide = group.split(range(group.size), transport=pairs)
    assert wide.transport.island is not None
    buf = np.zeros(4 << 20, np.float32)
    wide.submit(c.AllReduce(buf))
    if group.rank == victim:
        threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGKILL)).start()
    try:
        while True:
            started = time.monotonic()
            wide.submit(c.AllReduce(buf))
    except PeerLost as loss:
        return [loss.rank, loss.orderly, time.monotonic() - started]
    finally:
        wide.close()


@pytest.mark.parametrize("victim", [0, 3])
def test_a_rank_killed_in_mid_sum_is_named_on_every_host(victim):
    outcomes = run_ranks(4, _killed_in_mid_sum, victim, transport="zmq", processes=True)
    assert outcomes[victim].status == -signal.SIGKILL
    for survivor in [o for o in outcomes if o.rank != victim]:
        assert survivor.error is None, survivor.error
        assert survivor.value[:2] == [victim, False]
        assert survivor.value[2] < 2.0  # with what the sum took until then
