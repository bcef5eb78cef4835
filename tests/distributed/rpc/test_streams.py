"""Streams: items as they are yielded, read ahead by a bounded number, ended by either side."""

from __future__ import annotations

import os
import signal
import threading

import pytest

import dtrain as torch
from dtrain.distributed import rpc
from dtrain.errors import PeerLost
from dtrain.testing.world import run_ranks
from tests.distributed.rpc.worlds import served, until, world

made: list[int] = []
closed = threading.Event()
gate = threading.Event()


def squares(n, start=0):
    for i in range(start, start + n):
        yield torch.full((2,), i * i)


def noted(n):
    try:
        for i in range(n):
            made.append(i)
            yield i
    finally:
        closed.set()


def breaks():
    yield 1
    raise LookupError("that was all")


def hangs():
    gate.wait(20)
    yield 1


def unsendable():
    yield 1
    yield object()


@pytest.mark.parametrize("read_ahead", [1, 3, 100])
def test_items_come_in_order_and_the_stream_ends(read_ahead):
    def main():
        items = rpc.stream("w1", squares, (20,), {"start": 5}, read_ahead=read_ahead)
        assert [item[1].item() for item in items] == [i * i for i in range(5, 25)]
        assert list(items) == []
        assert list(rpc.stream("w1", range_of, (3,))) == [0, 1, 2]
        assert [i.item() for s in [rpc.stream("w1", squares, (0,))] for i in s] == []

    world(2, main, threads=1)


def range_of(n):
    return list(range(n))


def test_no_more_is_made_than_was_asked_for():
    def main():
        made.clear()
        items = rpc.stream("w1", noted, (50,), read_ahead=4)
        until(lambda: len(made) == 4)
        assert [next(items) for _ in range(10)] == list(range(10))
        until(lambda: len(made) == 14)
        rpc.rpc_sync("w1", range_of, (1,))
        assert len(made) == 14

    world(2, main)


@pytest.mark.parametrize("how", ["dropped", "closed", "left"])
def test_whoever_stops_reading_closes_the_generator(how):
    def main():
        closed.clear()
        items = rpc.stream("w1", noted, (50,), read_ahead=4)
        next(items)
        if how == "closed":
            items.close()
            assert list(items) == []
        elif how == "left":
            with items:
                next(items)
        else:
            del items
        until(closed.is_set)

    world(2, main)


def test_errors():
    def main():
        items = rpc.stream("w1", breaks)
        assert next(items) == 1
        with pytest.raises(LookupError, match="that was all") as caught:
            next(items)
        assert "in breaks" in str(caught.value.__cause__)
        assert list(items) == []
        items = rpc.stream("w1", hangs, timeout=0.05)
        with pytest.raises(rpc.RpcTimeout, match=r"next item of .*hangs on worker 'w1'.*0.05 s"):
            next(items)
        gate.set()
        items = rpc.stream("w1", unsendable)
        assert next(items) == 1
        with pytest.raises(TypeError, match="object cannot be sent"):
            next(items)
        with pytest.raises(TypeError, match="'int' object is not iterable"):
            next(rpc.stream("w1", abs_of, (1,)))
        with pytest.raises(TypeError, match="getcwd may not be called"):
            rpc.stream("w1", os.getcwd)
        with pytest.raises(ValueError, match="read_ahead must be at least 1"):
            rpc.stream("w1", squares, (1,), read_ahead=0)

    gate.clear()
    world(2, main)


def abs_of(n):
    return abs(n)


def yields_and_dies():
    yield 1
    os.kill(os.getpid(), signal.SIGKILL)
    yield 2


def stream_of_the_dead():
    items = rpc.stream("w1", yields_and_dies)
    with pytest.raises(PeerLost):
        list(items)


def killed(group):
    from dtrain.testing.distributed import joined

    with joined(group):
        served(stream_of_the_dead, None, 4, {})


def test_a_worker_that_dies_ends_its_streams_at_once():
    outcomes = run_ranks(2, killed, transport="zmq", processes=True, timeout=50)
    assert outcomes[0].error is None
    assert outcomes[1].status == -signal.SIGKILL
