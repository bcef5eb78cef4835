"""How rpc begins and ends: names, shutdown, workers that fail, die, or are not there."""

from __future__ import annotations

import os
import signal
import threading

import pytest

import dtrain as torch
from dtrain.distributed import rpc
from dtrain.errors import DistError, PeerLost
from dtrain.testing.distributed import run_distributed
from dtrain.testing.world import run_ranks
from tests.distributed.rpc.test_calls import Mistake, ping_pong
from tests.distributed.rpc.worlds import add, echo, world

_gate = threading.Event()


def test_before_init_and_twice():
    with pytest.raises(RuntimeError, match="RPC has not been initialized"):
        rpc.rpc_sync("w1", echo, (1,))

    def main():
        with pytest.raises(RuntimeError, match="already initialized"):
            rpc.init_rpc("again")

    world(1, main)


def test_names_are_checked():
    with pytest.raises(ValueError, match="Worker name must match"):
        rpc.init_rpc("a b")

    def both():
        with pytest.raises(ValueError, match=r"'same' is not unique: ranks \[0, 1\]"):
            rpc.init_rpc("same")

    run_distributed(2, both)


def test_shutdown_after_its_timeout_says_who_owes_what():
    def main():
        rank = torch.distributed.get_rank()
        rpc.init_rpc(f"w{rank}")
        if rank == 0:
            with pytest.raises(DistError, match=r"others have not called shutdown.*'w1'"):
                rpc.shutdown(timeout=0.2)
            _gate.set()
        else:
            _gate.wait(20)
            rpc.shutdown(graceful=False)

    _gate.clear()
    run_distributed(2, main)


def test_a_rank_that_fails_holds_up_nobody():
    def main():
        if torch.distributed.get_rank() == 0:
            raise Mistake("not yours", 1)

    def ranks():
        rpc.init_rpc(f"w{torch.distributed.get_rank()}")
        main()
        rpc.shutdown()

    with pytest.raises(Mistake):
        run_distributed(3, ranks, timeout=15)


def in_processes(how):
    rank = torch.distributed.get_rank()
    rpc.init_rpc(f"w{rank}")
    if rank == 0:
        large = torch.arange(3_000_000, dtype=torch.float32)  # several chunks
        assert torch.equal(rpc.rpc_sync("w1", echo, (large,)), large)
        assert rpc.rpc_sync("w1", ping_pong, (3,)) == "w0"
        assert [f.wait() for f in [rpc.rpc_async("w1", add, (i, 1)) for i in range(300)]][-1] == 300
        held = rpc.remote("w1", echo, (1,))
        assert held.to_here() == 1
    if how == "killed":
        if rank == 0:
            killed(held)
        else:
            threading.Event().wait(20)
    rpc.shutdown(timeout=20)


def killed(held):
    with pytest.raises(PeerLost, match=r"call of .*\.die: worker 'w1'"):
        rpc.rpc_sync("w1", die, timeout=0)
    with pytest.raises(PeerLost, match="worker 'w1'"):
        held.to_here()
    with pytest.raises(PeerLost, match="worker 'w1'"):
        rpc.rpc_sync("w1", echo, (1,))


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def test_processes_over_sockets():
    run_distributed(2, in_processes, "well", transport="zmq", processes=True)


def killing(group, how):
    from dtrain.testing.distributed import joined

    with joined(group):
        in_processes(how)


def test_a_killed_worker_fails_calls_at_once_and_holds_up_no_shutdown():
    outcomes = run_ranks(2, killing, "killed", transport="zmq", processes=True, timeout=30)
    assert outcomes[0].error is None
    assert outcomes[1].status == -signal.SIGKILL


def process():
    return os.getpid()


def stopping():
    rank = torch.distributed.get_rank()
    rpc.init_rpc(f"w{rank}")
    if rank == 0:
        other = rpc.rpc_sync("w1", process)
        os.kill(other, signal.SIGSTOP)
        try:
            with pytest.raises(rpc.RpcTimeout, match="add on worker 'w1' has not answered"):
                rpc.rpc_sync("w1", add, (1, 2), timeout=0.3)
            later = rpc.rpc_async("w1", add, (3, 4))
        finally:
            os.kill(other, signal.SIGCONT)
        assert later.wait() == 7
    rpc.shutdown(timeout=20)


def test_a_stopped_worker_is_not_a_dead_one():
    run_distributed(2, stopping, transport="zmq", processes=True)
