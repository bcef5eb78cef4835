"""Calls between workers: values, errors, timeouts, nesting, references, shutdown.

Workers are threads over `local`, or processes over sockets where it says so.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import threading
from concurrent.futures import CancelledError
from datetime import timedelta
from unittest.mock import ANY

import numpy as np
import pytest

import dtrain as torch
from dtrain.distributed import rpc
from dtrain.distributed.world import current_world
from dtrain.tape import Tape
from tests.distributed.rpc.worlds import add, echo, until, world


def whoami():
    return rpc.get_worker_info().name


class Mistake(Exception):
    def __init__(self, what, code):
        super().__init__(what, code)


def fail():
    raise Mistake("no luck", 7)


@dataclasses.dataclass
class Point:
    x: int
    y: torch.Tensor


class Counter:
    def __init__(self, start=0):
        self.n = start

    def up(self, by=1):
        self.n += by
        return self.n

    @classmethod
    def kind(cls):
        return cls.__name__


@pytest.mark.parametrize("over", [None, "unix", "zmq", "tcp"])
def test_plain_data_tensors_arrays_and_dataclasses_come_back_equal(over):
    def main():
        large = torch.arange(100_000, dtype=torch.float32)
        got = rpc.rpc_sync("w1", echo, ({"a": (1, [2.5, None]), "b": large, 3: {4}},))
        assert torch.equal(got.pop("b"), large)
        assert got == {"a": (1, [2.5, None]), 3: {4}}
        assert rpc.rpc_sync("w1", echo, (np.arange(5),)).tolist() == [0, 1, 2, 3, 4]
        point = rpc.rpc_sync("w1", echo, (Point(1, torch.ones(3)),))
        assert type(point) is Point
        assert point.y.tolist() == [1, 1, 1]
        assert rpc.rpc_sync("w1", echo, ("x" * 300_000,)) == "x" * 300_000
        assert torch.equal(rpc.rpc_sync("w1", torch.add, (large, 1)), large + 1)

    world(2, main, over=over)


def test_a_worker_is_meant_by_name_rank_or_info_itself_too():
    def main():
        assert rpc.rpc_sync("w1", whoami) == "w1"
        assert rpc.rpc_sync(1, whoami) == "w1"
        assert rpc.rpc_sync(rpc.get_worker_info("w1"), whoami) == "w1"
        assert rpc.rpc_sync("w0", whoami) == "w0"
        with pytest.raises(ValueError, match="Unknown destination worker w9"):
            rpc.rpc_sync("w9", whoami)

    world(2, main)


def test_an_error_comes_back_as_its_type_with_the_remote_traceback():
    def main():
        with pytest.raises(Mistake) as caught:
            rpc.rpc_sync("w1", fail)
        assert caught.value.args == ("no luck", 7)
        assert 'raise Mistake("no luck", 7)' in str(caught.value.__cause__)
        assert "raised on worker 'w1'" in caught.value.__notes__
        with pytest.raises(TypeError, match="unsupported operand"):
            rpc.rpc_sync("w1", add, (1, "a"))

    world(2, main)


def leave():
    raise SystemExit(3)


def test_a_remote_exit_ends_nobody():
    def main():
        with pytest.raises(rpc.RemoteError, match=r"worker 'w1' raised builtins.SystemExit: 3"):
            rpc.rpc_sync("w1", leave)

    world(2, main)


_gate = threading.Event()


def hold():
    _gate.wait(20)


def test_a_timeout_names_function_worker_and_time():
    def main():
        try:
            with pytest.raises(rpc.RpcTimeout, match=r"\(100 ms\).*hold on worker 'w1'"):
                rpc.rpc_sync("w1", hold, timeout=0.1)
        finally:
            _gate.set()

    _gate.clear()
    world(2, main)


def test_a_cancelled_call_that_has_not_begun_never_runs():
    def main():
        begun.clear()
        first = rpc.rpc_async("w1", hold)
        second = rpc.rpc_async("w1", mark)
        assert second.cancel()
        with pytest.raises(CancelledError):
            second.wait()
        rpc.rpc_async("w1", echo, (1,), timeout=0)  # behind the cancellation on its way
        _gate.set()
        first.wait()
        rpc.rpc_sync("w1", echo, (1,))
        assert not begun.is_set()

    _gate.clear()
    world(2, main, threads=1)


begun = threading.Event()


def mark():
    begun.set()


def ping_pong(depth):
    if depth == 0:
        return whoami()
    other = 1 - rpc.get_worker_info().id
    return rpc.rpc_sync(other, ping_pong, (depth - 1,))


def test_calls_nest_deeper_than_the_pool_is_large():
    def main():
        assert rpc.rpc_sync("w1", ping_pong, (12,)) == "w1"

    world(2, main, threads=1)


def test_remote_references():
    def main():
        reference = rpc.remote("w1", Counter, (5,))
        assert not reference.is_owner()
        assert reference.owner() == ("w1", 1)
        assert reference.rpc_sync().up() == 6
        assert reference.rpc_async().up(by=4).wait() == 10
        assert reference.remote().up().to_here() == 11
        assert rpc.rpc_sync("w1", Counter.kind) == "Counter"
        with pytest.raises(RuntimeError, match=r"local_value.. on a non-owner reference"):
            reference.local_value()
        with pytest.raises(TypeError, match="__reduce__ may not be called"):
            reference._agent.rpc_sync(1, rpc.rref.invoke, (reference, "__reduce__", (), {}), {}, 5)
        with pytest.raises(RuntimeError, match="only travel in the arguments"):
            pickle.dumps(reference)
        assert rpc.remote("w1", add, (1, 2)).to_here() == 3
        with pytest.raises(Mistake):
            rpc.remote("w1", fail).to_here()
        mine = rpc.RRef([1])
        assert mine.is_owner()
        assert mine.confirmed_by_owner()
        assert rpc.rpc_sync("w1", read, (mine,)) == [1]

    world(2, main)


def read(reference):
    return reference.to_here()


def pass_on(reference, to):
    return rpc.rpc_sync(to, read, (reference,))


kept = {}


def keep(reference):
    kept[rpc.get_worker_info().name] = reference


def forget():
    kept.pop(rpc.get_worker_info().name, None)


def owned():
    return rpc.get_debug_info()["owned"]


def test_a_value_lives_as_long_as_anybody_holds_it():
    def main():
        reference = rpc.remote("w1", echo, ("value",))
        assert rpc.rpc_sync("w2", pass_on, (reference, "w3")) == "value"
        rpc.rpc_sync("w3", keep, (reference,))
        until(lambda: rpc.rpc_sync("w1", owned) == {"0.0": ["w0", "w3"]})
        del reference
        until(lambda: rpc.rpc_sync("w1", owned) == {"0.0": ["w3"]})
        assert rpc.rpc_sync("w3", recall) == "value"
        rpc.rpc_sync("w3", forget)
        until(lambda: rpc.rpc_sync("w1", owned) == {})

    world(4, main)


def recall():
    return kept["w3"].to_here()


def test_what_may_not_be_called_is_refused_with_the_way_out():
    def main():
        with pytest.raises(TypeError, match=r"getcwd may not be called by other workers.*export"):
            rpc.rpc_sync("w1", os.getcwd)
        with pytest.raises(TypeError, match=r"lambda.*accept_code=True"):
            rpc.rpc_sync("w1", lambda: 1)
        with pytest.raises(
            TypeError, match=r"argument 0 of .*echo, at \['a'\]: .*object cannot be sent"
        ):
            rpc.rpc_sync("w1", echo, ({"a": object()},))
        with pytest.raises(TypeError, match=r"result.*_thread.lock cannot be sent"):
            rpc.rpc_sync("w1", lock)

    world(2, main)


def lock():
    return threading.Lock()


def test_code_travels_to_those_who_accept_it():
    def main():
        n = 5
        assert rpc.rpc_sync("w1", lambda x: x + n, (2,)) == 7

    world(2, main, accept_code=True)


def test_statistics_count_by_function():
    def main():
        for _ in range(3):
            rpc.rpc_sync("w1", add, (1, 2))
        row = rpc.rpc_sync("w1", served_here)[f"{add.__module__}.add"]
        assert row["calls"] == 3
        assert 0 < row["bytes"] < 1000
        assert row["run_seconds"] > 0

    world(2, main)


def test_calls_are_on_the_timeline_of_both():
    def main():
        assert rpc.rpc_sync("w1", record) is None
        tape = record()
        assert rpc.rpc_sync("w1", add, (1, 2)) == 3
        (mine,) = [event for event in tape.events if event.lane == "rpc calls"]
        (theirs,) = rpc.rpc_sync("w1", spans)
        assert theirs[:3] == [
            f"{add.__module__}.add",
            "rpc served",
            {"worker": "w0", "queued": ANY},
        ]
        assert mine.name == theirs[0]
        assert mine.args == {"worker": "w1"}
        assert mine.begun <= theirs[3] <= theirs[4] <= mine.ended

    world(2, main)


def record():
    world, tape = current_world(), Tape(0, 2)
    world.record_on(tape)
    return tape if rpc.get_worker_info().name == "w0" else None


def spans():
    return [
        [e.name, e.lane, dict(e.args), e.begun, e.ended]
        for e in current_world().tape.events
        if e.name.endswith(".add") and e.lane == "rpc served"
    ]


def served_here():
    return rpc.statistics()


def test_the_default_timeout_can_be_read_and_changed():
    def main():
        assert rpc.get_rpc_timeout() == 20
        rpc._set_rpc_timeout(timedelta(milliseconds=50))
        assert rpc.get_rpc_timeout() == 0.05
        with pytest.raises(rpc.RpcTimeout, match=r"\(50 ms\)"):
            rpc.rpc_sync("w1", hold)
        _gate.set()
        with pytest.raises(ValueError, match="at least 0 seconds"):
            rpc._set_rpc_timeout(-1)
        rpc._set_rpc_timeout(0)
        assert rpc.rpc_sync("w1", echo, (1,)) == 1

    _gate.clear()
    world(2, main)


def counts():
    return rpc._get_debug_info()


def test_counts_have_the_names_of_torch():
    def main():
        held = rpc.remote("w1", hold)
        until(lambda: rpc.rpc_sync("w1", counts)["num_owner_rrefs"] == "1")
        there = rpc.rpc_sync("w1", counts)
        assert there["num_forks"] == there["num_pending_futures"] == "1"
        assert there["num_pending_users"] == "0"
        assert there["agent.thread_pool_size"] == "4"
        assert int(there["agent.server_active_calls"]) == 2
        assert counts()["num_pending_users"] == counts()["agent.client_active_calls"] == "1"
        _gate.set()
        held.to_here()
        assert rpc.rpc_sync("w1", counts)["num_pending_futures"] == "0"

    _gate.clear()
    world(2, main)


def test_options_of_devices_can_be_read_again():
    options = rpc.TensorPipeRpcBackendOptions(device_maps={"w1": {0: 1}})
    options.set_device_map("w1", {1: 0})
    options.set_devices(["cpu"])
    assert options.device_maps == {"w1": {0: 1, 1: 0}}
    assert options.devices == ["cpu"]


def test_ten_thousand_calls_in_flight_leave_nothing():
    def main():
        futures = [rpc.rpc_async("w1", add, (i, 1)) for i in range(10_000)]
        assert [future.wait() for future in futures] == list(range(1, 10_001))
        info = rpc.get_debug_info()
        assert (info["calls_waiting"], info["pinned"], info["owned"]) == (0, 0, {})

    world(2, main)
