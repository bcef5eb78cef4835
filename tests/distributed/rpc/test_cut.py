"""TCP connections that break while both workers live: each takes the other for lost, at once.

There are two connections between two workers, one for each direction; one of them is cut on the
wire. What one worker called of the other ends on both sides, long before its timeout.
"""

from __future__ import annotations

import threading
import time

import pytest

from dtrain.comm.store.tcp import StoreServer
from dtrain.distributed import rpc
from dtrain.errors import PeerLost
from tests.distributed.rpc.test_open import Other, pytestmark as pytestmark, whoami, worker
from tests.distributed.rpc.worlds import cut, inbox_port, until

_begun, _over = threading.Event(), threading.Event()


def block():
    _begun.set()
    _over.wait(20)


@pytest.mark.parametrize("inbox", ["the first's", "the second's"])
def test_who_is_cut_off_is_lost_on_both_sides_and_may_come_back(inbox):
    _begun.clear()
    _over.clear()
    with StoreServer() as server:
        url = f"tcp://127.0.0.1:{server.port}"
        with worker(url, "first"):
            second = Other(url, "second")
            first = rpc.current.agent()

            def calls():
                """A call of each of the other, with how it is known there."""
                yield lambda: rpc.rpc_sync("second", whoami), "worker 'second'"
                yield lambda: second.agent.rpc_sync(0, whoami, (), {}, 15), "worker 'first'"

            assert [call()[0] for call, _ in calls()] == ["second", "first"]
            waiting = rpc.rpc_async("second", block)
            held = rpc.remote("second", whoami)
            held.to_here()
            assert _begun.wait(10)
            begun = time.monotonic()
            assert cut(inbox_port(first if inbox == "the first's" else second.agent)) == 1
            with pytest.raises(PeerLost, match="worker 'second': rank 1 is lost"):
                waiting.wait()
            until(lambda: 0 in second.agent.lost)
            for call, name in calls():
                with pytest.raises(PeerLost, match=name):
                    call()
            assert time.monotonic() - begun < 8
            assert "connection" in str(second.agent.lost[0])
            _over.set()
            until(lambda: not second.agent.references.values)  # its holder is lost
            second.go()
            again = Other(url, "second")
            assert rpc.rpc_sync("second", whoami) == ["second", 2]
            again.go()
