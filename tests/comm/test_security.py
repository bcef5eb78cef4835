"""Who may be heard: gates, and what may be listened on."""

from __future__ import annotations

import socket
import threading
import time

import numpy as np
import pytest
import zmq
from zmq.utils.monitor import parse_monitor_message

from dtrain import env
from dtrain.comm import security
from dtrain.comm.collectives import AllReduce, Barrier
from dtrain.comm.security import addresses
from dtrain.comm.security.sockets import PROTECTION, protect
from dtrain.comm.store.tcp import StoreServer, TcpStore
from dtrain.errors import (
    DistNetworkError,
    DistStoreError,
    TransportTimeout,
)
from dtrain.testing.world import run_ranks, run_world
from tests.comm.sockets import a_socket, at_a_store, join

# ---- listening


@pytest.mark.parametrize(
    "where", ["tcp://0.0.0.0", "tcp://*:0", "tcp://[::]:0", "tcp://:0", "tcp://224.0.0.1"]
)
@pytest.mark.parametrize("plain", [True, False])
def test_nobody_listens_on_every_address(where, plain):
    with a_socket() as (context, sock):
        gate = security.Gate(context, security.fresh_keys())
        gate.protect(sock)
        with pytest.raises(DistNetworkError, match="every address of this machine"):
            security.listen(sock, where, plain=plain)


@pytest.mark.parametrize("missing", PROTECTION)
def test_nobody_listens_on_tcp_without_all_of_the_protection(missing):
    with a_socket() as (context, sock):
        gate = security.Gate(context, security.fresh_keys())
        gate.protect(sock)
        sock.setsockopt(missing, b"another" if missing == zmq.ZAP_DOMAIN else 0)
        with pytest.raises(DistNetworkError, match=r"refusing to listen.*not authenticated"):
            security.listen(sock, "tcp://127.0.0.1")


def test_plain_text_is_for_private_addresses():
    with a_socket() as (_, sock):
        with pytest.raises(DistNetworkError, match=r"8\.8\.8\.8 is not a private address"):
            security.listen(sock, "tcp://8.8.8.8:0", plain=True)
        assert security.listen(sock, "tcp://localhost", plain=True).address.startswith("tcp://127.")


def test_addresses_come_apart_and_together():
    assert addresses.split("tcp://[fe80::1]") == ("fe80::1", "0")
    assert addresses.split("tcp://host:12") == ("host", "12")
    assert addresses.endpoint("::1", 5) == "tcp://[::1]:5"
    assert addresses.local_address("127.0.0.1") == "127.0.0.1"
    with pytest.raises(DistNetworkError, match="cannot find the address of"):
        addresses.resolve("no.such.name.invalid")


# ---- the gate


def knock(address, server, own, mechanism="CURVE"):
    """What becomes of one connection: the events of its monitor's first word."""
    with a_socket() as (_, sock):
        monitor = sock.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | security.BROKEN)
        if mechanism == "PLAIN":
            sock.plain_username, sock.plain_password = b"user", b"word"
        if mechanism == "CURVE":
            security.connect(sock, address, own, server)
        else:
            sock.connect(address)
        assert monitor.poll(5000), "neither let in nor refused"
        event = parse_monitor_message(monitor.recv_multipart())["event"]
        sock.disable_monitor()
        monitor.close(0)
    return event


def strangers(server, client):
    """What must not be let in: (server key it believes in, its own keys, mechanism)."""
    unknown = security.fresh_keys()
    return {
        "unknown key": (server.public, unknown, "CURVE"),
        "another server in mind": (unknown.public, client, "CURVE"),
        "right key, wrong role": (server.public, server, "CURVE"),
        "NULL": (b"", None, "NULL"),
        "PLAIN": (b"", None, "PLAIN"),
    }


def test_the_store_lets_in_its_clients_and_nobody_else(monkeypatch):
    with StoreServer() as server, TcpStore("127.0.0.1", server.port, timeout=10) as client:
        client.set("k", "v")
        handled = []
        monkeypatch.setattr(StoreServer, "_handle", lambda *frames: handled.append(frames))
        pair = security.store_keys()
        for what, (believed, own, mechanism) in strangers(*pair).items():
            event = knock(server.address, believed, own, mechanism)
            assert event & (security.REFUSED | zmq.EVENT_DISCONNECTED), what
        assert handled == []
        assert server._gate.refused == 2  # the others did not get as far as the gate
        assert (
            knock(server.address, pair.server.public, pair.client) == zmq.EVENT_HANDSHAKE_SUCCEEDED
        )
        monkeypatch.undo()
        assert client.get("k") == b"v"


