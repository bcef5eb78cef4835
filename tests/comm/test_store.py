"""Stores: one conformance suite over all kinds, and what is special about each."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
import zmq

from dtrain.comm import security
from dtrain.comm.store import tcp
from dtrain.comm.store.base import Store
from dtrain.comm.store.file import FileStore
from dtrain.comm.store.last_words import LastWords
from dtrain.comm.store.memory import MemoryStore
from dtrain.comm.store.prefix import PrefixStore
from dtrain.comm.store.tcp import StoreServer, TcpStore
from dtrain.errors import DistNetworkError, DistStoreError, StoreTimeout
from dtrain.testing.store_conformance import STORE_CHECKS, Connect

KINDS = ("memory", "tcp", "file", "prefix")


@contextmanager
def clients(kind: str, path: object) -> Iterator[Connect]:
    """Gives a function that returns one more client of one fresh store."""
    with ExitStack() as stack:
        if kind == "tcp":
            master = stack.enter_context(TcpStore("127.0.0.1", 0, is_master=True, timeout=10))
            port = master.port
            yield lambda: stack.enter_context(TcpStore("127.0.0.1", port, timeout=10))
        elif kind == "file":
            yield lambda: stack.enter_context(FileStore(f"{path}/store", timeout=10))
        else:
            memory = MemoryStore(10)
            yield lambda: memory if kind == "memory" else PrefixStore("part", memory)


@pytest.mark.parametrize("check", STORE_CHECKS)
@pytest.mark.parametrize("kind", KINDS)
def test_conformance(kind, check, tmp_path):
    with clients(kind, tmp_path) as connect:
        STORE_CHECKS[check](connect)


def test_the_suite_catches_a_store_that_forgets():
    class Forgetful(MemoryStore):
        def delete_key(self, key: str) -> bool:
            return True

    store = Forgetful(1)
    with pytest.raises(AssertionError):
        STORE_CHECKS["keeps values"](lambda: store)


def test_prefixes_do_not_meet():
    store = MemoryStore(1)
    one, two = PrefixStore("a", store), PrefixStore("b", PrefixStore("a", store))
    one.set("k", "1")
    two.set("k", "2")
    assert (one.get("k"), two.get("k"), store.get("a/k"), store.get("a/b/k")) == (
        b"1",
        b"2",
        b"1",
        b"2",
    )


def test_port_0_is_a_real_port_and_a_taken_one_is_refused():
    with TcpStore("127.0.0.1", 0, is_master=True) as store:
        assert store.port > 0
        with pytest.raises(
            DistNetworkError, match=f"cannot listen on tcp://127.0.0.1:{store.port}"
        ):
            TcpStore("127.0.0.1", store.port, is_master=True)


def test_a_client_waits_for_a_master_that_starts_later():
    with StoreServer() as first:
        port = first.port
    with TcpStore("127.0.0.1", port, timeout=20) as client:
        result: list[bytes] = []
        waiting = threading.Thread(target=lambda: result.append(client.get("key")))
        waiting.start()
        with TcpStore("127.0.0.1", port, is_master=True) as master:
            master.set("key", "value")
            waiting.join(20)
        assert result == [b"value"]


def test_nobody_there_is_a_timeout_that_names_the_address(monkeypatch):
    monkeypatch.setattr(tcp, "_ANSWER_TIME", 0.0)
    with StoreServer() as server:
        port = server.port
    with (
        TcpStore("127.0.0.1", port) as client,
        pytest.raises(StoreTimeout, match=f"no answer from the store at tcp://127.0.0.1:{port}"),
    ):
        client.get("key", 0.1)


def test_a_master_that_closes_wakes_its_clients():
    master = TcpStore("127.0.0.1", 0, is_master=True)
    errors: list[BaseException] = []
    with TcpStore("127.0.0.1", master.port) as client:
        client.set("here", "")

        def wait() -> None:
            try:
                client.get("never", 30)
            except DistStoreError as error:
                errors.append(error)

        waiting = threading.Thread(target=wait)
        waiting.start()
        started = time.monotonic()
        master.close()
        waiting.join(10)
    assert time.monotonic() - started < 5
    assert "has closed the connection" in str(errors[0])


def test_waiting_in_the_server_costs_no_messages(monkeypatch):
    """A parked command is answered by whoever makes it possible: one request, one reply."""
    with TcpStore("127.0.0.1", 0, is_master=True) as store:
        handled: list[tuple[object, ...]] = []
        handle = StoreServer._handle
        monkeypatch.setattr(
            StoreServer, "_handle", lambda self, *args: (handled.append(args), handle(self, *args))
        )
        waiting = threading.Thread(target=lambda: store.get("key", 10))
        waiting.start()
        while not handled:
            time.sleep(0.001)
        store.set("key", "")
        waiting.join(10)
        assert len(handled) == 2


def test_a_malformed_request_does_not_hurt_the_server():
    with TcpStore("127.0.0.1", 0, is_master=True, timeout=5) as store:
        with pytest.raises(DistStoreError, match="unknown store command 'drop'"):
            store._call("drop", [], 1.0)
        with pytest.raises(DistStoreError, match="bad request"):
            store._call("set", [], 1.0)
        with pytest.raises(DistStoreError, match="bad request"):
            store._call("collect", ["never", 0, 0], 1.0)
        store.set("key", "value")
        assert store.get("key") == b"value"


def test_a_file_of_another_run_is_started_afresh(tmp_path):
    path = tmp_path / "store"
    with FileStore(path, run_id="one") as old:
        old.set("key", "old")
        with FileStore(path, run_id="two") as new:
            assert new.num_keys() == 0
            new.set("key", "new")
            with pytest.raises(DistStoreError, match="taken over by another run"):
                old.get("key")
    with FileStore(path, run_id="two") as again:
        assert again.get("key") == b"new"


def test_a_half_written_command_is_cut_off(tmp_path):
    path = tmp_path / "store"
    with FileStore(path) as store:
        store.set("a", "1")
        whole = path.read_bytes()
        store.set("b", "2" * 100)
    path.write_bytes(path.read_bytes()[:-7])
    with FileStore(path) as store:
        assert store.get("a") == b"1"
        assert not store.check(["b"])
        store.set("c", "3")
    with FileStore(path) as store:
        assert store.get("c") == b"3"
    assert path.read_bytes().startswith(whole)


def test_a_file_that_is_no_store_is_not_read_as_one(tmp_path):
    path = tmp_path / "store"
    path.write_bytes(b"\x01\x02 something else")
    with pytest.raises(DistStoreError, match="is not a store"):
        FileStore(path)
    assert path.read_bytes() == b"\x01\x02 something else"


def test_closed_stores_say_so(tmp_path):
    stores: list[Store] = [
        TcpStore("127.0.0.1", 0, is_master=True),
        FileStore(tmp_path / "store"),
    ]
    for store in stores:
        store.close()
        store.close()
        with pytest.raises(DistStoreError, match="is closed"):
            store.set("key", "value")


def test_the_last_word_of_a_client_is_said_when_it_ends_and_no_sooner():
    with TcpStore("127.0.0.1", 0, is_master=True, timeout=10) as master:
        clients = {name: master.clone() for name in (b"one", b"two")}
        for name, client in clients.items():
            client.leave_last_word("gone", name)
        for _ in range(20):  # their descriptors are used again and again
            with master.clone() as other:
                other.set("k", "v")
        assert master.queue_len("gone") == 0
        for name, client in clients.items():
            client.close()
            assert master.queue_pop("gone") == name
            assert master.queue_len("gone") == 0


def test_the_last_word_of_a_connection_that_broke_before_is_said_at_once():
    context = security.context()
    try:
        router = security.open_socket(context, zmq.ROUTER)
        words = LastWords(router)
        words.keep(99, "gone", b"late")
        assert words.due() == [("gone", b"late")]
        assert words.due() == []
    finally:
        context.destroy(linger=0)
