"""Open worlds: workers that join and leave, die and come back under their name."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress

import pytest

import dtrain as torch
from dtrain.comm.store.tcp import StoreServer
from dtrain.distributed import rpc
from dtrain.distributed.world import own_world
from dtrain.errors import DistError, PeerLost
from tests.distributed.rpc.worlds import add, echo, until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="over unix sockets")


@contextmanager
def worker(url, name, rank=-1, **options):
    """This thread is the worker `name` inside the block."""
    with own_world():
        over = ["tcp"] if url.startswith("tcp:") else None
        settings = rpc.TensorPipeRpcBackendOptions(
            init_method=url, rpc_timeout=20, _transports=over
        )
        rpc.init_rpc(name, rank=rank, rpc_backend_options=settings, **options)
        yield rpc.get_worker_info().id
        if rpc.current.installed() is not None:
            rpc.shutdown(timeout=10)


class Other(threading.Thread):
    """Another worker, until `leave` (or `vanish`, without a word)."""

    def __init__(self, url, name, **options):
        super().__init__()
        self.url, self.name_, self.options = url, name, options
        self.here, self.end, self.how = threading.Event(), threading.Event(), "leave"
        self.failure = None
        self.start()
        assert self.here.wait(20)

    def run(self):
        try:
            with worker(self.url, self.name_, **self.options) as self.rank:
                self.agent = rpc.current.agent()
                self.here.set()
                self.end.wait(60)
                if self.how == "vanish":
                    self.agent._line._transport.abandon()
                    rpc.shutdown(graceful=False)
        except BaseException as error:
            self.failure = error
            self.here.set()

    def go(self, how="leave"):
        self.how = how
        self.end.set()
        self.join(20)
        assert not self.is_alive()


@pytest.fixture(params=["unix", "tcp"])
def url(request, tmp_path):
    if request.param == "unix":
        yield f"file://{tmp_path}/store"
        return
    with StoreServer() as server:
        yield f"tcp://127.0.0.1:{server.port}"


def whoami():
    return list(rpc.get_worker_info())


def ask(to):
    return rpc.rpc_sync(to, whoami)


def test_workers_join_are_found_by_name_and_leave(url):
    with worker(url, "first") as rank:
        assert rank == 0
        with pytest.raises(
            ValueError, match=r"Unknown destination worker b \(known: \['first'\]\)"
        ):
            rpc.rpc_sync("b", whoami)
        b = Other(url, "b")
        assert rpc.rpc_sync("b", whoami) == ["b", 1]
        c = Other(url, "c")
        assert rpc.rpc_sync("b", ask, ("c",)) == ["c", 2]  # the later one is found by the earlier
        assert rpc.rpc_sync("c", ask, ("b",)) == ["b", 1]
        x = torch.ones(100_000)
        assert torch.equal(rpc.rpc_sync("c", echo, (x,)), x)
        b.go()
        with pytest.raises(PeerLost, match="worker 'b'"):
            rpc.rpc_sync("b", whoami)
        assert rpc.rpc_sync("c", add, (1, 2)) == 3
        c.go()


def test_many_join_at_once(url):
    with worker(url, "first"):
        threads, others = [], []
        for i in range(5):
            threads.append(threading.Thread(target=lambda i=i: others.append(Other(url, f"w{i}"))))
            threads[-1].start()
        for thread in threads:
            thread.join(20)
        assert sorted(other.rank for other in others) == [1, 2, 3, 4, 5]
        for i in range(5):
            assert rpc.rpc_sync(f"w{i}", ask, (f"w{(i + 1) % 5}",))[0] == f"w{(i + 1) % 5}"
        for other in others:
            other.go()


def test_who_vanishes_comes_back_as_somebody_new(url):
    with worker(url, "first"):
        b = Other(url, "b")
        held = rpc.remote("b", echo, (1,))
        assert held.to_here() == 1
        mine = rpc.RRef("mine")
        rpc.rpc_sync("b", hold, (mine,))
        until(lambda: list(rpc.get_debug_info()["owned"].values()) == [["b"]])
        b.go("vanish")
        with pytest.raises(PeerLost):
            rpc.rpc_sync("b", whoami)
        with pytest.raises(PeerLost):
            held.to_here()
        until(lambda: list(rpc.get_debug_info()["owned"].values()) == [[]])
        again = Other(url, "b")
        assert rpc.rpc_sync("b", whoami) == ["b", 2]
        with pytest.raises(PeerLost):  # what it had is gone with it
            held.to_here()
        again.go()
        kept.clear()


kept = []


def hold(reference):
    kept.append(reference)


def test_names_and_ranks_belong_to_one(url):
    with worker(url, "first", rank=3) as rank:
        assert rank == 3
        b = Other(url, "first")
        assert isinstance(b.failure, ValueError)
        assert "'first' is not unique: rank 3 has it" in str(b.failure)
        c = Other(url, "c", rank=3)
        assert "rank 3 is taken" in str(c.failure)
        d = Other(url, "d")
        assert rpc.rpc_sync("d", add, (1, 1)) == 2
        d.go()


def test_shutdown_waits_for_what_is_under_way_and_says_so(url):
    with worker(url, "first"):
        b = Other(url, "b")
        _gate.clear()
        future = rpc.rpc_async("b", wait_for)
        with pytest.raises(DistError, match=r"it waits for .*wait_for on 'b'"):
            rpc.shutdown(timeout=0.2)
        _gate.set()
        with pytest.raises(PeerLost):
            future.wait()
        b.go()


_gate = threading.Event()


def wait_for():
    _gate.wait(20)


PROGRAM = """
import sys, threading
from dtrain.distributed import rpc
over = ["tcp"] if sys.argv[1].startswith("tcp:") else None
settings = rpc.TensorPipeRpcBackendOptions(init_method=sys.argv[1], _transports=over)
rpc.init_rpc(sys.argv[2], rpc_backend_options=settings)
print("here", flush=True)
threading.Event().wait(30)
"""


def test_processes_that_are_killed_and_started_again(url):
    with worker(url, "first"):
        for _ in range(2):
            command = [sys.executable, "-c", PROGRAM, url, "b"]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as b:
                assert b.stdout.readline() == "here\n"
                assert rpc.rpc_sync("b", torch.add, (torch.ones(1), 1)).tolist() == [2]
                waiting = rpc.rpc_async("b", torch.add, (torch.ones(20_000), 1))
                os.kill(b.pid, signal.SIGKILL)
                with suppress(PeerLost):  # an answer or an error
                    assert waiting.wait()[0] == 2
                with pytest.raises(PeerLost):
                    rpc.rpc_sync("b", torch.add, (torch.ones(1), 1))
