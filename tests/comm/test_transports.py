"""Transports: one conformance suite over all of them, and what is special about each."""

from __future__ import annotations

import gc
import os
import re
import socket
import stat
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import zmq

from dtrain.comm import security
from dtrain.comm.collectives import Barrier
from dtrain.comm.group import ProcessGroup
from dtrain.comm.security import listening
from dtrain.comm.store.memory import MemoryStore
from dtrain.comm.store.prefix import PrefixStore
from dtrain.comm.transports import base, local
from dtrain.comm.transports.local import LocalTransport
from dtrain.comm.transports.zmq import ZmqTransport
from dtrain.errors import DistNetworkError, ForkedProcessError, PeerLost, StoreTimeout
from dtrain.testing.conformance import TRANSPORT_CHECKS, check_transport
from dtrain.testing.world import run_ranks, run_world

TRANSPORTS = {
    "local": "local",
    "shm": "shm",
    "unix": "unix",
    "zmq": "zmq",
    "tcp": "tcp",
}


@pytest.mark.parametrize("check", TRANSPORT_CHECKS)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_conformance(transport, check):
    check_transport(TRANSPORTS[transport], sizes=(1, 2, 3), checks=[check])


def test_the_suite_catches_a_transport_that_loses_messages():
    class Lossy(LocalTransport):
        def _send(self, dst, tag, buf, note):
            if buf.nbytes != 100:
                super()._send(dst, tag, buf, note)

    with pytest.raises(AssertionError):
        run_world(2, lambda group: _moves(group.transport), transport=Lossy)


def _moves(transport):
    """The message of 100 bytes is missing, so that the next one is found in its place."""
    for nbytes in (1, 100, 200):
        transport.send(1 - transport.rank, 0, np.zeros(nbytes, np.uint8))
    for nbytes in (1, 100, 200):
        out = np.zeros(nbytes, np.uint8)
        try:
            transport.recv_into(1 - transport.rank, 0, out, 1e18)
        except RuntimeError as error:
            raise AssertionError(str(error)) from error


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(
        ValueError, match=re.escape("unknown transport 'smh' (known: local, shm, tcp, unix, zmq)")
    ):
        ProcessGroup(MemoryStore(), 0, 1, transport="smh")


def test_a_registered_transport_is_found_by_name(monkeypatch):
    monkeypatch.setattr(base, "_factories", dict(base._factories))
    base.register("mine", LocalTransport)
    assert base.known() == ["local", "mine", "shm", "tcp", "unix", "zmq"]
    run_world(2, lambda group: group.submit(Barrier()), transport="mine")


def test_ranks_that_do_not_come_are_named():
    with pytest.raises(StoreTimeout) as caught:
        ProcessGroup(MemoryStore(), 1, 3, transport="zmq", timeout=0.05)
    assert caught.value.ranks == [0, 2]


def test_local_refuses_ranks_of_other_processes():
    store = MemoryStore(5)
    rendezvous = base.dumps([base.host_id(), os.getpid() + 1, "elsewhere"])

    class Stranger(MemoryStore):
        def _gather(self, key, rank, size, value, timeout):
            return [value, rendezvous]

    del store
    with pytest.raises(DistNetworkError, match="ranks \\[1\\] live in other processes"):
        LocalTransport(Stranger(), 0, 2, 1.0)


class OtherHosts(PrefixStore):
    """As if rank r ran on host r % 2."""

    def _gather(self, key, rank, size, value, timeout):
        values = super()._gather(key, rank, size, value, timeout)
        if not key.endswith("transport"):
            return values
        told = [base.loads(value) for value in values]
        hosts = [base.host_id() if (r - rank) % 2 == 0 else "elsewhere" for r in range(size)]
        return [base.dumps([host, *rest[1:]]) for host, rest in zip(hosts, told, strict=True)]


def on_two_hosts(store, rank, size, timeout):
    return ZmqTransport(OtherHosts("two hosts", store), rank, size, timeout)


