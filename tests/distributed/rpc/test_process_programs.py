"""Programs of references over four processes, drawn by hypothesis, beside a model.

As `test_programs`, where workers are threads; here values are objects that can be seen to die, in
processes that are started once and run all programs. References are made, passed on (through third
workers, too), called (proxies), refused (remote exceptions), dropped, and lost in cycles that only
gc finds. In the end there live exactly the values that the model says.
"""

from __future__ import annotations

import gc
import threading
import time
from collections import Counter
from dataclasses import dataclass
from weakref import WeakSet

import pytest
from hypothesis import Phase, given, settings, strategies as st

import dtrain as torch
from dtrain.distributed import rpc
from dtrain.distributed.rpc.ledger import Ledger
from dtrain.testing.distributed import joined
from dtrain.testing.world import RankFailed, run_world
from tests.distributed.rpc import test_programs as programs
from tests.distributed.rpc.test_programs import WORKERS, drop, forget, mine, owned, rpc_info

KINDS = (
    "make",
    "wrap",
    "copy",
    "fetch",
    "through",
    "bump",
    "bump",
    "fail",
    "refuse",
    "drop",
    "cycle",
)
STEPS = st.lists(
    st.tuples(st.sampled_from(KINDS), st.integers(0, 30), st.integers(0, 11)),
    min_size=10,
    max_size=30,
)
EXAMPLES = 20

# How long books may take until they are as they should be, in seconds.
PATIENCE = 10.0


@dataclass(eq=False)
class Value:
    number: int
    bumps: int = 0

    def bump(self):
        self.bumps += 1
        return self.bumps

    def fail(self):
        raise Refused("fail", self.number)


class Refused(Exception):
    pass


alive: WeakSet[Value] = WeakSet()  # of this process, which owns them


def made(number):
    value = Value(number)
    alive.add(value)
    return value


def make(owner, number):
    mine()[number] = reference = rpc.remote(f"w{owner}", made, (number,))
    return repr(reference)


def wrap(number):
    mine()[number] = reference = rpc.RRef(made(number))
    return repr(reference)


def read(number):
    value = mine()[number].to_here()
    return [value.number, value.bumps]


def bump(number, how):
    reference = mine()[number]
    if how == 0:
        return reference.rpc_sync().bump()
    if how == 1:
        return reference.rpc_async().bump().wait()
    return reference.remote().bump().to_here()


def fail(number):
    with pytest.raises(Refused) as caught:
        mine()[number].rpc_sync().fail()
    return list(caught.value.args)


def refuse(number, to):
    with pytest.raises(Refused) as caught:
        rpc.rpc_sync(f"w{to}", refused, (mine()[number],))
    return list(caught.value.args)


def refused(reference):
    kept = [reference]
    raise Refused("refused", len(kept))


def lose(number):
    """Drop a reference from which a cycle leads to itself."""
    cycle = [mine().pop(number)]
    cycle.append(cycle)


def living():
    gc.collect()
    return sorted(value.number for value in alive)


class Model(programs.Model):
    """The steps of `test_programs`, with values that are objects, and more."""

    def __init__(self):
        super().__init__()
        self.bumps = Counter()

    def step(self, kind, choice, other):
        """[worker, function, arguments, what it returns (None: its name)]; None: no step."""
        held = self.held()
        if kind in KINDS[:5] or not held:
            call = super().step(kind, choice, other % WORKERS)
            if call is None:
                return None
            worker, function, arguments = call
            return (
                worker,
                {programs.make: make, programs.wrap: wrap}.get(function, function),
                arguments,
                None,
            )
        number, worker = held[choice % len(held)]
        if kind == "bump":
            self.bumps[number] += 1
            return worker, bump, (number, other % 3), self.bumps[number]
        if kind == "fail":
            return worker, fail, (number,), ["fail", number]
        if kind == "refuse":
            return worker, refuse, (number, other % WORKERS), ["refused", 1]
        self.holders[number].discard(worker)
        return worker, drop if kind == "drop" else lose, (number,), None

    def living(self, worker):
        """The numbers of the values that live in `worker`, as somebody holds them."""
        return sorted(n for n, who in self.holders.items() if who and self.owner[n] == worker)


def settle(worker, function, expected):
    deadline, pause = time.monotonic() + PATIENCE, threading.Event()
    while (found := rpc.rpc_sync(f"w{worker}", function)) != expected:
        if time.monotonic() > deadline:
            raise AssertionError(f"w{worker}: {function.__name__}() is {found}, not {expected}")
        pause.wait(0.005)


def check(steps):
    model = Model()
    for function in (forget, living):  # what a program that failed has left there goes
        for worker in range(WORKERS):
            rpc.rpc_sync(f"w{worker}", function)
    for step in steps:
        call = model.step(*step)
        if call is None:
            continue
        worker, function, arguments, expected = call
        result = rpc.rpc_sync(f"w{worker}", function, arguments)
        if function in (make, wrap):
            model.shown[arguments[-1]] = programs.short(result)
        else:
            assert result == expected, (step, result)
    for number, worker in model.held():
        assert rpc.rpc_sync(f"w{worker}", read, (number,)) == [number, model.bumps[number]]
    for worker in range(WORKERS):  # what is in cycles goes everywhere, before anybody is asked
        rpc.rpc_sync(f"w{worker}", living)
    for worker in range(WORKERS):
        settle(worker, living, model.living(worker))
        settle(worker, owned, model.expected(worker))
    for number, worker in model.held():
        rpc.rpc_sync(f"w{worker}", drop, (number,))
    for worker in range(WORKERS):
        settle(worker, living, [])
        settle(worker, owned, {})
        settle(worker, rpc_info, {"pinned": 0})


def as_drawn():
    # Not shrunk: that would take minutes where each failure waits for its patience.
    phases = (Phase.explicit, Phase.generate)

    @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, phases=phases)
    @given(STEPS)
    def run(steps):
        check(steps)

    run()


def with_one_wrong():
    global PATIENCE
    PATIENCE = 0.5
    check([("make", 0, 1), ("copy", 0, 1), ("drop", 0, 0)])


def as_workers(group, wrong):
    with joined(group):
        if wrong:  # who gets a reference from another holder does not tell its owner
            Ledger.take = lambda self, name, giver: (0, [])
        rank = torch.distributed.get_rank()
        options = rpc.TensorPipeRpcBackendOptions(rpc_timeout=20)
        rpc.init_rpc(f"w{rank}", rpc_backend_options=options)
        if rank == 0:
            with_one_wrong() if wrong else as_drawn()
        rpc.shutdown(timeout=40)


def test_programs_over_processes_do_what_the_model_says():
    run_world(WORKERS, as_workers, False, transport="zmq", processes=True, timeout=50)


def test_the_model_notices_owners_that_are_not_told_of_receivers():
    with pytest.raises(RankFailed, match=r"w\d: (living|owned)\(\) is .*, not"):
        run_world(WORKERS, as_workers, True, transport="zmq", processes=True, timeout=50)
