"""Who may be heard: secrets and their files, keys, gates, and what may be listened on."""

from __future__ import annotations

import os
import re
import stat
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest
import zmq
from zmq.utils.monitor import parse_monitor_message

from dtrain import env
from dtrain.comm import security
from dtrain.comm.collectives import AllReduce, Barrier
from dtrain.comm.security import addresses, keys, secret
from dtrain.comm.security.sockets import PROTECTION, protect
from dtrain.comm.store import tcp
from dtrain.comm.store.tcp import StoreServer, TcpStore
from dtrain.comm.transports.zmq import DATA, INLINE, MORE, NEWS
from dtrain.errors import (
    DistNetworkError,
    DistStoreError,
    PeerLost,
    SecretError,
    TransportTimeout,
)
from dtrain.testing.world import run_ranks, run_world
from dtrain.wire import Header, dumps, pack, unpack

SECRET = b"0123456789abcdef" * 4


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "job.key"
    path.write_bytes(SECRET)
    path.chmod(0o600)
    return path


# ---- the secret


def test_a_secret_is_found_in_the_run_directory_then_by_its_path_then_at_home(file, tmp_path):
    home = {"XDG_STATE_HOME": str(tmp_path / "state")}
    own = secret.job_secret(home)
    assert len(own) == 64
    assert secret.job_secret({**home, "DTRAIN_SECRET_FILE": str(file)}) == SECRET
    run = tmp_path / "run"
    run.mkdir()
    both = {"DTRAIN_SECRET_FILE": str(file), "DTRAIN_RUN_DIR": str(run)}
    assert secret.job_secret(both) == SECRET  # an older launcher's directory has none
    (run / "secret").write_bytes(b"r" * 32)
    (run / "secret").chmod(0o600)
    assert secret.job_secret(both) == b"r" * 32


def test_the_users_own_secret_is_made_once_and_is_private(tmp_path):
    places = {"XDG_RUNTIME_DIR": str(tmp_path / "run"), "XDG_STATE_HOME": str(tmp_path / "state")}
    found, together = [], threading.Barrier(8)

    def look():
        together.wait()
        found.append(secret.job_secret(places))

    threads = [threading.Thread(target=look) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    folder = tmp_path / "run" / "dtrain"
    assert len(set(found)) == 1
    assert [path.name for path in folder.iterdir()] == ["secret"]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "secret").stat().st_mode) == 0o600


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o602, 0o777])
def test_a_secret_that_others_can_read_or_change_is_refused(file, mode):
    file.chmod(mode)
    with pytest.raises(SecretError, match=f"mode {mode:04o}.*run chmod 600 {file}") as caught:
        secret.read_secret(file)
    assert SECRET.decode() not in str(caught.value)


def test_a_secret_of_another_user_is_refused_and_roots_is_not(file, monkeypatch):
    owner = file.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    real = os.fstat

    def owned_by(user):
        def fstat(descriptor):
            values = list(real(descriptor))
            values[4] = user
            return os.stat_result(values)

        return fstat

    monkeypatch.setattr(os, "fstat", owned_by(owner + 2))
    with pytest.raises(SecretError, match=f"belongs to user {owner + 2}"):
        secret.read_secret(file)
    monkeypatch.setattr(os, "fstat", owned_by(0))
    file.chmod(0o440)  # as orchestrators mount secrets for a group
    assert secret.read_secret(file) == SECRET
    file.chmod(0o444)
    with pytest.raises(SecretError, match="mode 0444"):
        secret.read_secret(file)


@pytest.mark.parametrize("content", [b"", b"x" * 31, b"x" * 5000])
def test_a_secret_of_a_wrong_length_is_refused(file, content):
    file.write_bytes(content)
    with pytest.raises(SecretError, match="expected 32 to 4096: make one with dtrun keygen"):
        secret.read_secret(file)


def test_a_secret_that_is_not_there_or_not_a_file_is_named(tmp_path):
    with pytest.raises(SecretError, match="nowhere: No such file"):
        secret.read_secret(tmp_path / "nowhere")
    with pytest.raises(SecretError, match=re.escape(str(tmp_path))):
        secret.read_secret(tmp_path)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo, 0o600)
    with pytest.raises(SecretError, match="not a regular file"):
        secret.read_secret(fifo)


def test_where_no_secret_can_be_made_the_way_out_is_named(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(SecretError, match="set DTRAIN_SECRET_FILE"):
        secret.job_secret({"XDG_STATE_HOME": str(blocked)})


# ---- keys


def test_hkdf_is_rfc_5869(monkeypatch):
    """Test case 1 of the RFC; its first 32 bytes are the first block."""
    monkeypatch.setattr(keys, "_SALT", bytes(range(13)))
    output = keys.hkdf(b"\x0b" * 22, bytes(range(0xF0, 0xFA)))
    assert output.hex() == "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf"


def test_every_role_run_attempt_and_secret_has_keys_of_its_own(monkeypatch):
    seen = set()
    for run, attempt, content in [
        ("a", 0, SECRET),
        ("a", 1, SECRET),
        ("b", 0, SECRET),
        ("a", 0, b"y" * 32),
    ]:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", run)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
        assert keys.store_keys(content) == keys.store_keys(content)
        seen |= {pair.public for pair in keys.store_keys(content)}
    assert len(seen) == 8


def test_a_pair_does_not_show_its_secret_half():
    pair = keys.fresh_keys()
    assert pair.secret.decode() not in f"{pair} {pair!r}"


# ---- listening


@contextmanager
def a_socket(kind=zmq.DEALER):
    context = security.context()
    try:
        yield context, security.open_socket(context, kind)
    finally:
        context.destroy(linger=0)


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
        sock.send(b"open up")
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


def test_a_client_that_says_nothing_does_not_stop_the_store():
    pair = security.store_keys()
    with (
        StoreServer() as server,
        TcpStore("127.0.0.1", server.port, timeout=10) as client,
        a_socket() as (_, silent),
    ):
        monitor = silent.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
        security.connect(silent, server.address, pair.client, pair.server.public)
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


# ---- rubbish from those who may enter

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
                transport._outbox.send_multipart([transport._ids[1], *frames])
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
    pair = security.store_keys()
    with (
        StoreServer() as server,
        TcpStore("127.0.0.1", server.port, timeout=10) as client,
        a_socket() as (_, member),
    ):
        security.connect(member, server.address, pair.client, pair.server.public)
        member.send(pack(Header(0, tag=3), dumps(request_)))
        assert member.poll(5000)
        kind, *_ = unpack(member.recv())[0]
        assert kind == tcp._ERROR
        client.set("k", "v")
        assert client.get("k") == b"v"


def test_a_wait_for_ever_is_a_long_one():
    pair = security.store_keys()
    with (
        StoreServer() as server,
        TcpStore("127.0.0.1", server.port, timeout=10) as client,
        a_socket() as (_, member),
    ):
        security.connect(member, server.address, pair.client, pair.server.public)
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