@pytest.mark.parametrize("check", TRANSPORT_CHECKS)
def test_conformance_on_two_hosts(check, monkeypatch):
    monkeypatch.setenv("DTRAIN_LOCAL_ADDR", "127.0.0.1")
    check_transport(on_two_hosts, sizes=(2, 3), checks=[check])


def test_between_hosts_ranks_meet_over_tcp_and_on_one_over_unix_sockets(monkeypatch):
    monkeypatch.setenv("DTRAIN_LOCAL_ADDR", "127.0.0.1")

    def look(group):
        group.submit(Barrier())
        return sorted(group.transport._far)

    assert run_world(3, look, transport=on_two_hosts) == [[1], [0, 2], [1]]


def test_several_hosts_without_an_address_are_told_what_to_set(monkeypatch):
    monkeypatch.delenv("DTRAIN_LOCAL_ADDR", raising=False)
    with pytest.raises(DistNetworkError, match="set DTRAIN_LOCAL_ADDR on each host"):
        run_world(2, lambda group: None, transport=on_two_hosts)


def test_a_unix_socket_lies_in_a_private_directory_that_goes_away():
    def look(group):
        directory = group.transport._listener.directory
        group.submit(Barrier())
        return str(directory), stat.S_IMODE(directory.stat().st_mode)

    for directory, mode in run_world(2, look, transport="zmq"):
        assert mode == 0o700
        assert not Path(directory).exists()


