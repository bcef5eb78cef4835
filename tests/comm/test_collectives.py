"""Collectives against their reference, on every transport; what they refuse; how much they send."""

from __future__ import annotations

import math
import re

import ml_dtypes
import numpy as np
import pytest

from dtrain.comm import algorithms, collectives as c
from dtrain.comm.arrays import describe
from dtrain.comm.parts import slices
from dtrain.comm.reduce import AVG, MAX, SUM
from dtrain.testing.conformance import COLLECTIVES, COUNTS, check_group, make_calls
from dtrain.testing.world import run_world

SMALL = (0, 1, 7, 1000)


@pytest.mark.parametrize("kind", COLLECTIVES)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8])
def test_local_conformance(kind, size):
    check_group("local", [size], [kind], COUNTS if size < 5 else SMALL)


@pytest.mark.parametrize("kind", COLLECTIVES)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_zmq_conformance(kind, size):
    check_group("zmq", [size], [kind], COUNTS if size < 3 else (0, 7, 20_003))


@pytest.mark.parametrize("kind", COLLECTIVES)
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_shm_conformance(kind, size):
    check_group("shm", [size], [kind], COUNTS if size == 2 else (0, 7, 20_003))


def test_the_suite_catches_a_wrong_sum(monkeypatch):
    """An algorithm that adds in another order gives other bits."""
    right = algorithms.combine
    monkeypatch.setattr(
        algorithms, "combine", lambda op, parts, out: right(op, list(reversed(parts)), out)
    )
    with pytest.raises(AssertionError, match="all_reduce"):
        check_group("local", [3], ["all_reduce"], (1000,))


def test_references_are_the_textbook():
    """Rank r holds [r+1, r+2] (or two rows of it); N = 3."""
    bufs = [np.array([r + 1, r + 2]) for r in range(3)]
    rows = [np.stack([b, 10 * b, 100 * b]) for b in bufs]

    def out():
        return np.zeros(6, int)

    def lists(outputs):
        return [None if o is None else o.tolist() for o in outputs]

    assert lists(c.AllReduce.reference([c.AllReduce(b) for b in bufs])) == [[6, 9]] * 3
    assert lists(c.Broadcast.reference([c.Broadcast(b, 1) for b in bufs])) == [[2, 3]] * 3
    assert lists(c.Reduce.reference([c.Reduce(b, 2, MAX) for b in bufs])) == [
        [1, 2],
        [2, 3],
        [3, 4],
    ]
    joined = [1, 2, 2, 3, 3, 4]
    assert lists(c.AllGather.reference([c.AllGather(b, out()) for b in bufs])) == [joined] * 3
    gathers = [c.Gather(b, out() if r == 1 else None, 1) for r, b in enumerate(bufs)]
    assert lists(c.Gather.reference(gathers)) == [None, joined, None]
    scatters = [c.Scatter(rows[1] if r == 0 else None, np.zeros(2, int), 0) for r in range(3)]
    assert lists(c.Scatter.reference(scatters)) == [[2, 3], [20, 30], [200, 300]]
    scattered = [c.ReduceScatter(x, np.zeros(2, int)) for x in rows]
    assert lists(c.ReduceScatter.reference(scattered)) == [[6, 9], [60, 90], [600, 900]]
    swaps = [c.AllToAll(x[:, 0].copy(), np.zeros(3, int)) for x in rows]
    assert lists(c.AllToAll.reference(swaps)) == [[1, 2, 3], [10, 20, 30], [100, 200, 300]]
    assert lists(c.Barrier.reference([c.Barrier()] * 3)) == [None] * 3


def _sent(group, kind, count):
    """Messages and payload bytes that one call sends."""
    mine = make_calls(kind, group.size, count, np.dtype(np.float32))[group.rank]
    before = group.statistics()
    group.submit(mine)
    after = group.statistics()
    return after.messages_sent - before.messages_sent, after.bytes_sent - before.bytes_sent


