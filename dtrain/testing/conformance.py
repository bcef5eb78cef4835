"""What every transport and every collective must do: checks that run against any implementation.

Owns: `check_transport`, `check_group` and the tables behind them (`TRANSPORT_CHECKS`,
`COLLECTIVES`), so that a test can be parametrised by one check; shows those of the stores
(`store_conformance`) as well. A failed check raises AssertionError. A new transport passes when
`check_transport(name)` and `check_group(name)` do.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from dtrain.comm import collectives as c
from dtrain.comm.group import ProcessGroup
from dtrain.comm.parts import Cuts, length, slices
from dtrain.comm.reduce import ReduceOp, check_op
from dtrain.comm.shards import GatherShards, ReduceShards
from dtrain.comm.transports.base import ANY_SOURCE, Factory, Transport
from dtrain.comm.transports.mailbox import Array
from dtrain.errors import PeerLost, TransportTimeout
from dtrain.testing.store_conformance import STORE_CHECKS, check_store, expect
from dtrain.testing.world import run_world

__all__ = [
    "COLLECTIVES",
    "COUNTS",
    "DTYPES",
    "OPS",
    "STORE_CHECKS",
    "TRANSPORT_CHECKS",
    "check_group",
    "check_store",
    "check_transport",
    "make_calls",
]

# ---- transports. Each check is what every rank does with its end.

_SIZES = (0, 1, 100, 70_001, (8 << 20) + 3)


def _soon() -> float:
    return time.monotonic() + 20


def _ring(transport: Transport, nbytes: int, tag: int) -> None:
    """Send rank-coloured bytes to the next rank and check what comes from the one before."""
    after, before = (transport.rank + 1) % transport.size, (transport.rank - 1) % transport.size
    sent = np.full(nbytes, transport.rank + tag, np.uint8)
    got = np.zeros(nbytes, np.uint8)
    transport.send(after, tag, sent, b"note")
    assert transport.recv_into(before, tag, got, _soon(), _note_is(b"note", nbytes)) == before
    transport.flush(_soon())
    assert (got == before + tag).all()


def _note_is(note: bytes, nbytes: int) -> Callable[[int, bytes, int], None]:
    def accept(source: int, got: bytes, size: int) -> None:
        assert (got, size) == (note, nbytes)

    return accept


def _transport_moves_all_sizes(transport: Transport) -> None:
    if transport.size == 1:
        return
    for tag, nbytes in enumerate(_SIZES):
        _ring(transport, nbytes, tag)
    assert transport.messages_sent == len(_SIZES)
    assert transport.bytes_sent == sum(_SIZES)


def _transport_brings_memory(transport: Transport) -> None:
    """Messages whose receiver gives no array: of all sizes, posted before they come and after."""
    after, before = (transport.rank + 1) % transport.size, (transport.rank - 1) % transport.size
    if transport.size == 1:
        return
    for nbytes in _SIZES:
        sent = np.full(nbytes, transport.rank, np.uint8)
        posted = transport.post(before, 0, nbytes)
        transport.send(after, 0, sent)
        transport.send(after, 1, sent)
        transport.send(after, 2, sent[:0])
        transport.recv_into(before, 2, sent[:0], _soon())  # those of the tags before are here, too
        for receive in (posted, transport.post(before, 1, nbytes)):
            assert transport.wait(receive, _soon()) == before
            assert receive.data is not None
            assert (receive.data == np.full(nbytes, before, np.uint8)).all()
            receive.data += 1  # the receiver's, and nobody else's
        transport.flush(_soon())
        assert (sent == transport.rank).all()


def _transport_keeps_order_and_tags(transport: Transport) -> None:
    """Rank 0 sends 0..9 on two tags to everybody.

    All read tag 1 first, then tag 0 into posted receives.
    """
    numbers = np.arange(10)
    if transport.rank == 0:
        for peer, tag, n in itertools.product(range(1, transport.size), (0, 1), range(10)):
            transport.send(peer, tag, numbers[n : n + 1])
        transport.flush(_soon())
        return
    got = np.zeros((2, 10), numbers.dtype)
    posted = [transport.post(0, 0, got[0, n : n + 1]) for n in range(10)]
    for n in range(10):
        transport.recv_into(0, 1, got[1, n : n + 1], _soon())
    for receive in reversed(posted):
        transport.wait(receive, _soon())
    assert (got == numbers).all()


def _transport_receives_from_anybody(transport: Transport) -> None:
    if transport.rank:
        transport.send(0, 5, np.array([transport.rank]))
        transport.flush(_soon())
        return
    got = np.zeros(1, int)
    sources = set()
    for _ in range(transport.size - 1):
        source = transport.recv_into(ANY_SOURCE, 5, got, _soon())
        assert got[0] == source
        sources.add(source)
    assert sources == set(range(1, transport.size))


def _transport_times_out(transport: Transport) -> None:
    if transport.size == 1:
        return
    other = 1 if transport.rank == 0 else 0
    late = np.zeros(1, np.uint8)
    error = expect(
        TransportTimeout, lambda: transport.recv_into(other, 9, late, time.monotonic() + 0.05)
    )
    assert isinstance(error, TransportTimeout)
    assert error.rank == other


def _transport_tells_news(transport: Transport) -> None:
    heard: set[int] = set()
    transport.on_news = lambda source, body: heard.add(source) if body == b"news" else None
    others = set(range(transport.size)) - {transport.rank}
    for peer in others:
        transport.tell(peer, b"news")
    assert transport.wait_until(lambda: heard == others, _soon())


def _transport_refuses_nonsense(transport: Transport) -> None:
    for peer in (transport.rank, transport.size, -2):
        expect(ValueError, lambda peer=peer: transport.send(peer, 0, np.zeros(1)))
        expect(ValueError, lambda peer=peer: transport.post(peer, 0, np.zeros(1)))


def _transport_says_goodbye(transport: Transport) -> None:
    """The last rank sends and closes: what it sent arrives, then it is gone in good order."""
    last = transport.size - 1
    if transport.size == 1:
        return
    if transport.rank == last:
        for peer in range(last):
            transport.send(peer, 3, np.ones(1000))
        transport.close()
        transport.close()
        return
    got = np.zeros(1000)
    transport.recv_into(last, 3, got, _soon())
    assert (got == 1).all()
    _expect_loss(transport, last, orderly=True)


def _transport_notices_a_death(transport: Transport) -> None:
    """The last rank vanishes: all others learn it within a second, whether they wait for it or send
    to it.
    """
    last = transport.size - 1
    if transport.size == 1:
        return
    if transport.rank == last:
        transport.recv_into(0, 3, np.empty(0), _soon())
        transport.abandon()
        return
    if transport.rank == 0:
        transport.send(last, 3, np.empty(0))
    _expect_loss(transport, last, orderly=False)


def _expect_loss(transport: Transport, peer: int, *, orderly: bool) -> None:
    lost = np.zeros(1)
    error = expect(PeerLost, lambda: transport.recv_into(peer, 3, lost, _soon()))
    assert isinstance(error, PeerLost)
    assert (error.rank, error.orderly) == (peer, orderly)
    expect(PeerLost, lambda: transport.send(peer, 3, lost))
    expect(
        PeerLost,
        lambda: transport.post(peer, 3, lost) and transport.recv_into(peer, 3, lost, _soon()),
    )


def _transport_serves_threads(transport: Transport) -> None:
    """Four threads on every rank talk round the ring at once, each on a tag of its own."""
    if transport.size == 1:
        return
    errors: list[BaseException] = []

    def talk(thread: int) -> None:
        try:
            for turn in range(5):
                _ring(transport, 100_000 * (turn % 2), 10 * thread)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=talk, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert errors == []


TRANSPORT_CHECKS: dict[str, Callable[[Transport], None]] = {
    "moves all sizes": _transport_moves_all_sizes,
    "brings memory": _transport_brings_memory,
    "keeps order and tags": _transport_keeps_order_and_tags,
    "receives from anybody": _transport_receives_from_anybody,
    "times out": _transport_times_out,
    "tells news": _transport_tells_news,
    "refuses nonsense": _transport_refuses_nonsense,
    "says goodbye": _transport_says_goodbye,
    "notices a death": _transport_notices_a_death,
    "serves threads": _transport_serves_threads,
}


_CLOSING = ("says goodbye", "notices a death")


def check_transport(
    transport: str | Factory, sizes: Iterable[int] = (1, 2, 3), checks: Iterable[str] | None = None
) -> None:
    """Run the checks (default: all) on worlds of thread ranks of these sizes."""
    for size, check in itertools.product(sizes, checks or TRANSPORT_CHECKS):
        run_world(size, _check_end, check, transport=transport)


def _check_end(group: ProcessGroup, check: str) -> None:
    TRANSPORT_CHECKS[check](group.transport)
    if check not in _CLOSING:
        group.submit(c.Barrier())


# ---- collectives against their reference

# The last one is above the size from which collectives exchange slices.
COUNTS = (0, 1, 7, 1000, 20_003)

DTYPES: tuple[np.dtype[Any], ...] = tuple(
    map(
        np.dtype,
        (
            *(np.bool_, np.uint8, np.int32, np.int64, np.float16, ml_dtypes.bfloat16),
            *(np.float32, np.float64, np.complex64),
        ),
    )
)

OPS = (
    *(ReduceOp.SUM, ReduceOp.AVG, ReduceOp.PRODUCT, ReduceOp.MIN, ReduceOp.MAX),
    *(ReduceOp.BAND, ReduceOp.BOR, ReduceOp.BXOR, ReduceOp.PREMUL_SUM(0.3)),
)


def _draw(rng: np.random.Generator, shape: Any, dtype: np.dtype[Any]) -> Array:
    """Values whose sum shows the order in which they were added."""
    if dtype.kind == "b":
        return rng.integers(0, 2, shape).astype(dtype)
    if dtype.kind in "iu":
        return rng.integers(0, 100, shape).astype(dtype)
    real = rng.normal(size=shape) * 10.0 ** rng.integers(-3, 4, shape)
    return (real + 1j * rng.normal(size=shape) if dtype.kind == "c" else real).astype(dtype)


Make = Callable[[int, int, Callable[[Any], Array], ReduceOp], Sequence[c.Collective]]


def _every(size: int, make: Callable[[int], c.Collective]) -> list[c.Collective]:
    return [make(rank) for rank in range(size)]


def _all_to_all(
    size: int, n: int, draw: Callable[[Any], Array], op: ReduceOp
) -> list[c.Collective]:
    # rank a sends (a + b) % 3 rows of n to rank b
    rows = [[(a + b) % 3 for b in range(size)] for a in range(size)]
    columns = list(zip(*rows, strict=True))
    return _every(
        size,
        lambda r: c.AllToAll(
            draw((sum(rows[r]), n)), draw((sum(columns[r]), n)), rows[r], columns[r]
        ),
    )


def _cuts(size: int, n: int) -> list[Cuts]:
    """n elements and a few more: shards of two parameters and a tail that everybody has."""
    step = -(-n // size)  # as torch.chunk divides
    first = [slice(min(r * step, n), min((r + 1) * step, n)) for r in range(size)]
    second = [slice(n + cut.start, n + cut.stop) for cut in slices(n, size)]
    return [(first[r], second[r], slice(2 * n, 2 * n + 3)) for r in range(size)]


def _reduce_shards(
    size: int, n: int, draw: Callable[[Any], Array], op: ReduceOp
) -> list[c.Collective]:
    cuts = _cuts(size, n)
    return _every(size, lambda r: ReduceShards(draw(2 * n + 3), draw(length(cuts[r])), cuts, op))


def _gather_shards(
    size: int, n: int, draw: Callable[[Any], Array], op: ReduceOp
) -> list[c.Collective]:
    cuts = [own[:2] for own in _cuts(size, n)]
    return _every(size, lambda r: GatherShards(draw(length(cuts[r])), draw(2 * n), cuts))


# {kind: (size, count, draw, op) -> the calls of all ranks}; `draw(shape)` gives fresh values
COLLECTIVES: dict[str, Make] = {
    "all_reduce": lambda s, n, draw, op: _every(s, lambda r: c.AllReduce(draw(n), op)),
    "broadcast": lambda s, n, draw, op: _every(s, lambda r: c.Broadcast(draw(n), s - 1)),
    "reduce": lambda s, n, draw, op: _every(s, lambda r: c.Reduce(draw(n), s // 2, op)),
    "all_gather": lambda s, n, draw, op: _every(s, lambda r: c.AllGather(draw(n), draw((s, n)))),
    "gather": lambda s, n, draw, op: _every(
        s, lambda r: c.Gather(draw(n), draw((s, n)) if r == s - 1 else None, s - 1)
    ),
    "scatter": lambda s, n, draw, op: _every(
        s, lambda r: c.Scatter(draw((s, n)) if r == s // 2 else None, draw(n), s // 2)
    ),
    "reduce_scatter": lambda s, n, draw, op: _every(
        s, lambda r: c.ReduceScatter(draw((s, n)), draw(n), op)
    ),
    "all_to_all": _all_to_all,
    "reduce_shards": _reduce_shards,
    "gather_shards": _gather_shards,
    "barrier": lambda s, n, draw, op: _every(s, lambda r: c.Barrier()),
}

_REDUCING = ("all_reduce", "reduce", "reduce_scatter", "reduce_shards")


def make_calls(
    kind: str, size: int, count: int, dtype: np.dtype[Any], op: ReduceOp = ReduceOp.SUM
) -> Sequence[c.Collective]:
    """The calls of all ranks, with the same random fields wherever this is called."""
    rng = np.random.default_rng([size, count, len(kind), dtype.num % 100])
    return COLLECTIVES[kind](size, count, lambda shape: _draw(rng, shape, dtype), op)


def _check_calls(group: ProcessGroup, kind: str, counts: Sequence[int]) -> None:
    for count, dtype in itertools.product(counts, DTYPES):
        for op in OPS if kind in _REDUCING and 1 < count < 1000 else OPS[:1]:
            try:
                check_op(op, dtype, kind)
            except (ValueError, RuntimeError):
                continue
            _check_call(group, kind, count, dtype, op)


def _check_call(
    group: ProcessGroup, kind: str, count: int, dtype: np.dtype[Any], op: ReduceOp
) -> None:
    calls = make_calls(kind, group.size, count, dtype, op)
    expected = type(calls[0]).reference(calls)[group.rank]
    mine = calls[group.rank]
    group.submit(mine)
    what = f"{mine.signature} on rank {group.rank}/{group.size}"
    if expected is None:
        assert mine.output is None, what
        return
    assert mine.output is not None, what
    assert mine.output.shape == expected.shape, what
    assert mine.output.tobytes() == expected.tobytes(), what


def check_group(
    transport: str | Factory,
    sizes: Iterable[int] = (1, 2, 3, 4, 5, 8),
    kinds: Iterable[str] | None = None,
    counts: Sequence[int] = COUNTS,
) -> None:
    """Every collective against its `reference`, bit by bit: world sizes x counts x dtypes x
    operators.
    """
    for size, kind in itertools.product(sizes, kinds or COLLECTIVES):
        run_world(size, _check_calls, kind, counts, transport=transport, timeout=60.0)