def test_a_long_temporary_directory_does_not_break_unix_sockets(tmp_path, monkeypatch):
    long = tmp_path / ("d" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    run_world(2, lambda group: group.submit(Barrier()), transport="zmq")


def test_what_a_killed_process_left_is_swept(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    listening._sweep.cache_clear()
    no_such_process = 2**22 + 1  # above the kernel's largest process id
    dead, live, mine = (
        tmp_path / name
        for name in (
            f"dtrain-{no_such_process}-a",
            f"dtrain-{no_such_process}-b",
            f"dtrain-{os.getpid()}-c",
        )
    )
    socks = [socket.socket(socket.AF_UNIX) for _ in range(3)]
    for directory, sock in zip((dead, live, mine), socks, strict=True):
        directory.mkdir(mode=0o700)
        sock.bind(str(directory / "s"))
    socks[1].listen()
    for sock in (socks[0], socks[2]):
        sock.close()
    listening._sweep(str(tmp_path))
    socks[1].close()
    assert [directory.exists() for directory in (dead, live, mine)] == [False, True, True]


def test_a_forked_child_is_told_so_and_the_parent_goes_on():
    def fork(group):
        if group.rank == 0:
            _in_child(lambda: group.submit(Barrier()))
        group.submit(Barrier())

    for transport in ("local", "shm", "unix", "zmq"):
        run_world(2, fork, transport=transport)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def _in_child(call):
    """Run `call` in a forked child, which must get a ForkedProcessError."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            call()
        except ForkedProcessError:
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


def test_a_stranger_in_the_inbox_is_ignored(caplog):
    def meet(group):
        group.submit(Barrier())
        if group.rank == 0:
            context = security.context()
            stranger = security.open_socket(context, zmq.DEALER)
            stranger.connect(group.transport._peers[1].address)
            stranger.send_multipart([b"hello", b"world"])
            stranger.send(zmq.Frame(b"DTR1" + bytes(60)))
            context.destroy(linger=1000)
        group.submit(Barrier())
        group.submit(Barrier())

    run_world(2, meet, transport="zmq")
    assert {record.message for record in caplog.records} <= {
        "rank 1 ignored a message that does not belong to its job, and counts others"
    }


def test_a_large_message_is_chunked_and_counted_once():
    """12 MiB are six chunks, one message."""

    def exchange(group):
        transport, other = group.transport, 1 - group.rank
        buf = np.arange(3 << 20, dtype=np.int32) + group.rank
        out = np.zeros_like(buf)
        receive = transport.post(other, 0, out)
        transport.send(other, 0, buf)
        transport.wait(receive, 1e18)
        transport.flush(1e18)
        buf[:] = -1
        assert (out == np.arange(3 << 20) + other).all()
        counts = transport.messages_sent, transport.bytes_sent
        group.submit(Barrier())
        return counts

    for transport in ("local", "zmq"):
        assert run_world(2, exchange, transport=transport) == [(1, 12 << 20)] * 2


def dies_holding_a_socket(group, victim):
    """The victim kills itself; the others say who is lost, and how long they took to see it."""
    transport = group.transport
    if group.rank == victim:
        for peer in {0, 1, 2} - {victim}:
            transport.recv_into(peer, 1, np.zeros(1), base.time.monotonic() + 20)
        os.kill(os.getpid(), 9)
    transport.send(victim, 1, np.zeros(1))
    started = base.time.monotonic()
    try:
        group.transport.recv_into(victim, 7, np.zeros(1), started + 20)
    except PeerLost as loss:
        return [loss.rank, loss.orderly, base.time.monotonic() - started]


def test_sigkill_is_seen_within_a_second_and_leaves_no_socket_behind():
    before = set(Path(tempfile.gettempdir()).glob("dtrain-*"))
    outcomes = run_ranks(3, dies_holding_a_socket, 1, transport="zmq", processes=True)
    assert outcomes[1].status == -9
    for rank in (0, 2):
        lost, orderly, seconds = outcomes[rank].value
        assert (lost, orderly) == (1, False)
        assert seconds < 1.0
    pids = {
        path.name.split("-")[1]
        for path in set(Path(tempfile.gettempdir()).glob("dtrain-*")) - before
    }
    assert not {pid for pid in pids if not Path(f"/proc/{pid}").exists()}


def test_a_rank_that_leaves_at_once_is_not_in_the_way_of_one_that_is_still_arriving(monkeypatch):
    """Rank 1 looks its peers up when rank 0 has come, sent, left and is gone from memory."""
    gone, look_up = threading.Event(), local.rendezvous

    def late(store, rank, *rest):
        peers = look_up(store, rank, *rest)
        if rank == 1:
            assert gone.wait(20)
            gc.collect()
        return peers

    monkeypatch.setattr(local, "rendezvous", late)
    store, got = MemoryStore(20.0), np.zeros(3)

    def first():
        transport = LocalTransport(store, 0, 2, 20.0)
        transport.send(1, 0, np.ones(3))
        transport.close()
        del transport
        gone.set()

    thread = threading.Thread(target=first)
    thread.start()
    transport = LocalTransport(store, 1, 2, 20.0)
    thread.join(20)
    assert transport.recv_into(0, 0, got, time.monotonic() + 20) == 0
    assert got.tolist() == [1.0, 1.0, 1.0]
    with pytest.raises(PeerLost) as lost:
        transport.send(0, 0, got)
    assert lost.value.orderly
    transport.close()


class _LateTracker:
    """Says that a frame has been let go when it is asked for the second time."""

    done = False

    def __init__(self, looks):
        self.looks = looks

    def wait(self, timeout):
        self.looks -= 1
        if self.looks > 0:
            raise zmq.NotDone


@pytest.mark.parametrize(("how", "looks"), [("close", 2), ("close", 9), ("abandon", 2)])
def test_who_got_everything_and_left_is_not_missed_by_a_flush(how, looks):
    """The tracker of a frame may be told later than its receiver has left; of one who did not get
    it, or died, it is never told.
    """

    def part(group):
        transport = group.transport
        if group.rank == 1:
            getattr(transport, how)()
            return None
        with pytest.raises(PeerLost):
            transport.recv_into(1, 0, np.zeros(1), time.monotonic() + 10)
        transport._in_flight.append((1, _LateTracker(looks)))
        try:
            transport.flush(time.monotonic() + 10)
        except PeerLost as loss:
            return loss.orderly
        return "sent"

    expected = {("close", 2): "sent", ("close", 9): True, ("abandon", 2): False}
    assert run_world(2, part, transport="zmq")[0] == expected[how, looks]
