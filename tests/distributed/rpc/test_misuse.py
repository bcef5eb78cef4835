"""What people get wrong, and what they are told: where it was, what came, what to do."""

from __future__ import annotations

import contextlib
import functools
import threading
from datetime import timedelta

import numpy as np
import pytest

import dtrain as torch
from dtrain.distributed import autograd as dist_autograd, rpc
from dtrain.distributed.nn import RemoteModule
from dtrain.distributed.optim import DistributedOptimizer
from dtrain.testing.distributed import run_distributed
from tests.distributed.rpc.worlds import add, echo, world


class Plain:
    def up(self):
        return 1


def numbers():
    yield 1


def make_plain():
    return Plain()


def make_future():
    return torch.futures.Future()


GATE = threading.Event()


def wait_for_the_gate():
    GATE.wait(20)


LAYER = torch.nn.Linear(2, 2)

WRONG = {
    "function": ((5,), TypeError, r"function should be callable, got 5 of type int"),
    "one argument": ((add, 5), TypeError, r"args must be a tuple .*\.add, got int: .*\(x,\)"),
    "a tensor": ((torch.add, torch.ones(2)), TypeError, r"arithmetic\.add, got Tensor"),
    "kwargs": ((add, (1,), [2]), TypeError, r"kwargs must be a dict .*\.add, got list"),
    "lambda": ((lambda: 1,), TypeError, r"the function to call: .*lambda.*accept_code=True"),
    "partial": (
        (functools.partial(add, 1), (2,)),
        TypeError,
        r"the function to call: a functools\.partial cannot be sent",
    ),
    "bound": (
        (Plain().up,),
        TypeError,
        r"the function to call, which is bound to an object: a .*\.Plain cannot be sent.*pass an "
        r"RRef \(remote makes it there\), or make it a dataclass",
    ),
    "lock": (
        (add, ([1, {"k": threading.Lock()}], 2)),
        TypeError,
        r"argument 0 of .*\.add, at \[1\]\['k'\]: a _thread\.lock cannot be sent",
    ),
    "keyword": (
        (add, (1,), {"b": Plain()}),
        TypeError,
        r"argument 'b' of .*\.add: a .*\.Plain cannot be sent",
    ),
    "module": ((echo, (LAYER,)), TypeError, r"argument 0 of .*Linear.*send its state_dict\(\)"),
    "generator": ((numbers,), TypeError, r"result of .*\.numbers.*: a builtins\.generator.*stream"),
    "object": ((make_plain,), TypeError, r"result of .*make_plain.*: a .*\.Plain.*pass an RRef"),
    "future": ((make_future,), TypeError, r"result of .*make_future.*functions\.async_execution"),
    "negative": ((echo, (1,), None, -3), ValueError, r"timeout must be at least 0 .*got -3"),
    "not a number": ((echo, (1,), None, float("nan")), ValueError, r"at least 0.*got nan"),
    "text": ((echo, (1,), None, "3"), TypeError, r"number of seconds or a timedelta.*got '3'"),
    "no timeout": ((echo, (1,), None, None), TypeError, r"0: for ever\), got None"),
}


@pytest.mark.parametrize("in_context", [False, True], ids=["plain", "in a context"])
def test_a_wrong_call_is_an_error_in_the_callers_words(in_context):
    def wrong():
        for name, (parts, kind, sentence) in WRONG.items():
            with pytest.raises(kind, match=sentence) as caught:
                rpc.rpc_sync("w1", *parts)
            assert type(caught.value) is kind, name
            assert str(caught.value).count("accept_code") <= 1, name

    def main():
        if in_context:
            with dist_autograd.context():
                wrong()
        else:
            wrong()

    world(2, main)


def test_a_wrong_argument_of_a_method_is_counted_as_its_caller_does():
    def main():
        server = rpc.remote("w1", Plain)
        for context in (contextlib.nullcontext(), dist_autograd.context()):
            wrong = pytest.raises(TypeError, match=r"argument 0 of up of a reference: .*Plain")
            with context, wrong:
                server.rpc_sync().up(Plain())
        with pytest.raises(TypeError, match=r"argument 0 of .*\.echo: .*Plain"):
            rpc.stream("w1", echo, (Plain(),))
        with pytest.raises(AttributeError, match=r"no attribute 'up'.*rpc_sync\(\)\.up\(\.\.\.\)"):
            server.up()

    world(2, main)


