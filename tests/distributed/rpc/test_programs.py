"""Programs of references, drawn by hypothesis, beside a model of who holds what.

Four workers keep references in tables; the program makes, copies, sends back, reads and drops them.
Whoever holds a reference can read it; what nobody holds is gone.
"""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings, strategies as st

from dtrain.distributed import rpc
from dtrain.distributed.rpc.ledger import Ledger
from dtrain.errors import DistError
from tests.distributed.rpc.worlds import until, world

WORKERS = 4
tables: dict[str, dict[int, rpc.RRef]] = {}


def mine():
    return tables.setdefault(rpc.get_worker_info().name, {})


def value_of(number):
    return ["value", number]


def make(owner, number):
    """A reference to a value that `owner` makes; its name as others see it."""
    mine()[number] = made = rpc.remote(f"w{owner}", value_of, (number,))
    return repr(made)


def wrap(number):
    """A reference to a value of this worker's own."""
    mine()[number] = made = rpc.RRef(["value", number])
    return repr(made)


def keep(number, reference):
    mine()[number] = reference


def copy_to(number, to):
    rpc.rpc_sync(f"w{to}", keep, (number, mine()[number]))


def give(number):
    return mine()[number]


def fetch_from(number, source):
    mine()[number] = rpc.rpc_sync(f"w{source}", give, (number,))


def through(number, middle, to):
    """By a third worker, that keeps nothing."""
    rpc.rpc_sync(f"w{middle}", pass_on, (number, mine()[number], to))


def pass_on(number, reference, to):
    rpc.rpc_sync(f"w{to}", keep, (number, reference))


def read(number):
    return mine()[number].to_here()


def drop(number):
    del mine()[number]


def forget():
    mine().clear()


def owned():
    return rpc.get_debug_info()["owned"]


class Model:
    """Who holds which reference, and what the program does next."""

    def __init__(self):
        self.owner = {}
        self.shown = {}
        self.holders = {}
        self.numbers = itertools.count()

    def held(self):
        return sorted((n, w) for n, who in self.holders.items() for w in who)

    def step(self, kind, choice, other):
        """The call that a step means: [worker, function, arguments]; None: it means nothing."""
        if kind in ("make", "wrap"):
            number, worker = next(self.numbers), choice % WORKERS
            self.owner[number] = other if kind == "make" else worker
            self.holders[number] = {worker}
            return worker, make if kind == "make" else wrap, (other, number)[kind == "wrap" :]
        if not self.held():
            return None
        number, worker = self.held()[choice % len(self.held())]
        if kind == "read":
            return worker, read, (number,)
        if kind == "drop":
            self.holders[number].discard(worker)
            return worker, drop, (number,)
        to = (worker + 1 + other % (WORKERS - 1)) % WORKERS
        self.holders[number].add(to)
        if kind == "copy":
            return worker, copy_to, (number, to)
        if kind == "fetch":
            return to, fetch_from, (number, worker)
        return worker, through, (number, (to + 1) % WORKERS, to)

    def expected(self, worker):
        """What the owner's books say in the end: {reference: its other holders}."""
        return {
            self.shown[n]: sorted(f"w{w}" for w in who if w != worker)
            for n, who in self.holders.items()
            if who and self.owner[n] == worker
        }


KINDS = ("make", "wrap", "copy", "copy", "fetch", "through", "read", "drop", "drop")
STEPS = st.lists(
    st.tuples(st.sampled_from(KINDS), st.integers(0, 30), st.integers(0, WORKERS - 1)),
    min_size=3,
    max_size=25,
)


def short(reference):
    return reference.partition("(")[2].partition(" ")[0]


def check(steps):
    model = Model()
    for step in steps:
        call = model.step(*step)
        if call is None:
            continue
        worker, function, arguments = call
        result = rpc.rpc_sync(f"w{worker}", function, arguments)
        if function in (make, wrap):
            model.shown[arguments[-1]] = short(result)
        if function is read:
            assert result == ["value", arguments[0]]
    for number, worker in model.held():
        assert rpc.rpc_sync(f"w{worker}", read, (number,)) == ["value", number]
    for worker in range(WORKERS):
        expected = model.expected(worker)
        until(lambda w=worker, e=expected: rpc.rpc_sync(f"w{w}", owned) == e)
    for worker in range(WORKERS):
        rpc.rpc_sync(f"w{worker}", forget)
    for worker in range(WORKERS):
        until(lambda w=worker: rpc.rpc_sync(f"w{w}", owned) == {})
        assert rpc.rpc_sync(f"w{worker}", rpc_info)["pinned"] == 0


def rpc_info():
    info = rpc.get_debug_info()
    return {"pinned": info["pinned"]}


def test_programs_of_references_do_what_the_model_says():
    @settings(max_examples=25, deadline=None)
    @given(STEPS)
    def programs(steps):
        check(steps)

    tables.clear()
    world(WORKERS, programs)


def test_the_model_notices_books_that_forget_to_pin(monkeypatch):
    """Whoever passes on a reference lets go of it before the owner knows of the receiver."""
    monkeypatch.setattr(Ledger, "take", lambda self, name, giver: (0, []))
    steps = [("make", 0, 1), ("copy", 0, 1), ("drop", 0, 0), ("read", 0, 0)]
    tables.clear()
    with pytest.raises((AssertionError, DistError)):
        world(WORKERS, lambda: check(steps))
