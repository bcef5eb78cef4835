"""`dtrain.futures`: several futures as one, errors, and futures that only move while waited for."""

from __future__ import annotations

import threading
import time

import pytest

import dtrain as torch
import dtrain.distributed as dist
from dtrain.futures import Future, collect_all, wait_all
from dtrain.testing.distributed import run_distributed


def test_collect_all_is_complete_with_the_last():
    a, b = Future(), Future()
    both = collect_all([a, b])
    b.set_result(2)
    assert not both.done()
    a.set_result(1)
    assert both.done()
    assert [f.value() for f in both.wait()] == [1, 2]
    assert wait_all([a, b]) == [1, 2]


def test_of_nothing():
    assert collect_all([]).wait() == []
    assert wait_all([]) == []


def test_the_first_error_of_the_list_is_told():
    a, b = Future(), Future()
    both = collect_all([a, b])
    b.set_exception(ValueError("second"))
    a.set_exception(KeyError("first"))
    with pytest.raises(KeyError, match="first"):
        both.wait()
    never = Future()
    with pytest.raises(ValueError, match="second"):
        wait_all([b, never])


def test_completed_by_other_threads():
    parts = [Future() for _ in range(8)]
    together = collect_all(parts).then(lambda f: sum(p.value() for p in f.value()))
    threads = [threading.Thread(target=part.set_result, args=(1,)) for part in parts]
    for thread in threads:
        thread.start()
    assert together.wait(10) == 8
    for thread in threads:
        thread.join()


def test_what_follows_a_driven_future_drives_it():
    """A future that moves only while somebody waits: `then` and `collect_all` pass the wait on."""
    source = Future(lambda timeout: None if timeout == 0 else source.set_result(5))
    chained = source.then(lambda f: f.value() + 1).then(lambda f: f.value() * 2)
    assert not chained.done()
    assert collect_all([chained]).wait()[0].value() == 12


def test_a_timeout_leaves_it_to_be_waited_for_again():
    future = Future().then(lambda f: f.value())
    begin = time.monotonic()
    with pytest.raises(TimeoutError, match=r"not complete after 0\.01 s"):
        future.wait(0.01)
    assert time.monotonic() - begin < 5


def receive():
    """A message's future, chained: nobody else would move it."""
    if dist.get_rank() == 0:
        dist.send(torch.ones(2), 1)
        return None
    got = torch.zeros(2)
    return dist.irecv(got, 0).get_future().then(lambda f: f.value()[0].tolist()).wait(10)


def test_a_message_that_is_waited_for_through_then():
    assert run_distributed(2, receive) == [None, [1.0, 1.0]]
