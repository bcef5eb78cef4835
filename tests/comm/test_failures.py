"""What goes wrong between ranks: mismatches, deaths, timeouts, aborts.

Every rank learns it, with the same words.
"""

from __future__ import annotations

import itertools
import os
import threading
import time

import numpy as np
import pytest

from dtrain.comm import collectives as c
from dtrain.comm.point_to_point import Recv, Send
from dtrain.comm.reduce import AVG, SUM
from dtrain.errors import (
    CollectiveMismatch,
    CollectiveTimeout,
    DistError,
    GroupAborted,
    PeerLost,
)
from dtrain.testing.world import run_ranks, run_world
from tests.comm.hosts import pairs

TRANSPORTS = ("local", "shm", "zmq", pairs)


def submit_all(group, *calls):
    for call in calls:
        group.submit(call)


def zeros(shape=4, dtype=np.float32):
    return np.zeros(shape, dtype)


# {what differs: (what most ranks call, what the odd one calls)}; a call is made anew for each rank
MISMATCHES = {
    "kind": (lambda g: c.AllReduce(zeros()), lambda g: c.Broadcast(zeros(), 0)),
    "kind, odd one never sends": (lambda g: c.AllReduce(zeros()), lambda g: _gather(g, 1)),
    "both wait": (lambda g: _gather(g, 0), lambda g: _scatter(g, 0)),
    "shape": (lambda g: c.AllReduce(zeros(4)), lambda g: c.AllReduce(zeros(5))),
    "shape, same size": (
        lambda g: c.AllReduce(zeros((2, 3))),
        lambda g: c.AllReduce(zeros((3, 2))),
    ),
    "size class": (lambda g: c.AllReduce(zeros(4)), lambda g: c.AllReduce(zeros(10_000))),
    "dtype": (lambda g: c.AllReduce(zeros()), lambda g: c.AllReduce(zeros(4, np.int32))),
    "op": (lambda g: c.AllReduce(zeros(), SUM), lambda g: c.AllReduce(zeros(), AVG)),
    "root": (lambda g: c.Broadcast(zeros(), 0), lambda g: c.Broadcast(zeros(), g.size - 1)),
    "root of reduce": (lambda g: c.Reduce(zeros(), 0), lambda g: c.Reduce(zeros(), g.size - 1)),
    "barrier": (lambda g: c.Barrier(), lambda g: c.AllReduce(zeros())),
    "all_to_all": (lambda g: c.AllGather(zeros(), zeros(4 * g.size)), lambda g: _all_to_all(g)),
}


def _gather(group, root):
    return c.Gather(zeros(), zeros(4 * group.size) if group.rank == root else None, root)


def _scatter(group, root):
    return c.Scatter(zeros(4 * group.size) if group.rank == root else None, zeros(), root)


def _all_to_all(group):
    return c.AllToAll(zeros(group.size), zeros(group.size))


def _misfit(group, what, odd, before):
    most, other = MISMATCHES[what]
    for _ in range(before):
        group.submit(c.AllReduce(zeros()))
    call = (other if group.rank == odd else most)(group)
    started = time.monotonic()
    try:
        group.submit(call)
        group.submit(c.Barrier())  # a rank whose part was done learns it here
    except CollectiveMismatch as error:
        return str(error), error.calls, error.seq, call.signature, time.monotonic() - started
    raise AssertionError(f"rank {group.rank} did not notice")


@pytest.mark.parametrize("what", MISMATCHES)
@pytest.mark.parametrize(
    ("transport", "size"),
    [(t, n) for t in TRANSPORTS for n in (2, 3, 4) if t is not pairs or n > 2],
)
def test_a_mismatch_is_the_same_error_everywhere_within_a_second(transport, size, what):
    for odd in (0, size - 1):
        results = run_world(size, _misfit, what, odd, 3, transport=transport)
        texts, calls, seqs, signatures, seconds = zip(*results, strict=True)
        assert len(set(texts)) == 1, "\n\n".join(texts)
        assert set(seqs) == {3}
        # All calls are named with their ranks and lines.
        assert [[r, s] for r, s, _ in calls[0]] == [[r, s] for r, s in enumerate(signatures)]
        assert all("test_failures.py:" in site for _, _, site in calls[0])
        assert max(seconds) < 1.0