def _expected(kind, rank, n, count):
    """The closed forms of the docstring of `algorithms`, for float32."""
    b = 4 * count
    others = n - 1
    large = b > algorithms.PIECE if n == 2 else b * others >= algorithms.SMALL
    part = [4 * (s.stop - s.start) for s in slices(count, n)]
    pieces = [max(1, math.ceil(each / algorithms.PIECE)) for each in part]
    to_others = sum(pieces) - pieces[rank]
    if kind in ("reduce_shards", "gather_shards"):  # two parameters, and 3 numbers for everybody
        step = math.ceil(count / n)
        shard = [part[r] + 4 * max(0, min(step, count - r * step)) for r in range(n)]
        if kind == "gather_shards":
            return others, others * shard[rank]
        theirs = [12 + each for r, each in enumerate(shard) if r != rank]
        return sum(max(1, math.ceil(each / algorithms.PIECE)) for each in theirs), sum(theirs)
    if kind == "all_reduce" and large:
        return to_others + others * pieces[rank], (b - part[rank]) + others * part[rank]
    if kind == "reduce" and large:
        root = n // 2
        return (to_others + others, b - part[root]) if rank == root else (to_others + 1, b)
    if kind == "reduce_scatter":
        return others * max(1, math.ceil(b / algorithms.PIECE)), others * b
    if kind == "reduce":
        return (others, 0) if rank == n // 2 else (1, b)
    if kind == "broadcast":
        return (others, others * b) if rank == n - 1 else (1, 0)
    if kind == "scatter":
        return (others, others * b) if rank == n // 2 else (1, 0)
    if kind == "gather":
        return (others, 0) if rank == n - 1 else (1, b)
    if kind == "barrier":
        return math.ceil(math.log2(n)), 0
    if kind == "all_to_all":
        return others, sum((rank + to) % 3 for to in range(n) if to != rank) * b
    return others, others * b  # all_gather, small all_reduce


@pytest.mark.parametrize("kind", COLLECTIVES)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8])
def test_messages_and_bytes_are_the_closed_forms(kind, size, monkeypatch):
    """Large means here 40 KB to all others together, in pieces of 8 KB."""
    monkeypatch.setattr(algorithms, "SMALL", 40_000)
    monkeypatch.setattr(algorithms, "PIECE", 8_000)
    for count in (0, 7, 20_003):
        sent = run_world(size, _sent, kind, count)
        assert sent == [_expected(kind, r, size, count) for r in range(size)], count


@pytest.mark.parametrize(
    "kind", ["all_reduce", "reduce", "reduce_scatter", "reduce_shards", "gather_shards"]
)
def test_messages_and_bytes_are_the_same_over_sockets(kind, monkeypatch):
    """60,011 numbers are 240 KB: slices of two pieces of 64 KB."""
    monkeypatch.setattr(algorithms, "PIECE", 64_000)
    sent = run_world(3, _sent, kind, 60_011, transport="zmq")
    assert sent == [_expected(kind, r, 3, 60_011) for r in range(3)]


def test_pieces_and_slices_do_not_change_a_bit(monkeypatch):
    """Sums of numbers of very different size, in one piece, in many, and with everything sent."""

    def numbers(rank):
        rng = np.random.default_rng(rank)
        return (rng.normal(size=10_001) * 10.0 ** rng.integers(-20, 20, 10_001)).astype(np.float32)

    def add(group):
        buf = numbers(group.rank)
        everybody = [c.AllReduce(numbers(rank)) for rank in range(group.size)]
        group.submit(c.AllReduce(buf))
        assert buf.tobytes() == c.AllReduce.reference(everybody)[0].tobytes()

    for small, piece in ((0, 1 << 20), (0, 1_000), (1 << 20, 1_000)):
        monkeypatch.setattr(algorithms, "SMALL", small)
        monkeypatch.setattr(algorithms, "PIECE", piece)
        run_world(4, add)


