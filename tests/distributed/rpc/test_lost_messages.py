"""Messages that are lost, come twice or late: what is called, what callers get, how it ends.

A transport that loses a message is broken: a call is not run twice all the same, nobody is left
waiting.
"""

from __future__ import annotations

import time

import pytest

import dtrain as torch
from dtrain.comm.transports import base
from dtrain.comm.transports.local import LocalTransport
from dtrain.distributed import rpc
from dtrain.distributed.rpc import agent as agents
from dtrain.distributed.rpc.server import Server
from dtrain.errors import DistNetworkError, PeerLost
from dtrain.testing.distributed import run_distributed
from dtrain.wire import dumps
from tests.distributed.rpc.worlds import add, echo, messages

KINDS = {
    "call": agents.CALL,
    "fetch": agents.FETCH,
    "reply": agents.REPLY,
    "cancel": agents.CANCEL,
    "books": agents.BOOKS,
    "drain": agents.DRAIN,
}


class Faulty(LocalTransport):
    """The first message of `kind` is lost, or sent twice, or after a second thought."""

    kind = fault = None

    def _tell(self, dst, body):
        for message in messages(body):
            self._tell_one(dst, message)

    def _tell_one(self, dst, message):
        (number, *envelope), body = message, dumps(message)
        if number < 0 or envelope[0] != self.kind or self.fault is None:
            super()._tell(dst, body)
            return
        fault, type(self).fault = self.fault, None
        if fault == "twice":
            super()._tell(dst, body)
            super()._tell(dst, body)
        elif fault == "late":
            time.sleep(0.1)
            super()._tell(dst, body)


counted = []


def count(x):
    counted.append(x)
    return x


def program():
    """All kinds of messages; what became of each step."""
    outcomes = []

    def step(function):
        try:
            outcomes.append(function())
        except (PeerLost, rpc.RpcTimeout) as error:
            outcomes.append(type(error))

    for i in range(3):
        step(lambda i=i: rpc.rpc_sync("w1", count, (i,), timeout=8))
    step(lambda: rpc.remote("w1", echo, (7,), timeout=8).to_here(timeout=8))
    future = rpc.rpc_async("w1", add, (1, 2), timeout=8)
    future.cancel()
    step(lambda: rpc.rpc_sync("w1", count, (3,), timeout=8))
    return outcomes


def ranks():
    rank = torch.distributed.get_rank()
    rpc.init_rpc(f"w{rank}")
    outcomes = program() if rank == 0 else None
    begun = time.monotonic()
    rpc.shutdown(timeout=15)
    return outcomes, time.monotonic() - begun


def test_a_worker_whose_line_fails_is_lost_to_the_others(monkeypatch, caplog):
    fetch = Server.fetch

    def mistaken(self, request, name):
        if self._here == "w1":
            raise KeyError("a mistake of ours")
        fetch(self, request, name)

    monkeypatch.setattr(Server, "fetch", mistaken)

    def ranks():
        rank = torch.distributed.get_rank()
        rpc.init_rpc(f"w{rank}")
        if rank == 0:
            with pytest.raises(PeerLost):
                rpc.remote("w1", echo, (1,)).to_here()
            assert rpc.rpc_sync("w2", echo, (1,)) == 1
        if rank == 1:
            with pytest.raises(DistNetworkError, match="I/O thread of rpc failed: KeyError"):
                rpc.shutdown()
        else:
            rpc.shutdown()

    run_distributed(3, ranks)
    assert "KeyError: 'a mistake of ours'" in caplog.text


@pytest.fixture
def faulty(monkeypatch):
    monkeypatch.setattr(base, "_factories", {**base._factories, "local": Faulty})
    counted.clear()


def run(kind, fault):
    Faulty.kind, Faulty.fault = KINDS[kind], fault
    (outcomes, seconds), (_, others) = run_distributed(2, ranks, timeout=40)
    assert Faulty.fault is None, "the program has no such message"
    assert len(counted) == len(set(counted)), "a call was run twice"
    assert max(seconds, others) < 10
    return outcomes


WELL = [0, 1, 2, 7, 3]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", ["twice", "late"])
def test_what_comes_twice_or_late_changes_nothing(faulty, kind, fault):
    assert run(kind, fault) == WELL
    assert sorted(counted) == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_lost_is_an_error_within_seconds(faulty, kind):
    outcomes = run(kind, "lost")
    failed = [outcome for outcome in outcomes if isinstance(outcome, type)]
    assert set(failed) <= {PeerLost}
    assert failed or kind in ("cancel", "books", "drain")
    for outcome, expected in zip(outcomes, WELL, strict=True):
        assert outcome in (expected, PeerLost)
