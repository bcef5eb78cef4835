"""Envelopes on their way out: what goes in one write, what may wait, and for how long."""

from __future__ import annotations

import math
import threading

import pytest

from dtrain.distributed.rpc import outgoing
from dtrain.distributed.rpc.outgoing import Outgoing
from dtrain.errors import PeerLost
from tests.distributed.rpc.worlds import messages


@pytest.fixture
def clock(monkeypatch):
    """The time, which stands still unless a test moves it on."""
    now = [100.0]
    monkeypatch.setattr(outgoing.time, "monotonic", lambda: now[0])
    return now


class Wire:
    def __init__(self):
        self.writes, self.lost = [], set()

    def __call__(self, to, body):
        if to in self.lost:
            raise PeerLost(to)
        self.writes.append((to, [message[:2] for message in messages(body)]))


@pytest.fixture
def wire():
    return Wire()


@pytest.fixture
def out(wire, clock):
    """A line whose mover has promised to look: calls are made one after the other."""
    made = Outgoing(wire)
    made.put(9, ["first"], soon=True)
    assert wire.writes.pop() == (9, [[1, "first"]])  # nothing was promised when it was sent
    assert made.promise(math.inf) == clock[0] + 1e-3
    return made


def test_what_may_wait_goes_with_what_may_not(out, wire):
    out.put(1, ["a"], soon=True)
    out.put(1, ["b"], soon=True)
    out.put(2, ["c"], soon=True)
    assert wire.writes == []
    out.put(1, ["d"], soon=False)
    assert wire.writes == [(1, [[1, "a"], [2, "b"], [3, "d"]])]
    out.flush()
    assert wire.writes[1:] == [(2, [[1, "c"]])]
    out.flush()
    assert len(wire.writes) == 2


def test_enough_has_come_together(out, wire):
    for i in range(40):
        out.put(1, [i], soon=True)
    assert [len(written) for _, written in wire.writes] == [16, 16]


def test_a_write_holds_so_many_bytes(out, wire):
    out.put(1, ["a", b"x" * 20_000], soon=True)
    out.put(1, ["b", b"x" * 20_000], soon=True)
    assert wire.writes == [(1, [[1, "a"]])]
    out.put(1, ["c", b"x" * 100_000], soon=True)  # too large for company
    assert wire.writes[1:] == [(1, [[2, "b"]]), (1, [[3, "c"]])]


def test_what_has_waited_long_goes_with_the_next(out, wire, clock):
    out.put(1, ["a"], soon=True)
    clock[0] += 250e-6
    out.put(1, ["b"], soon=True)
    assert wire.writes == [(1, [[1, "a"], [2, "b"]])]


def test_nothing_waits_on_an_idle_line(out, wire, clock):
    clock[0] += 3e-3
    assert out.promise(clock[0] + 50) == clock[0] + 50
    out.put(1, ["a"], soon=True)
    assert wire.writes == [(1, [[1, "a"]])]


def test_what_is_said_comes_after_what_was_sent_and_counts_it(out, wire):
    out.put(1, ["a"], soon=True)
    out.say(1, -1)
    assert wire.writes == [(1, [[1, "a"]]), (1, [[-1, 1]])]


def test_whoever_is_gone_gets_nothing(out, wire):
    out.put(1, ["a"], soon=True)
    out.put(2, ["b"], soon=True)
    wire.lost.add(1)
    out.flush()
    assert wire.writes == [(2, [[1, "b"]])]
    with pytest.raises(PeerLost):
        out.put(1, ["c"], soon=False)
    out.flush()
    assert len(wire.writes) == 1


def test_many_threads_and_a_mover_lose_and_double_nothing(wire):
    out, threads = Outgoing(wire), 4
    stopped = threading.Event()

    def put():
        for _ in range(2000):
            out.put(1, ["x"], soon=True)

    def look():
        while not stopped.is_set():
            out.promise(math.inf)
            out.flush()

    mover = threading.Thread(target=look)
    callers = [threading.Thread(target=put) for _ in range(threads)]
    for thread in [mover, *callers]:
        thread.start()
    for thread in callers:
        thread.join(60)
    stopped.set()
    mover.join(60)
    out.flush()
    heard = [number for _, written in wire.writes for number, _ in written]
    assert heard == list(range(1, threads * 2000 + 1))
