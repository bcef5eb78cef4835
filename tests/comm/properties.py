"""Calls drawn by hypothesis, and worlds of thread ranks that live long enough to make many of them.

Owns: `plans` (a strategy of `Plan`), what a plan means for all ranks (`calls_of`, `expected`), and
`Ranks`. A plan is small and printable: shapes, roots and a seed; arrays are made from it.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from hypothesis import strategies as st

from dtrain.comm import collectives as c, point_to_point as p2p
from dtrain.comm.point_to_point import Recv, Send
from dtrain.comm.reduce import check_op
from dtrain.testing import conformance
from dtrain.testing.world import run_world

REDUCING = ("all_reduce", "reduce", "reduce_scatter")
WHOLE = ("reduce_scatter", "all_gather", "gather", "scatter", "all_to_all")  # parts for all ranks
EVERY_DTYPE = (
    *conformance.DTYPES,
    *map(np.dtype, (np.int8, np.int16, np.uint16, np.uint32, np.uint64, np.complex128)),
)
KINDS = (*REDUCING, "broadcast", "all_gather", "gather", "scatter", "all_to_all", "messages",
         "barrier")  # fmt: skip
OPS = {op.name: op for op in conformance.OPS}
SHAPES = ((), (0,), (1,), (7,), (40,), (999,), (3, 0, 2), (2, 3), (1, 5, 4), (None,), (None,))
# None: about as many bytes as where the way changes: one exchange or two, staged or looked up, one
# piece or more.
EDGES = (16 << 10, 16 << 10, 64 << 10, 64 << 10, 256 << 10, 1 << 20)


@dataclass(frozen=True)
class Plan:
    """One call of all ranks. `roots` and `rows` are taken modulo what the world has."""

    kind: str
    dtype: np.dtype
    reduction: str  # the name of `op`: hypothesis prints dataclasses with all they refer to
    shape: tuple[int, ...]
    root: int
    rows: tuple[int, ...]  # all_to_all: how many go where; messages: who sends to whom
    windowed: int  # bit r: rank r's arrays come from `group.empty`
    seed: int

    @property
    def op(self):
        return OPS[self.reduction]


def _allowed(dtype):
    """The names of the operators that a dtype has."""
    found = []
    for name, op in OPS.items():
        with contextlib.suppress(ValueError, RuntimeError):
            check_op(op, dtype, "")
            found.append(name)
    return found


ALLOWED = {dtype: _allowed(dtype) for dtype in EVERY_DTYPE}


@st.composite
def _plan(draw):
    kind, dtype = draw(st.sampled_from(KINDS)), draw(st.sampled_from(EVERY_DTYPE))
    shape = draw(st.sampled_from(SHAPES))
    if shape[:1] == (None,):
        edge = draw(st.sampled_from(EDGES))
        shape = (max(0, (edge + draw(st.sampled_from((-1, 0, 1)))) // dtype.itemsize),)
    return Plan(
        kind, dtype, draw(st.sampled_from(ALLOWED[dtype])), shape,
        draw(st.integers(0, 39)), draw(st.tuples(*[st.integers(0, 3)] * 8)),
        draw(st.sampled_from([0, 0, 255, 0b10110101])), draw(st.integers(0, 2**32 - 1)),
    )  # fmt: skip


plans = st.lists(_plan(), min_size=1, max_size=4)
"""Up to four calls, under way together when they are made with async_op."""


@cache
def _pool(dtype):
    """Values to take from: random bits where all of them are numbers, else floats whose sum shows
    the order, with some that are special.
    """
    rng, count = np.random.default_rng(dtype.num % 100), 65_537
    if dtype.kind == "b":
        return rng.integers(0, 2, count).astype(bool)
    if dtype.kind in "iu":
        return np.frombuffer(rng.bytes(count * dtype.itemsize), dtype)
    real = rng.normal(size=count) * 10.0 ** rng.integers(-3, 4, count)
    special = rng.integers(0, 400, count)
    for code, value in enumerate((0.0, -0.0, np.inf, -np.inf, np.nan)):
        real[special == code] = value
    numbers = real + 1j * rng.normal(size=count) if dtype.kind == "c" else real
    with np.errstate(all="ignore"):
        return numbers.astype(dtype)


def values(rng, shape, dtype):
    """An array of such values, from another place of the pool each time."""
    pool, start = _pool(dtype), rng.integers(60_000)
    count = int(np.prod(shape, dtype=int))
    return np.resize(pool[start:] if count < 5000 else np.roll(pool, start), shape)


def calls_of(plan, size):
    """[calls of rank r, for every rank]: one collective each, or several messages."""
    rng = np.random.default_rng(plan.seed)
    shape, root = plan.shape, plan.root % size
    if plan.kind in WHOLE and len(shape) == 1 and shape[0] > 100_000:
        shape = (shape[0] // size,)  # the edge is that of all parts together

    def draw(*head):
        return values(rng, (*head, *shape), plan.dtype)

    ranks = range(size)
    if plan.kind == "messages":
        return _messages(plan, size, draw)
    if plan.kind == "all_to_all":
        rows = [[plan.rows[(a * b + a + b) % 8] for b in ranks] for a in ranks]
        taken = list(zip(*rows, strict=True))
        return [
            [c.AllToAll(draw(sum(rows[r])), draw(sum(taken[r])), rows[r], taken[r])] for r in ranks
        ]
    make = {
        "all_reduce": lambda r: c.AllReduce(draw(), plan.op),
        "reduce": lambda r: c.Reduce(draw(), root, plan.op),
        "reduce_scatter": lambda r: c.ReduceScatter(draw(size), draw(), plan.op),
        "broadcast": lambda r: c.Broadcast(draw(), root),
        "all_gather": lambda r: c.AllGather(draw(), draw(size)),
        "gather": lambda r: c.Gather(draw(), draw(size) if r == root else None, root),
        "scatter": lambda r: c.Scatter(draw(size) if r == root else None, draw(), root),
        "barrier": lambda r: c.Barrier(),
    }[plan.kind]
    return [[make(r)] for r in ranks]


def _messages(plan, size, draw):
    """Rank a sends `rows` messages to others; receives are posted in the order of the sources."""
    ranks = [[] for _ in range(size)]
    for a in range(size):
        for n, step in enumerate(plan.rows[: 3 if size > 1 else 0]):
            b, tag = (a + 1 + step % (size - 1)) % size, n % 2
            ranks[a].append(Send(draw(), b, tag))
            ranks[b].append(Recv(draw(), a, tag))
    return [sorted(calls, key=lambda call: isinstance(call, Send)) for calls in ranks]


def expected(ranks):
    """[what each call leaves in its output on rank r (None: nothing to look at), for every rank]"""
    if not any(ranks) or isinstance(ranks[0][0], Send | Recv):
        return p2p.reference(ranks)
    calls = [calls[0] for calls in ranks]
    return [[output] for output in type(calls[0]).reference(calls)]


def placed(call, group, plan):
    """The call with its arrays in the group's shared memory, where the plan says so."""
    if not plan.windowed >> group.rank & 1:
        return call
    moved = {}
    for name in ("buf", "inp", "out"):
        array = getattr(call, name, None)
        if array is not None:
            moved[name] = group.empty(array.shape, array.dtype)
            moved[name][...] = array
    return replace(call, **moved)


