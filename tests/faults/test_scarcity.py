"""Little memory, few descriptors, many signals, a reader that does not read, forks, many jobs."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from dtrain.comm.transports import futex
from dtrain.comm.transports.window import Segment
from dtrain.testing.world import outcome_of, run_world, started
from tests.faults import scarce

shared = pytest.mark.skipif(not futex.AVAILABLE, reason="windows need x86-64 Linux")
both = pytest.mark.parametrize("transport", [pytest.param("shm", marks=shared), "zmq"])


def results(size, function, *args, timeout=50.0):
    """What each rank returned; `function` makes its own group."""
    with started(size, function, args, timeout=timeout, group=None) as ranks:
        deadline = time.monotonic() + timeout
        ends = [outcome_of(rank, ranks[rank], deadline) for rank in range(size)]
    for end in ends:
        if end.error is not None:
            raise end.error
    return [end.value for end in ends]


@both
def test_64_descriptors_are_enough(transport):
    """3 ranks; each holds 33 when all is open, its store's and the group's."""
    assert results(3, scarce.with_few_descriptors, transport, 64) == [[True, transport]] * 3


@shared
def test_ranks_do_without_shared_memory_when_one_gets_none_and_say_how_much_it_needs():
    for exact, transport, (warning,) in results(3, scarce.with_little_memory):
        assert (exact, transport) == (True, "zmq")
        assert "rank 1 cannot allocate shared memory ([Errno 27] File too large)" in warning
        assert f"each rank of a group needs {Segment.needed:,} bytes" in warning


@both
def test_a_storm_of_signals_changes_no_result(transport):
    calls = 500
    for exact, signals in run_world(
        2, scarce.in_a_storm, calls, transport=transport, processes=True
    ):
        assert exact == calls
        assert signals > 20, "not run: hardly any signal came"


def test_a_flood_at_a_slow_reader_is_kept_in_order_and_in_bounds():
    count = 100_000
    (_, sender), (right, reader) = results(2, scarce.flood, "zmq", count)
    assert right == count
    assert sender < 64 << 20  # 18 MiB: the sender keeps what the reader has no room for
    assert reader < 16 << 20


@pytest.mark.parametrize("transport", ["zmq", "tcp"])
def test_a_rank_that_is_busy_is_not_taken_for_dead(transport):
    """What waits for it fills its queue, behind which its signs of life would wait too."""
    assert results(2, scarce.late, transport, 2.0) == [True, True]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@both
def test_children_are_refused_and_their_parent_goes_on(transport):
    refused = [True, True]
    found = run_world(2, scarce.forks, transport=transport, processes=True)
    assert found == [[refused, 100]] * 2


def test_20_jobs_that_start_at_once_do_not_meet():
    def job(_):
        return run_world(2, scarce.rank_of, transport="zmq", processes=True)

    with ThreadPoolExecutor(20) as pool:
        assert list(pool.map(job, range(20))) == [[[0, True], [1, True]]] * 20