def test_the_sentence_of_a_mismatch():
    (text, *_), *_ = run_world(3, _misfit, "kind", 2, 41)
    lines = [line.strip() for line in text.splitlines()]
    assert lines[:2] == [
        "group 'world' #41: rank 0 called all_reduce(float32[4], op=SUM)"
        " but rank 2 called broadcast(float32[4], src=0).",
        "All ranks must issue the same collectives in the same order.",
    ]
    assert lines[2].startswith("rank 0 called all_reduce(float32[4], op=SUM) at ")
    assert lines[5].startswith("last calls of rank 0: #39 all_reduce(float32[4], op=SUM) at ")


def test_uneven_splits_that_do_not_fit_are_a_mismatch():
    """Rank 0 sends 3 rows to rank 1, which expects 2."""

    def swap(group):
        splits = ([1, 3], [1, 1]) if group.rank == 0 else ([1, 1], [2, 1])
        with pytest.raises(DistError) as caught:
            submit_all(
                group,
                c.AllToAll(zeros(sum(splits[0])), zeros(sum(splits[1])), *splits),
                c.Barrier(),
            )
        return str(caught.value)

    for transport in TRANSPORTS:
        texts = run_world(2, swap, transport=transport)
        assert texts[0] == texts[1]
        assert "rank 0 sent 12 bytes where rank 1 expects 8" in texts[0]


def test_skipping_a_call_is_a_mismatch_too():
    def skip(group):
        skipped = [c.Barrier()] if group.rank else []
        with pytest.raises(CollectiveMismatch):
            submit_all(group, *skipped, c.AllReduce(zeros()), c.AllReduce(zeros()))

    run_world(3, skip)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_stall_that_ends_well_is_no_error(transport):
    """Rank 1 is late by more than the time after which waiting ranks tell what they wait in."""

    def late(group):
        release = threading.Event()
        if group.rank == 1:
            release.wait(0.3)
        for _ in range(3):
            group.submit(c.AllReduce(zeros()))
        return group.statistics().completed

    assert run_world(3, late, transport=transport) == [3, 3, 3]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_timeout_names_the_missing_rank_and_poisons_the_group(transport):
    def wait(group):
        group.submit(c.Barrier())
        if group.rank == 1:
            done.wait(20)
            with pytest.raises(GroupAborted):
                _until_failed(group)
            return None
        started = time.monotonic()
        with pytest.raises(CollectiveTimeout) as caught:
            group.submit(c.AllReduce(zeros()), timeout=0.3)
        assert 0.2 < time.monotonic() - started < 3
        first = caught.value
        with pytest.raises(
            GroupAborted, match=r"the group has failed: .*no data from rank 1"
        ) as late:
            group.submit(c.Barrier())
        assert late.value.__cause__ is not None
        if next(finished) == 1:
            done.set()
        return str(first), first.rank, first.seq

    done, finished = threading.Event(), itertools.count()
    results = run_world(3, wait, transport=transport)
    text, rank, seq = results[0]
    assert results[2] == results[0]
    assert (rank, seq) == (1, 1)
    lines = [line.strip() for line in text.splitlines()]
    assert lines[0] == (
        "group 'world' #1 all_reduce(float32[4], op=SUM): no data from rank 1 for 0.3 s"
        " (it last took part in #0)."
    )
    assert lines[1].startswith("rank 1 last completed #0 barrier() at ")
    assert "done.wait(20)" in lines


def _until_failed(group):
    """The late rank: its call may still succeed, for the others had sent their part.

    Then it hears of the failure.
    """
    with pytest.raises(CollectiveTimeout):
        submit_all(group, *[c.AllReduce(zeros()) for _ in range(3)])
    group.submit(c.AllReduce(zeros()))