def output_of(call):
    """The array in which a call leaves something."""
    return call.buf if isinstance(call, Send | Recv) else call.output


def submit_plan(group, plan, calls, async_op):
    """Submit one rank's calls of one plan; (call as it was made, its Work)."""
    made = [placed(call, group, plan) for call in calls]
    late = async_op or plan.kind == "messages"
    return [(call, group.submit(call, async_op=late)) for call in made]


def run_plans(group, given, everything, async_op):
    """One rank's part of several plans; what is in the output of every call afterwards."""
    made = [
        pair
        for plan, ranks in zip(given, everything, strict=True)
        for pair in submit_plan(group, plan, ranks[group.rank], async_op)
    ]
    for _, work in made:
        work.wait(30.0)
    return [output_of(call) for call, _ in made]


class Ranks:
    """A world of thread ranks that do what they are told, one job after the other, until `close`.

    A job that fails ends the world: `do` raises, and the next job has a new one.
    """

    def __init__(self, size, transport):
        self._size, self._transport = size, transport
        self._inboxes: list[queue.SimpleQueue] = []
        self._world = None

    def _start(self):
        self._inboxes = [queue.SimpleQueue() for _ in range(self._size)]
        self._outbox: queue.SimpleQueue = queue.SimpleQueue()
        self._world = threading.Thread(target=self._live)
        self._world.start()

    def _live(self):
        with contextlib.suppress(BaseException):  # told by `_serve` already
            run_world(self._size, self._serve, transport=self._transport, timeout=55.0)

    def _serve(self, group):
        while (job := self._inboxes[group.rank].get()) is not None:
            try:
                self._outbox.put((group.rank, job(group), None))
            except BaseException as error:
                self._outbox.put((group.rank, None, error))
                raise

    def do(self, job):
        """`job(group)` on every rank; the results in rank order."""
        if self._world is None:
            self._start()
        for inbox in self._inboxes:
            inbox.put(job)
        results = [None] * self._size
        for _ in range(self._size):
            rank, results[rank], error = self._outbox.get(timeout=40.0)
            if error is not None:
                self.close()
                raise error
        return results

    def close(self):
        """End the world; the next job has a new one."""
        for inbox in self._inboxes:
            inbox.put(None)
        if self._world is not None:
            self._world.join(10.0)
        self._world, self._inboxes = None, []

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()