def test_something_else_at_the_stores_port_is_told_and_not_waited_for():
    """It speaks first, as an SSH server does: the connection is over before the first question."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with TcpStore("127.0.0.1", port, timeout=10) as client:
            line = client._take_line()
            stranger, _ = listener.accept()
            with stranger:
                stranger.sendall(b"SSH-2.0-something\r\n" * 10)
                assert line._monitor.poll(5000)
                # The event comes just before the end of the queue.
                deadline = time.monotonic() + 5
                while line._socket.poll(0, zmq.POLLOUT) and time.monotonic() < deadline:
                    pass
                with pytest.raises(DistStoreError, match="do not know each other"):
                    line.ask(1, ["num_keys", [], 10.0], 10.0)
            line.close()


def test_a_client_that_says_nothing_does_not_stop_the_store():
    with at_a_store() as (server, client, silent):
        monitor = silent.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
        join(silent, server)
        assert monitor.poll(5000)
        client.set("k", "v")
        silent.disable_monitor()
        monitor.close(0)


def test_a_peer_that_connects_and_says_nothing_does_not_wake_who_waits_for_its_message():
    def wait(group):
        transport = group.transport
        transport._watch(1 - group.rank)
        if group.rank == 0:
            with pytest.raises(TransportTimeout):
                transport.recv_into(1, 3, np.zeros(1), time.monotonic() + 0.1)
        group.submit(Barrier())

    run_world(2, wait, transport="tcp")


@pytest.mark.parametrize("plane", ["curve", "plaintext"])
def test_chunks_arrive_over_tcp_as_they_were_sent(plane, monkeypatch, caplog):
    monkeypatch.setenv("DTRAIN_DATA_PLANE", plane)

    def add(group):
        buf = np.arange(5 << 20, dtype=np.float32) + group.rank  # 20 MiB: three chunks a part
        group.submit(AllReduce(buf))
        assert (buf == 2 * np.arange(5 << 20, dtype=np.float32) + 1).all()
        return group.transport._network._gate is None

    assert run_world(2, add, transport="tcp") == [plane == "plaintext"] * 2
    warned = [record.message for record in caplog.records]
    assert warned == ["the ranks exchange tensors in plain text, as --data-plane asks for"] * (
        plane == "plaintext"
    )


def test_ranks_must_agree_about_plain_text(monkeypatch):
    monkeypatch.setattr(env, "data_plane", lambda: _plane_of(threading.current_thread().name))
    outcomes = run_ranks(2, lambda group: None, transport="tcp")
    for outcome in outcomes:
        assert "ranks [1] have DTRAIN_DATA_PLANE=plaintext" in str(outcome.error)


def _plane_of(thread):
    return "plaintext" if thread == "rank 1" else "curve"


def test_a_rank_of_an_older_attempt_is_told_at_once(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with StoreServer() as server:
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
        told = pytest.raises(DistStoreError, match="do not know each other")
        with TcpStore("127.0.0.1", server.port, timeout=30) as stale, told:
            stale.set("k", "v")


def test_a_socket_without_a_gate_lets_nobody_in():
    pair = security.fresh_keys()
    with a_socket() as (_, sock):
        protect(sock, pair)
        address = security.listen(sock, "tcp://127.0.0.1").address
        assert knock(address, pair.public, pair) & (security.REFUSED | zmq.EVENT_DISCONNECTED)


def test_the_inbox_of_a_rank_lets_in_the_ranks_of_its_group_alone():
    def attack(group):
        group.submit(Barrier())
        if group.rank == 0:
            network = group.transport._network
            address, pair = network.address_of(1), security.store_keys()
            victim = security.Keys(network._peers[1].key, b"")
            for what, (believed, own, mechanism) in strangers(victim, pair.client).items():
                if own is victim:
                    own = pair.server
                event = knock(address, believed, own, mechanism)
                assert event & (security.REFUSED | zmq.EVENT_DISCONNECTED), what
        group.submit(Barrier())

    run_world(2, attack, transport="tcp")


def test_a_rank_cannot_speak_for_another_one(caplog):
    """Rank 0 proves to be rank 0 and says it were rank 1: rank 2 must not hear it."""

    def forge(group):
        transport, out = group.transport, np.zeros(4, np.uint8)
        group.submit(Barrier())
        if group.rank == 0:
            transport.rank = 1
            transport.send(2, 7, np.full(4, 66, np.uint8))
            transport.rank = 0
        group.submit(Barrier())
        if group.rank == 1:
            transport.send(2, 7, np.full(4, 1, np.uint8))
        if group.rank == 2:
            transport.recv_into(1, 7, out, 1e18)
        group.submit(Barrier())
        return out.tolist(), transport._network.refused

    assert run_world(3, forge, transport="tcp")[2] == ([1] * 4, 1)
    assert "rank 2 refused a message of rank 0 that names rank 1 as its sender" in caplog.text
