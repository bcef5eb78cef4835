"""The stores under torch's names: the same conformance, torch's arguments, workers that are waited
for.
"""

from __future__ import annotations

import socket
import threading
from contextlib import ExitStack, contextmanager
from datetime import timedelta

import pytest

import dtrain.distributed as dist
from dtrain.errors import StoreTimeout
from dtrain.testing.store_conformance import STORE_CHECKS


@contextmanager
def clients(kind, path):
    """Gives a function that returns one more client of one fresh store."""
    with ExitStack() as stack:
        if kind == "TCPStore":
            master = stack.enter_context(dist.TCPStore("127.0.0.1", 0, None, True))
            yield lambda: stack.enter_context(dist.TCPStore(master.host, master.port, timeout=10))
        elif kind == "FileStore":
            yield lambda: stack.enter_context(dist.FileStore(f"{path}/store", 2, timeout=10))
        else:
            store = dist.HashStore()
            store.set_timeout(10)
            yield lambda: store if kind == "HashStore" else dist.PrefixStore("p", store)


@pytest.mark.parametrize("check", ["handles many keys", "queues", "clones", "barrier"])
@pytest.mark.parametrize("kind", ["TCPStore", "FileStore", "HashStore", "PrefixStore"])
def test_conformance(kind, check, tmp_path):
    with clients(kind, tmp_path) as connect:
        STORE_CHECKS[check](connect)


def test_the_master_waits_for_its_workers():
    made = []

    def master():
        with dist.TCPStore("127.0.0.1", port, 2, True, timedelta(seconds=20)) as store:
            made.append(store.timeout)
            store.wait(["bye"])

    with dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) as holder:
        port = holder.port  # free again when the holder closes; only this test binds it
    thread = threading.Thread(target=master)
    thread.start()
    with dist.TCPStore("127.0.0.1", port, 2, timeout=timedelta(seconds=20)) as worker:
        worker.set("bye", "")
        thread.join(20)
    assert made == [timedelta(seconds=20)]


def test_a_worker_that_does_not_come():
    with pytest.raises(StoreTimeout, match="missing keys: dtrain/all_workers"):
        dist.TCPStore("127.0.0.1", 0, 2, True, timedelta(milliseconds=50))


def test_a_socket_that_listens_already_is_served():
    """Nobody can take the port between choosing and using it; the caller's socket stays open."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port, fd = listening.getsockname()[1], listening.fileno()
        with (
            dist.TCPStore("127.0.0.1", port, is_master=True, master_listen_fd=fd) as server,
            dist.TCPStore("127.0.0.1", port) as client,
        ):
            assert server.port == port
            server.set("k", "v")
            assert client.get("k") == b"v"
        assert listening.fileno() == fd


def test_only_a_loopback_socket_that_listens_is_served():
    with socket.socket() as idle, pytest.raises(ValueError, match="not a socket that listens"):
        dist.TCPStore("127.0.0.1", 0, is_master=True, master_listen_fd=idle.fileno())
    with socket.socket() as wide:
        wide.bind(("0.0.0.0", 0))
        wide.listen()
        with pytest.raises(dist.DistNetworkError, match=r"0\.0\.0\.0"):
            dist.TCPStore("127.0.0.1", 0, is_master=True, master_listen_fd=wide.fileno())


def test_underlying_stores():
    store = dist.HashStore()
    outer = dist.PrefixStore("a", dist.PrefixStore("b", store))
    outer.set("k", "v")
    assert outer.underlying_store.underlying_store is store
    assert store.list_keys() == ["b/a/k"]
    assert outer.list_keys() == ["k"]
    assert isinstance(outer, dist.Store)
