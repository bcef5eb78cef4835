"""What is special about the transport over unix sockets: strangers, deaths, full buffers."""

from __future__ import annotations

import errno
import os
import signal
import socket
import threading
import time

import numpy as np
import pytest

from dtrain.comm.collectives import Barrier
from dtrain.comm.transports import unix
from dtrain.comm.transports.unix import CHUNK, UnixTransport
from dtrain.comm.transports.window import NOWHERE
from dtrain.errors import DistNetworkError, PeerLost, TransportTimeout
from dtrain.testing.world import run_ranks, run_world
from tests.comm.test_transports import OtherHosts


def soon():
    return time.monotonic() + 20


def test_ranks_of_several_hosts_are_refused():
    def make(store, rank, size, timeout):
        return UnixTransport(OtherHosts("hosts", store), rank, size, timeout)

    with pytest.raises(DistNetworkError, match="joins ranks of one host"):
        run_world(2, lambda group: None, transport=make)


def test_strangers_at_the_door_do_not_matter(monkeypatch):
    """They connect before the ranks do: one says nothing and goes, one shows a wrong token."""
    ask = UnixTransport._ask

    def after_strangers(self, address, deadline):
        for says in (b"", b"x" * 18):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stranger:
                stranger.connect(address[16:])
                stranger.send(says)
        return ask(self, address, deadline)

    monkeypatch.setattr(UnixTransport, "_ask", after_strangers)
    run_world(3, lambda group: group.submit(Barrier()), transport="unix")


def full(group):
    """Rank 1 does not read: what rank 0 sends waits in its backlog, and arrives in order."""
    transport = group.transport
    count, data = 50, np.arange(CHUNK, dtype=np.int32)
    if group.rank == 0:
        for tag in range(count):
            transport.send(1, tag, data + tag)
        with pytest.raises(TransportTimeout):
            transport.flush(time.monotonic())
        transport.send(1, 100, np.zeros(1, np.uint8))
        transport.tell(1, b"last")
        transport.flush(soon())
    else:
        heard = []
        transport.on_news = lambda source, body: heard.append(body)
        got = np.empty_like(data)
        for tag in range(count):
            transport.recv_into(0, tag, got, soon())
            assert (got == data + tag).all()
        assert transport.wait_until(lambda: heard == [b"last"], soon())
    group.submit(Barrier())


def test_what_the_kernel_cannot_hold_waits_here():
    run_world(2, full, transport="unix")


def test_news_that_are_too_long_are_refused():
    def tell(group):
        if group.rank == 0:
            with pytest.raises(ValueError, match="at most"):
                group.transport.tell(1, bytes(CHUNK + 1))
        group.submit(Barrier())

    run_world(2, tell, transport="unix")


def dies(group):
    """Rank 1 is killed while a child of it still holds its sockets."""
    if group.rank == 1:
        if os.fork() == 0:
            threading.Event().wait(3)
            os._exit(0)
        group.transport.send(0, 0, np.ones(1, np.uint8))
        os.kill(os.getpid(), signal.SIGKILL)
    got = np.zeros(1, np.uint8)
    group.transport.recv_into(1, 0, got, soon())
    begun = time.monotonic()
    with pytest.raises(PeerLost) as caught:
        group.transport.recv_into(1, 1, got, soon())
    assert not caught.value.orderly
    assert time.monotonic() - begun < 2
    with pytest.raises(PeerLost):
        group.transport.send(1, 0, got)
    return int(got[0])


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_death_is_noticed_although_a_child_holds_the_sockets():
    outcomes = run_ranks(2, dies, transport="unix", processes=True, timeout=30)
    assert outcomes[0].value == 1
    assert outcomes[1].status == -signal.SIGKILL


def full_of_no_memory():
    raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))


def test_without_memory_to_share_arrays_are_sent(monkeypatch):
    monkeypatch.setattr(unix, "Lender", full_of_no_memory)

    def look(group):
        group.submit(Barrier())
        return group.transport.hand(1 - group.rank, np.zeros(100_000))

    with pytest.warns(RuntimeWarning, match="no memory to share with other ranks"):
        assert run_world(2, look, transport="unix") == [NOWHERE, NOWHERE]


def test_memory_that_cannot_be_mapped_is_an_error_that_says_what_to_do(monkeypatch):
    monkeypatch.setattr(unix, "Borrower", lambda descriptor: full_of_no_memory())
    outcomes = run_ranks(2, lambda group: None, transport="unix")
    errors = [str(outcome.error) for outcome in outcomes]
    assert any("that rank" in e and "lends" in e and "ulimit" in e for e in errors), errors
