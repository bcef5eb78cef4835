"""ProcessGroup: order, async work, point-to-point, sub-groups, closing, what it says."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from dtrain.comm import collectives as c
from dtrain.comm.group import DEFAULT_TIMEOUT, ProcessGroup
from dtrain.comm.point_to_point import Recv, Send, reference
from dtrain.comm.record import KindStatistics
from dtrain.comm.reduce import AVG
from dtrain.comm.store.memory import MemoryStore
from dtrain.errors import CollectiveTimeout, GroupAborted
from dtrain.testing.world import run_world

both = pytest.mark.parametrize("transport", ["local", "zmq"])


@both
def test_async_and_sync_calls_run_in_the_order_of_submission(transport):
    """Each call doubles and adds: only one order gives 2 * (2 * (2 * 1)) over two ranks."""

    def work(group):
        buf = np.ones(3)
        works = [group.submit(c.AllReduce(buf), async_op=True) for _ in range(5)]
        group.submit(c.AllReduce(buf))  # waits its turn behind the queue
        assert all(w.is_completed() and w.is_success() for w in works)
        assert works[0].result() is buf
        assert works[-1].exception() is None
        return buf.tolist()

    assert run_world(2, work, transport=transport) == [[64.0] * 3] * 2


def test_a_group_has_no_thread_until_it_needs_one():
    def work(group):
        group.submit(c.AllReduce(np.ones(3)))
        mine = f"dtrain-{group.name}-{group.rank}"
        before = [t.name for t in threading.enumerate() if t.name == mine]
        group.submit(c.AllReduce(np.ones(3)), async_op=True).wait()
        after = [t.name for t in threading.enumerate() if t.name == mine]
        return before, after

    for rank, (before, after) in enumerate(run_world(2, work, name="lazy")):
        assert (before, after) == ([], [f"dtrain-lazy-{rank}"])


def test_work_futures_are_what_hooks_chain_on():
    def work(group):
        buf = np.full(3, group.rank + 1.0)
        done = group.submit(c.AllReduce(buf, AVG), async_op=True)
        return done.get_future().then(lambda future: future.value() * 10).wait(10).tolist()

    assert run_world(3, work) == [[20.0] * 3] * 3


def test_waiting_shorter_than_the_call_takes_leaves_the_call_alone():
    def work(group):
        release.wait(10) if group.rank == 1 else None
        handle = group.submit(c.AllReduce(np.ones(2)), async_op=True)
        if group.rank == 0:
            with pytest.raises(CollectiveTimeout, match="still running after a wait of 0\\.01 s"):
                handle.wait(0.01)
            release.set()
        assert handle.wait(10)
        return handle.result().tolist()

    release = threading.Event()
    assert run_world(2, work) == [[2.0, 2.0]] * 2


@both
def test_point_to_point_follows_the_reference(transport):
    """Rank r sends to r + 1 on two tags and receives the tags in the other order."""

    def calls(rank, size):
        after, before = (rank + 1) % size, (rank - 1) % size
        sends = [
            Send(np.full(n, 10.0 * rank + tag), after, tag) for tag, n in ((0, 3), (1, 50_000))
        ]
        return sends, [Recv(np.zeros(n), before, tag) for tag, n in ((1, 50_000), (0, 3))]

    def talk(group):
        sends, recvs = calls(group.rank, group.size)
        works = [group.submit(call, async_op=True) for call in [*recvs, *sends]]
        for work in reversed(works):
            work.wait(10)
        assert {w.source_rank() for w in works[:2]} == {(group.rank - 1) % group.size}
        return [call.buf for call in recvs]

    for size in (2, 3):
        everything = [[*s, *r] for s, r in (calls(rank, size) for rank in range(size))]
        expected = [[out for out in outs if out is not None] for outs in reference(everything)]
        for got, want in zip(run_world(size, talk, transport=transport), expected, strict=True):
            assert [g.tolist() for g in got] == [w.tolist() for w in want]


@both
def test_receiving_from_anybody(transport):
    def talk(group):
        buf = np.zeros(1)
        if group.rank:
            buf[0] = group.rank
            group.submit(Send(buf, 0))
            return None
        got = {}
        for _ in range(group.size - 1):
            source = group.submit(Recv(buf)).source_rank()
            got[source] = buf[0]
        return got

    assert run_world(4, talk, transport=transport)[0] == {1: 1.0, 2: 2.0, 3: 3.0}


@both
def test_point_to_point_passes_a_collective_that_is_under_way(transport):
    """Rank 0 is inside an all-reduce that rank 1 joins only after a message from rank 0's other
    thread.
    """

    def talk(group):
        token = np.zeros(1)
        if group.rank == 0:
            work = group.submit(c.AllReduce(np.ones(2)), async_op=True)
            group.submit(Send(np.ones(1), 1))
            group.submit(Recv(token, 1))
            return work.wait(10)
        group.submit(Recv(token, 0))
        group.submit(Send(token, 0))
        return group.submit(c.AllReduce(np.ones(2))).wait()

    assert run_world(2, talk, transport=transport) == [True, True]


def test_a_receive_polled_until_it_is_complete():
    def talk(group):
        if group.rank:
            started.wait(10)
            group.submit(Send(np.ones(1), 0))
            return None
        work = group.submit(Recv(np.zeros(1), 1), async_op=True)
        assert not work.is_completed()
        started.set()
        deadline = time.monotonic() + 10
        while not work.is_completed():
            assert time.monotonic() < deadline
        return work.get_future().wait(0).tolist()

    started = threading.Event()
    assert run_world(2, talk)[0] == [1.0]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            Send(np.zeros(1), 0),
            "destination rank should not be the same as the rank of the current",
        ),
        (Recv(np.zeros(1), 0), "source rank should not be the same"),
        (Send(np.zeros(1), 7), "Invalid destination rank 7"),
        (Recv(np.zeros(1), -2), "Invalid source rank -2"),
        (Send(np.zeros(1), 1, tag=-1), "tag must not be negative"),
        (Recv(np.zeros(1), None, tag=-1), "tag must not be negative"),
    ],
)
def test_wrong_point_to_point_arguments(call, words):
    with pytest.raises(ValueError, match=words):
        call.validate(0, 2)


@both
def test_sub_groups_need_only_their_members(transport):
    """Of 4 ranks, 3 and 1 make a group (in this order), twice; 0 and 2 do not take part."""

    def split(group):
        if group.rank % 2 == 0:
            with pytest.raises(ValueError, match=f"rank {group.rank} is not one of"):
                group.split([3, 1])
            group.submit(c.Barrier())
            return None
        results = []
        for _ in range(2):
            with group.split([3, 1], timeout=10) as part:
                out = np.zeros(2)
                part.submit(c.AllGather(np.array([float(group.rank)]), out))
                results.append((part.name, part.rank, part.size, out.tolist()))
        group.submit(c.Barrier())
        return results

    results = run_world(4, split, transport=transport)
    name = "world[3,1]"
    assert results == [None, [(name, 1, 2, [3.0, 1.0])] * 2, None, [(name, 0, 2, [3.0, 1.0])] * 2]


@pytest.mark.parametrize("ranks", [[0, 0], [0, 2], [-1, 0]])
def test_nonsense_sub_groups(ranks):
    with (
        ProcessGroup(MemoryStore(), 0, 1) as group,
        pytest.raises(ValueError, match="are not distinct ranks"),
    ):
        group.split(ranks)


def test_statistics_count_finished_calls():
    def work(group):
        for _ in range(3):
            group.submit(c.AllReduce(np.zeros(4, np.float32)))
        group.submit(c.Barrier())
        return group.statistics()

    stats = run_world(2, work)[0]
    assert (stats.completed, stats.queued) == (4, 0)
    assert (stats.messages_sent, stats.bytes_sent) == (4, 48)
    reduced = stats.calls["all_reduce"]
    assert (reduced.count, reduced.bytes) == (3, 48)
    assert reduced.seconds > 0
    assert reduced.waited < reduced.seconds
    met = stats.calls["barrier"]
    assert met == KindStatistics(1, 0, met.seconds, met.waited)


def test_repr_says_what_the_group_is_doing():
    def work(group):
        idle = repr(group)
        if group.rank == 1:
            release.wait(10)
        works = [group.submit(c.AllReduce(np.zeros(1 << 20, np.float32)), async_op=True)]
        works += [group.submit(c.Barrier(), async_op=True) for _ in range(2)]
        if group.rank == 0:
            deadline = time.monotonic() + 10
            while "running" not in (busy := repr(group)):
                assert time.monotonic() < deadline
            release.set()
        for w in works:
            w.wait()
        group.submit(c.Barrier())
        after = repr(group)
        group.close()
        return idle, busy if group.rank == 0 else "", after, repr(group)

    release = threading.Event()
    assert run_world(2, work, name="dp")[0] == (
        "<ProcessGroup 'dp' rank 0/2 local | idle, 0 done>",
        "<ProcessGroup 'dp' rank 0/2 local | 1 running (#0 all_reduce 4.0 MB), 2 queued>",
        "<ProcessGroup 'dp' rank 0/2 local | idle, 4 done>",
        "<ProcessGroup 'dp' rank 0/2 local | closed>",
    )


def test_repr_of_a_failed_group():
    with ProcessGroup(MemoryStore(), 0, 1, name="dp") as group:
        group.abort("no reason")
        assert repr(group) == "<ProcessGroup 'dp' rank 0/1 local | failed: GroupAborted>"


@both
def test_closing_twice_and_calling_afterwards(transport):
    def close(group):
        group.submit(c.Barrier())
        group.close()
        group.close()
        for call in (c.Barrier(), Send(np.zeros(1), 1 - group.rank)):
            with pytest.raises(GroupAborted, match="group 'world' is closed"):
                group.submit(call)

    run_world(2, close, transport=transport)


@both
def test_closing_finishes_what_is_queued(transport):
    def close(group):
        buf = np.ones(3)
        works = [group.submit(c.AllReduce(buf), async_op=True) for _ in range(3)]
        group.close()
        return [w.wait() for w in works], buf.tolist()

    assert run_world(2, close, transport=transport) == [([True] * 3, [8.0] * 3)] * 2


@both
def test_closing_is_bounded_when_a_peer_never_comes(transport):
    def close(group):
        if group.rank == 1:
            closed.wait(10)
            return None
        work = group.submit(c.AllReduce(np.ones(3)), async_op=True)
        started = time.monotonic()
        group.close(timeout=0.1)
        seconds = time.monotonic() - started
        closed.set()
        with pytest.raises(GroupAborted, match="closed while calls were under way"):
            work.wait()
        return seconds

    closed = threading.Event()
    assert run_world(2, close, transport=transport)[0] < 3.0


@both
def test_world_of_one(transport):
    with ProcessGroup(MemoryStore(), 0, 1, transport=transport) as group:
        buf = np.arange(5.0)
        group.submit(c.AllReduce(buf, AVG))
        group.submit(c.Barrier())
        assert buf.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
        assert group.statistics().messages_sent == 0
        assert group.timeout == DEFAULT_TIMEOUT == 1800.0


def test_arrays_from_the_group():
    with ProcessGroup(MemoryStore(), 0, 1) as group:
        array = group.empty((2, 3), np.float16)
        assert (array.shape, array.dtype) == ((2, 3), np.float16)


def test_rank_out_of_range():
    with pytest.raises(ValueError, match="rank 2 is not in range\\(2\\)"):
        ProcessGroup(MemoryStore(), 2, 2)