def test_a_timeout_tells_that_the_other_rank_never_came():
    def meet(group):
        if group.rank == 0:
            with pytest.raises(CollectiveTimeout) as caught:
                group.submit(c.Barrier(), timeout=0.6)
            return str(caught.value)
        with pytest.raises(CollectiveTimeout):
            group.submit(Recv(zeros(), 0, 5))
        return None

    text = run_world(2, meet)[0]
    assert "no data from rank 1 for 0.6 s (it has not been heard from in this group)" in text


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_rank_that_vanishes_is_named_by_all_within_a_second(transport):
    """Rank 2 of 4 leaves without goodbye, once it has heard that all others are past call #0."""

    def vanish(group):
        group.submit(c.AllReduce(zeros()))
        if group.rank == 2:
            for peer in (0, 1, 3):
                group.submit(Recv(zeros(), peer))
            group.abandon()
            return None
        group.submit(Send(zeros(), 2))
        started = time.monotonic()
        with pytest.raises(PeerLost) as caught:
            submit_all(group, *[c.AllReduce(zeros()) for _ in range(3)])
        assert time.monotonic() - started < 1.0
        with pytest.raises(GroupAborted, match="rank 2 is lost"):
            group.submit(c.Barrier())
        return caught.value.rank, caught.value.orderly

    assert run_world(4, vanish, transport=transport) == [(2, False)] * 2 + [None, (2, False)]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_rank_that_closes_is_not_mistaken_for_a_dead_one(transport):
    def leave(group):
        group.submit(c.Barrier())
        if group.rank == 1:
            group.close()
            return None
        with pytest.raises(PeerLost, match="rank 1 has closed its side of the group") as caught:
            group.submit(c.Barrier())
        return caught.value.orderly

    assert run_world(2, leave, transport=transport) == [True, None]


def _killed_in_mid_step(group, victim):
    buf = np.zeros(1 << 20, np.float32)
    group.submit(c.AllReduce(buf))
    if group.rank == victim:
        threading.Timer(0.05, os.kill, (os.getpid(), 9)).start()
    try:
        while True:
            started = time.monotonic()
            group.submit(c.AllReduce(buf))
    except PeerLost as loss:
        return [loss.rank, time.monotonic() - started]


def test_sigkill_in_mid_step_is_named_by_the_survivors():
    outcomes = run_ranks(3, _killed_in_mid_step, 2, transport="zmq", processes=True)
    assert outcomes[2].status == -9
    for outcome in outcomes[:2]:
        assert outcome.error is None, outcome.error
        rank, seconds = outcome.value
        assert rank == 2
        assert seconds < 2.0


def test_the_first_failing_rank_is_the_one_that_is_raised():
    def fail(group):
        if group.rank == 1:
            raise KeyError("mine")
        group.submit(c.Barrier())

    with pytest.raises(KeyError, match="mine") as caught:
        run_world(3, fail)
    assert caught.value.__notes__ == ["raised on rank 1 of 3 (transport local)"]
    outcomes = run_ranks(3, fail)
    for rank in (0, 2):
        assert isinstance(outcomes[rank].error, GroupAborted)
        assert "aborted by rank 1: KeyError: 'mine'" in str(outcomes[rank].error)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_abort_wakes_a_rank_that_waits(transport):
    def wait(group):
        if group.rank == 0:
            threading.Timer(0.05, group.abort, ("enough",)).start()
        with pytest.raises(GroupAborted, match="aborted by rank 0: enough"):
            group.submit(c.AllReduce(zeros()) if group.rank == 0 else Recv(zeros(), 0))
        return True

    assert run_world(2, wait, transport=transport) == [True, True]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_queued_work_fails_with_the_first_failure_as_its_cause(transport):
    def queue(group):
        if group.rank == 1:
            group.submit(Recv(zeros(), 0))  # all three are queued there
            works = [group.submit(c.AllReduce(zeros(5)), async_op=True)]
        else:
            works = [group.submit(c.AllReduce(zeros(4)), async_op=True) for _ in range(3)]
            group.submit(Send(zeros(), 1))
        with pytest.raises(CollectiveMismatch):
            works[0].wait()
        assert not works[0].is_success()
        for work in works[1:]:
            with pytest.raises(GroupAborted, match="cannot run, the group has failed") as caught:
                work.wait()
            assert isinstance(caught.value.__cause__, CollectiveMismatch)

    run_world(2, queue, transport=transport)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_receive_of_something_else_than_was_sent(transport):
    def talk(group):
        if group.rank == 0:
            group.submit(Send(zeros(20), 1, tag=3))
            return None
        with pytest.raises(CollectiveMismatch) as caught:
            group.submit(Recv(zeros(10), 0, tag=3))
        return str(caught.value)

    text = run_world(2, talk, transport=transport)[1]
    assert "rank 1 called recv(float32[10], src=0, tag=3) at " in text
    assert "but rank 0 sent float32[20] at " in text
