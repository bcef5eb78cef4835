"""A group over TCP that ranks join and leave: who is let in, and what those get who are not."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest
import zmq

from dtrain.comm import security
from dtrain.comm.store.memory import MemoryStore
from dtrain.comm.transports import zmq_open
from dtrain.comm.transports.zmq import GRACE, NEWS
from dtrain.comm.transports.zmq_open import OpenZmqTransport
from dtrain.errors import DistNetworkError, PeerLost
from dtrain.wire import Header, dumps, loads, pack

SOON = 10.0


@pytest.fixture(autouse=True)
def address(monkeypatch):
    monkeypatch.setenv("DTRAIN_LOCAL_ADDR", "127.0.0.1")


@contextmanager
def ranks(*numbers):
    """Ranks that are alone so far."""
    with ExitStack() as stack:
        made = []
        for number in numbers:
            made.append(OpenZmqTransport(MemoryStore(), number))
            stack.callback(made[-1].close)
        yield made


@contextmanager
def moving(*transports):
    """Messages of these move while the block runs."""
    over = threading.Event()

    def move(transport):
        while not over.is_set():
            transport.wait_until(over.is_set, time.monotonic() + 0.05)

    threads = [threading.Thread(target=move, args=(t,)) for t in transports]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join(SOON)


def lost(transport, rank):
    return transport.wait_until(lambda: rank in transport.mailbox.lost, time.monotonic() + SOON)


def test_who_joins_can_be_talked_to_both_ways():
    with ranks(3, 70) as (a, b):
        with moving(a):
            assert b.reach({3: a.address}) == {3}
        assert a.peers == [70]
        assert b.peers == [3]
        sent = np.arange(1_000_000.0)
        a.send(70, 5, sent)
        got = np.empty_like(sent)
        b.recv_into(3, 5, got, time.monotonic() + SOON)
        assert (got == sent).all()
        b.close()
        assert lost(a, 70)
        assert a.mailbox.lost[70].orderly


def test_one_that_dies_is_lost_and_one_that_is_gone_is_not_reached():
    with ranks(0, 1, 2) as (a, b, c):
        with moving(a):
            assert b.reach({0: a.address}) == {0}
        there = a.address
        a.abandon()
        assert lost(b, 0)
        assert not b.mailbox.lost[0].orderly
        assert c.reach({0: there}) == set()
        with pytest.raises(PeerLost, match="not connected to this rank"):
            c.tell(1, b"x")


def test_the_dead_are_looked_for_all_at_once():
    """Each of them takes a moment: nobody knows yet that it will not say goodbye."""
    dead = {}
    for number in range(20):
        with ranks(number) as (gone,):
            dead[number] = gone.address
    with ranks(30, 31) as (a, b), moving(a):
        begun = time.monotonic()
        assert b.reach({**dead, 30: a.address}) == {30}
        assert time.monotonic() - begun < 20 * GRACE


def test_an_address_belongs_to_the_last_rank_that_had_it():
    with ranks(1, 2) as (a, b), moving(a):
        assert b.reach({7: b.address, 8: a.address, 1: a.address}) == {1}
        assert b.mailbox.lost == {}


def test_one_that_does_not_look_lets_nobody_in(monkeypatch):
    monkeypatch.setattr(zmq_open, "_PATIENCE", 0.3)
    with (
        ranks(0, 1) as (a, b),
        pytest.raises(TimeoutError, match=r"ranks .0. have not let rank 1 in"),
    ):
        b.reach({0: a.address})


def test_who_has_another_secret_is_not_let_in(monkeypatch, tmp_path):
    with ranks(0) as (a,):
        other = tmp_path / "key"
        other.write_bytes(b"x" * 64)
        other.chmod(0o600)
        monkeypatch.setenv("DTRAIN_SECRET_FILE", str(other))
        with ranks(1) as (b,):
            assert b.reach({0: a.address}) == set()
        assert a._door._gate.refused >= 1
        assert a.peers == []


def test_whoever_has_not_said_who_it_is_is_not_heard():
    with ranks(0) as (a,):
        _, _, where, key = loads(a.address)
        context = security.context()
        try:
            socket = security.open_socket(context, zmq.DEALER)
            security.connect(socket, where, security.member_keys(), key)
            news = []
            a.on_news = lambda *about: news.append(about)
            for body in (b"x", dumps(["not a card"])):
                kind = NEWS if body == b"x" else zmq_open.HELLO
                for rank in (8, 9):
                    socket.send(pack(Header(kind, rank, job=1), body))
            assert a.wait_until(lambda: a.ignored == 4, time.monotonic() + SOON)
            assert news == []
            assert a.mailbox.lost == {}
            assert a.peers == []
        finally:
            context.destroy(linger=0)


def test_plain_text_is_for_all_or_nobody(monkeypatch):
    with ranks(0) as (a,):
        monkeypatch.setenv("DTRAIN_DATA_PLANE", "plaintext")
        with ranks(1) as (b,), pytest.raises(DistNetworkError, match="rank 0 one has DTRAIN_DATA"):
            b.reach({0: a.address})


def test_without_an_address_nobody_listens(monkeypatch):
    monkeypatch.delenv("DTRAIN_LOCAL_ADDR")
    with pytest.raises(DistNetworkError, match="set DTRAIN_LOCAL_ADDR"):
        OpenZmqTransport(MemoryStore(), 0)