def test_wrong_ways_to_train_are_told_before_anything_is_sent():
    def main():
        with pytest.raises(TypeError, match="must be a class, got an instance of Linear"):
            RemoteModule("w1/cpu", LAYER)
        with pytest.raises(TypeError, match=r"args must be a tuple .*Linear, got int"):
            RemoteModule("w1/cpu", torch.nn.Linear, 2)
        mine = [rpc.RRef(parameter) for parameter in LAYER.parameters()]
        for parts, sentence in (
            ((torch.optim.SGD, mine[0]), r"list of RRefs, got one: write \[reference\]"),
            ((torch.optim.SGD, [mine[0], LAYER.bias]), r"params_rref\[1\] .*got Parameter"),
            ((torch.optim.SGD(LAYER.parameters(), 0.1), mine), "must be a class, got SGD"),
        ):
            with pytest.raises(TypeError, match=sentence):
                DistributedOptimizer(*parts, lr=0.1)
        with dist_autograd.context() as context:
            loss = LAYER(torch.ones(2)).sum()
            with pytest.raises(TypeError, match=r"list of tensors, got Tensor: .* \[loss\]"):
                dist_autograd.backward(context, loss)
        for owner in (0, 1):
            number = rpc.remote(owner, echo, (5,))
            with dist_autograd.context() as context:
                sentence = r"should contain a tensor for .backward\(\): .* has a int"
                with pytest.raises(RuntimeError, match=sentence):
                    number.backward(context)

    world(2, main)


def test_timeouts_are_numbers_or_timedeltas_and_0_is_for_ever():
    def main():
        for timeout in (0, 0.0, 5, 2.5, np.int64(5), np.float32(5), timedelta(seconds=5)):
            assert rpc.rpc_sync("w1", echo, (1,), timeout=timeout) == 1
            assert rpc.remote("w1", echo, (1,)).to_here(timeout) == 1
        assert list(rpc.stream("w1", numbers, timeout=timedelta(seconds=5))) == [1]
        with pytest.raises(rpc.RpcTimeout, match=r"\(50 ms\)"):
            rpc.rpc_sync("w1", wait_for_the_gate, timeout=timedelta(milliseconds=50))
        GATE.set()

    GATE.clear()
    world(2, main)


def test_a_wrong_worker_is_named_with_those_there_are():
    def main():
        for to in ("w9", 9, -1):
            with pytest.raises(ValueError, match=rf"worker {to} \(known: \['w0', 'w1'\]\)"):
                rpc.rpc_sync(to, add, (1, 2))
        with pytest.raises(ValueError, match=r"WorkerInfo.*'other'.*: rank 1 is 'w1'"):
            rpc.rpc_sync(rpc.WorkerInfo("other", 1), add, (1, 2))
        with pytest.raises(ValueError, match="Cannot get WorkerInfo from name None"):
            rpc.remote(None, add, (1, 2))

    world(2, main)


def test_init_rpc_says_what_is_wrong_with_its_arguments():
    for wrong, kind, sentence in (
        ({"backend": "foo"}, TypeError, "backend must be a member of BackendType, got 'foo'"),
        ({"rpc_backend_options": {}}, TypeError, "must be an instance of RpcBackendOptions"),
        ({"world_size": "2"}, TypeError, "world_size must be a whole number, got '2'"),
        ({"world_size": 0}, ValueError, "world_size must be at least 1, got 0"),
        ({"world_size": 2, "rank": 2}, ValueError, "rank must be one of 2 workers.*got 2"),
        ({"rank": -2}, ValueError, "got -2"),
    ):
        with pytest.raises(kind, match=sentence):
            rpc.init_rpc("w0", **wrong)
    with pytest.raises(ValueError, match="at least 0 seconds"):
        rpc.TensorPipeRpcBackendOptions(rpc_timeout=-1)
    assert rpc.RpcBackendOptions(rpc_timeout=timedelta(minutes=1)).rpc_timeout == 60


def test_after_shutdown_references_say_so():
    def main():
        rank = torch.distributed.get_rank()
        rpc.init_rpc(f"w{rank}")
        with pytest.raises(RuntimeError, match="already initialized"):
            rpc.init_rpc(f"w{rank}")
        there = rpc.remote(1 - rank, Plain)
        there.rpc_sync().up()
        rpc.shutdown()
        with pytest.raises(RuntimeError, match=r"RPC has been shut down on worker 'w\d': up of a"):
            there.rpc_sync().up()
        with pytest.raises(RuntimeError, match=r"shut down.*to_here cannot be called on"):
            there.to_here()
        with pytest.raises(RuntimeError, match=r"not been initialized.*init_rpc first"):
            rpc.rpc_sync(0, add, (1, 2))

    run_distributed(2, main)


def test_a_reference_dropped_while_its_value_is_awaited_does_not_hold_shutdown_up():
    def main():
        with pytest.raises(rpc.RpcTimeout):
            rpc.remote("w1", wait_for_the_gate).to_here(timeout=0.05)
        GATE.set()

    GATE.clear()
    world(2, main)