def test_in_place_forms_that_fsdp_uses():
    """all_gather from, and reduce_scatter into, the rank's own part of the big buffer.

    N = 4, rank r holds r + 1.
    """

    def gather(group):
        whole = np.zeros((4, 3))
        whole[group.rank] = group.rank + 1
        group.submit(c.AllGather(whole[group.rank], whole))
        group.submit(c.ReduceScatter(whole, whole[group.rank]))
        return whole[group.rank].tolist()

    assert run_world(4, gather) == [[4.0 * (r + 1)] * 3 for r in range(4)]


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (c.AllReduce([1.0]), TypeError, "expected a numpy.ndarray, got list"),
        (c.AllReduce(np.array([object()])), TypeError, "dtype object cannot be exchanged"),
        (c.AllReduce(np.zeros(3, ">f4")), TypeError, "cannot be exchanged"),
        (c.AllReduce(np.zeros((4, 4))[:, 0]), ValueError, "Tensors must be contiguous"),
        (
            c.AllReduce(np.asfortranarray(np.zeros((4, 4)))),
            ValueError,
            "Tensors must be contiguous",
        ),
        (
            c.AllReduce(np.zeros(3, np.complex64), MAX),
            ValueError,
            "does not support ReduceOp.MAX on",
        ),
        (c.AllReduce(np.zeros(3, np.int64), AVG), RuntimeError, "result type Float can't be cast"),
        (c.Broadcast(np.zeros(3), 2), ValueError, "root 2 is not a rank of this group"),
        (c.Broadcast(np.zeros(3), -1), ValueError, "root -1"),
        (c.AllGather(np.zeros(3), np.zeros(5)), ValueError, "expected 2 x 3 elements"),
        (c.AllGather(np.zeros(3), np.zeros(6, int)), TypeError, "dtypes differ"),
        (c.Gather(np.zeros(3), None, 0), TypeError, "gather on the destination rank"),
        (c.Gather(np.zeros(3), np.zeros(6), 1), ValueError, "out must be None on all ranks but"),
        (c.Scatter(None, np.zeros(3), 0), TypeError, "scatter on the source rank"),
        (c.Scatter(np.zeros(6), np.zeros(3), 1), ValueError, "inp must be None on all ranks but"),
        (c.ReduceScatter(np.zeros(5), np.zeros(3)), ValueError, "expected 2 x 3 elements"),
        (c.AllToAll(np.zeros(3), np.zeros(2)), ValueError, "3 rows do not divide into 2"),
        (c.AllToAll(np.zeros(4), np.zeros(4), [1, 2]), ValueError, "2 splits that sum to 4"),
        (c.AllToAll(np.zeros(4), np.zeros(4), [3, 1]), ValueError, "sends 3 rows to itself"),
        (c.AllToAll(np.zeros(()), np.zeros(())), ValueError, "0-dimensional"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_sent(call, error, words):
    def submit(group):
        if group.rank == 0:
            with pytest.raises(error, match=re.escape(words)):
                group.submit(call)
        group.submit(c.Barrier())  # the group is as good as before, and still in step
        return group.statistics().messages_sent

    assert run_world(2, submit) == [1, 1]


def test_a_read_only_result_is_refused():
    frozen = np.zeros(3)
    frozen.flags.writeable = False

    def submit(group):
        with pytest.raises(ValueError, match="read-only"):
            group.submit(c.AllReduce(frozen))
        group.submit(c.Broadcast(frozen if group.rank == 0 else np.ones(3), 0))

    run_world(2, submit)


def test_overlapping_all_to_all_is_refused():
    buf = np.zeros(4)
    with pytest.raises(ValueError, match="overlap"):
        c.AllToAll(buf, buf).validate(0, 2)


def test_zero_dimensions_and_bfloat16_in_words():
    assert describe(np.zeros((), ml_dtypes.bfloat16)) == "bfloat16[]"
    assert c.AllReduce(np.zeros((2, 3)), SUM).signature == "all_reduce(float64[2, 3], op=SUM)"
    assert c.Broadcast(np.zeros(10, np.float32)).signature == "broadcast(float32[10], src=0)"
