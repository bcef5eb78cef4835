"""What is no message, from those who may enter: it is named, and harms nobody else."""

from __future__ import annotations

import time

import numpy as np
import pytest

from dtrain.comm.collectives import Barrier
from dtrain.comm.store import tcp
from dtrain.comm.store.tcp import TcpStore
from dtrain.comm.transports.zmq import DATA, INLINE, MORE, NEWS
from dtrain.errors import (
    DistStoreError,
    PeerLost,
)
from dtrain.testing.world import run_ranks
from dtrain.wire import Header, dumps, pack, unpack
from tests.comm.sockets import at_a_store, join

MEMBERS = {
    "more than announced": [(Header(DATA, nbytes=4), b"", b"12345")],
    "less than announced": [(Header(INLINE, nbytes=100), b"short", None)],
    "no data": [(Header(DATA, nbytes=4), b"", None)],
    "a chunk too many": [
        (Header(DATA, nbytes=4), b"", b"12"),
        (Header(MORE, nbytes=4), b"", b"345"),
    ],
    "one inside another": [(Header(DATA, nbytes=4), b"", b"12")] * 2,
    "an unknown kind": [(Header(99), b"", None)],
    "news that are none": [(Header(NEWS), b"\xc1", None)],
    "news of a wrong shape": [(Header(NEWS), dumps(["report", 1]), None)],
}


@pytest.mark.parametrize("backend", ["tcp", "zmq"])
@pytest.mark.parametrize("what", MEMBERS)
def test_a_member_that_sends_rubbish_is_lost_to_who_hears_it(what, backend, caplog):
    def spoil(group):
        transport = group.transport
        group.submit(Barrier())
        if group.rank == 0:
            for header, body, chunk in MEMBERS[what]:
                header = header._replace(src=0, job=transport._job)
                frames = [pack(header, body), *([] if chunk is None else [chunk])]
                transport._outbox.send_multipart([b"r1", *frames])
            return None
        with pytest.raises(PeerLost) as caught:
            transport.recv_into(0, 5, np.zeros(1), time.monotonic() + 10)
        return caught.value.rank

    assert run_ranks(2, spoil, transport=backend, abort=False)[1].value == 0
    assert "rank 1 hears no more of rank 0: " in caplog.text


@pytest.mark.parametrize(
    "request_",
    [
        ["get", [5], 0.0],
        ["get", [["a"], "b"], 0.0],
        ["wait", [[1, None]], 0.001],
        ["get", ["k"], float("nan")],
        ["get", ["k"], "soon"],
        ["get", ["k"], -1.0],
        ["set", [], 1.0],
        ["gather", ["g", 0, 2], 1.0],
        ["collect", ["no such gather", 0, 0], 1.0],
        ["do", [], 1.0],
        [["get"], ["k"], 1.0],
        "get",
    ],
)
def test_the_store_says_what_is_wrong_with_a_request_and_goes_on(request_):
    with at_a_store() as (server, client, member):
        join(member, server)
        member.send(pack(Header(0, tag=3), dumps(request_)))
        assert member.poll(5000)
        kind, *_ = unpack(member.recv())[0]
        assert kind == tcp._ERROR
        client.set("k", "v")
        assert client.get("k") == b"v"


def test_a_wait_for_ever_is_a_long_one():
    with at_a_store() as (server, client, member):
        join(member, server)
        member.send(pack(Header(0, tag=3), dumps(["get", ["k"], float("inf")])))
        assert not member.poll(50)
        client.set("k", "v")
        assert member.poll(5000)


def test_a_value_too_large_for_a_message_is_refused_where_it_is_made():
    with TcpStore("127.0.0.1", 0, is_master=True, timeout=10) as store:
        with pytest.raises(DistStoreError, match="a message of the store has at most"):
            store.set("k", bytes(9 << 20))
        for _ in range(2):
            store.append("k", bytes(5 << 20))
        with pytest.raises(DistStoreError, match="this one would have 10,485,"):
            store.get("k")
        assert store.num_keys() == 1
