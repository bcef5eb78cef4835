"""How much may be under way to one worker: who wants more waits, and is not forgotten."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from dtrain.distributed import rpc
from dtrain.distributed.rpc import room
from dtrain.distributed.rpc.room import Room
from tests.distributed.rpc.worlds import world


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(room, "CALLS", 3)
    monkeypatch.setattr(room, "BYTES", 1000)


def test_calls_and_bytes_are_bounded(small):
    made = Room()
    assert [made.enter(0, 0) for _ in range(4)] == [True, True, True, False]
    made.leave(0)
    assert made.enter(999, 0)
    made.leave(0)
    assert made.enter(10**9, 0)  # of any size, while it is not full
    made.leave(0)
    assert not made.enter(0, 0)
    made.leave(10**9)
    assert made.enter(0, 0)


def test_who_waits_goes_when_there_is_room(small):
    made = Room()
    assert made.enter(1000, 0)
    went = []
    waits = threading.Thread(target=lambda: went.append(made.enter(1, 10)))
    waits.start()
    made.leave(1000)
    waits.join(10)
    assert went == [True]


_gate = threading.Event()


def hold(x):
    _gate.wait(20)
    return len(x)


def test_a_caller_waits_within_its_timeout(small):
    def main():
        x = np.zeros(2000, np.uint8)
        first = rpc.rpc_async("w1", hold, (x,))
        with pytest.raises(rpc.RpcTimeout, match="hold on worker 'w1' has not answered"):
            rpc.rpc_async("w1", hold, (x,), timeout=0.1)
        _gate.set()
        assert first.wait() == 2000
        assert rpc.rpc_sync("w1", hold, (x,)) == 2000

    _gate.clear()
    world(2, main)
