"""Any call, on any transport and number of ranks, leaves what its reference says, bit by bit.

hypothesis draws the calls (kind, dtype, operator, shape, root, splits, where arrays live, several
under way at once) with a fixed seed, so that every run checks the same ones.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings, strategies as st

from dtrain.comm import algorithms, collectives as c, window_algorithms
from dtrain.comm.reduce import AVG, PREMUL_SUM, SUM, combine
from dtrain.errors import DistError
from dtrain.testing.world import run_world
from tests.comm.hosts import islands
from tests.comm.properties import Ranks, calls_of, expected, plans, run_plans

EXAMPLES = {1: 20, 2: 80, 3: 60, 4: 40, 5: 40, 8: 20}
# {name: what makes it for so many ranks}
TRANSPORTS = {
    **{name: lambda size, name=name: name for name in ("local", "zmq", "tcp", "shm")},
    "islands": lambda size: islands(*ISLANDS[size]),
}
ISLANDS = {2: (1, 1), 3: (2, 1), 4: (2, 2), 5: (3, 2), 8: (4, 2, 2)}  # ranks on each host
WORLDS = [(t, n) for t in TRANSPORTS for n in EXAMPLES if t != "islands" or n > 2]


def check(ranks, size, given_plans, async_op):
    everything = [calls_of(plan, size) for plan in given_plans]
    wanted = [expected(calls) for calls in everything]
    found = ranks.do(
        partial(run_plans, given=given_plans, everything=everything, async_op=async_op)
    )
    for rank in range(size):
        outputs = iter(found[rank])
        for plan, outcome in zip(given_plans, wanted, strict=True):
            for value in outcome[rank]:
                output = next(outputs)
                if value is not None:
                    where = f"rank {rank} of {size}, {plan}"
                    assert output.shape == value.shape, where
                    assert output.tobytes() == value.tobytes(), where


def properties(ranks, size, **more):
    """Check the examples of `size` ranks."""

    @settings(
        derandomize=True, database=None, deadline=None, max_examples=EXAMPLES[size],
        suppress_health_check=list(HealthCheck), **more,
    )  # fmt: skip
    @given(plans, st.booleans())
    def holds(given_plans, async_op):
        check(ranks, size, given_plans, async_op)

    holds()


@pytest.mark.parametrize(("transport", "size"), WORLDS)
def test_every_call_leaves_what_its_reference_says(transport, size):
    with Ranks(size, TRANSPORTS[transport](size)) as ranks:
        properties(ranks, size)


SUMS = [
    (op, np.dtype(dtype), count)
    for op, dtype, count in itertools.product(
        (SUM, AVG, PREMUL_SUM(0.3)), (np.float32, np.float16, ml_dtypes.bfloat16), (1, 999, 40_001)
    )
]


def contributions(size, dtype, count):
    """What each rank brings: values whose sum shows the order in which they were added."""
    rng = np.random.default_rng([size, count])
    wide = rng.normal(size=(size, count)) * 10.0 ** rng.integers(-3, 4, (size, count))
    return list(wide.astype(dtype))


def reduced(group):
    """One rank's results: reduce, all_reduce (also in shared memory), reduce_scatter."""
    found = []
    for op, dtype, count in SUMS:
        mine = contributions(group.size, dtype, count)[group.rank]
        bufs = [mine.copy(), mine.copy(), group.empty(count, dtype)]
        bufs[2][...] = mine
        part = np.empty(count // group.size, dtype)
        group.submit(c.Reduce(bufs[0], 1, op))
        group.submit(c.AllReduce(bufs[1], op))
        group.submit(c.AllReduce(bufs[2], op))
        group.submit(c.ReduceScatter(mine[: part.size * group.size], part, op))
        found.append([bufs[0] if group.rank == 1 else None, *bufs[1:], part])
    return found


@pytest.mark.parametrize("size", [2, 3, 5])
def test_sums_have_the_same_bits_over_every_transport(size):
    """Those of `combine`, which adds in rank order, whatever carries the contributions."""
    totals = [np.empty(count, dtype) for _, dtype, count in SUMS]
    for (op, dtype, count), total in zip(SUMS, totals, strict=True):
        combine(op, contributions(size, dtype, count), total)
    for transport in [name for name, n in WORLDS if n == size]:
        found = run_world(size, reduced, transport=TRANSPORTS[transport](size))
        for rank, case in itertools.product(range(size), range(len(SUMS))):
            total, part = totals[case], totals[case].size // size
            own = total[rank * part : (rank + 1) * part]
            wanted = [total if rank == 1 else None, total, total, own]
            for got, value in zip(found[rank][case], wanted, strict=True):
                same = value is None or got.tobytes() == value.tobytes()
                assert same, (transport, rank, SUMS[case])


def _added_backwards(monkeypatch):
    right = algorithms.combine
    for module in (algorithms, window_algorithms):
        monkeypatch.setattr(
            module, "combine", lambda op, parts, out: right(op, list(reversed(parts)), out)
        )


def _one_element_short(monkeypatch):
    """The last part that `rows` gives lacks its last element."""
    for module in (algorithms, window_algorithms):
        right = module.rows
        monkeypatch.setattr(
            module, "rows", lambda a, n, right=right: [*right(a, n)[:-1], right(a, n)[-1][:-1]]
        )


def _rank_0_is_always_the_root(monkeypatch):
    for call in (c.Broadcast, c.Gather, c.Scatter):
        right = call.reference
        monkeypatch.setattr(
            call, "reference",
            staticmethod(lambda ranks, right=right: right([replace(r, root=0) for r in ranks])),
        )  # fmt: skip


@pytest.mark.parametrize("transport", ["local", "shm"])
@pytest.mark.parametrize("bug", [_added_backwards, _one_element_short, _rank_0_is_always_the_root])
def test_the_properties_catch(bug, transport, monkeypatch):
    bug(monkeypatch)
    with Ranks(3, transport) as ranks, pytest.raises((AssertionError, DistError, ValueError)):
        properties(ranks, 3, phases=[Phase.generate])
