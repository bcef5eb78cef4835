"""How each call of a group maps onto MPI's own: one nonblocking MPI operation for each.

Owns: `start`. Data moves as bytes, so every dtype does. Reductions use MPI's operators in MPI's own
order, which for floating sums and products need not be rank order: their last bits may differ from
the other transports'. Where MPI has no operator, ours is registered: MIN and MAX of floating
values, with NaN winning. float16 and bfloat16 are reduced as float32, AVG is a sum that is divided.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from dtrain.comm import collectives as c
from dtrain.comm.parts import length, packed, unpack
from dtrain.comm.point_to_point import Recv, Send
from dtrain.comm.reduce import ReduceOp
from dtrain.comm.shards import GatherShards, ReduceShards
from dtrain.comm.transports.mailbox import Array
from dtrain.errors import DistBackendError, WrongSize

__all__ = ["mpi", "start"]

# The requests of a call, and what is left to do when they are complete: it gets the statuses of the
# requests and returns the source of a receive.
Started = tuple[list[Any], Callable[[list[Any]], int | None]]


_NATIVE = {"SUM": "SUM", "AVG": "SUM", "PREMUL_SUM": "SUM", "PRODUCT": "PROD"}
_LOGICAL = {
    **{"SUM": "LOR", "MAX": "LOR", "BOR": "LOR", "BXOR": "LXOR"},
    **{"PRODUCT": "LAND", "MIN": "LAND", "BAND": "LAND"},
}


@cache
def mpi() -> Any:
    """mpi4py's MPI module, which initialises MPI; ImportError names the extra that brings it."""
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise ImportError(
            "the backend 'mpi' needs mpi4py and an MPI library: pip install 'dtrain[mpi]'"
        ) from error
    return MPI


def start(call: Any, comm: Any) -> Started:
    """Start `call`, whose arguments are valid, on communicator `comm`."""
    if type(call) not in _STARTERS:
        raise DistBackendError(f"{call.kind} is not available on the backend 'mpi'")
    return _STARTERS[type(call)](call, comm)


def _nothing_left(statuses: list[Any]) -> None:
    return None


def _bytes(array: Array) -> Array:
    return array.reshape(-1).view(np.uint8)


def _apart(inp: Array, out: Array | None) -> Array:
    """`inp`, copied where it shares memory with `out`: MPI forbids that."""
    return inp.copy() if out is not None and np.may_share_memory(inp, out) else inp


# ---- reductions


def _prepared(op: ReduceOp, buf: Array) -> Array:
    """This rank's contribution in a dtype that MPI knows: `buf` itself where nothing changes."""
    work = buf.astype(np.float32) if buf.dtype.kind in "fV" and buf.itemsize == 2 else buf
    if op.factor is None:
        return work
    with np.errstate(all="ignore"):
        np.multiply(work, work.dtype.type(op.factor), out=(scaled := np.empty_like(work)))
    return scaled


def _deliver(op: ReduceOp, total: Array, out: Array, size: int) -> None:
    with np.errstate(all="ignore"):
        if op.name == "AVG":
            np.divide(total, total.dtype.type(size), out=total)
        if total is not out:
            np.copyto(out.reshape(-1), total.reshape(-1), casting="same_kind")


def _operator(op: ReduceOp, dtype: np.dtype[Any]) -> Any:
    if dtype.kind == "b":
        return getattr(mpi(), _LOGICAL[op.name])
    if op.name in _NATIVE:
        return getattr(mpi(), _NATIVE[op.name])
    return getattr(mpi(), op.name) if dtype.kind in "iu" else _nan_wins(op.name, dtype)


@cache
def _nan_wins(name: str, dtype: np.dtype[Any]) -> Any:
    """MIN or MAX as an operator of our own: MPI does not say what its own make of NaN."""
    ufunc = np.minimum if name == "MIN" else np.maximum

    def combine(given: Any, total: Any, datatype: Any) -> None:
        left, right = np.frombuffer(given, dtype), np.frombuffer(total, dtype)
        with np.errstate(all="ignore"):
            ufunc(left, right, out=right)

    return mpi().Op.Create(combine, commute=True)


def _all_reduce(call: c.AllReduce, comm: Any) -> Started:
    work = _prepared(call.op, call.buf)
    request = comm.Iallreduce(mpi().IN_PLACE, work, _operator(call.op, work.dtype))

    def finish(statuses: list[Any]) -> None:
        _deliver(call.op, work, call.buf, comm.size)

    return [request], finish


def _reduce(call: c.Reduce, comm: Any) -> Started:
    work = _prepared(call.op, call.buf)
    operator = _operator(call.op, work.dtype)
    if comm.rank != call.root:
        return [comm.Ireduce(work, None, operator, call.root)], _nothing_left
    request = comm.Ireduce(mpi().IN_PLACE, work, operator, call.root)

    def finish(statuses: list[Any]) -> None:
        _deliver(call.op, work, call.buf, comm.size)

    return [request], finish


def _reduce_scatter(call: c.ReduceScatter, comm: Any) -> Started:
    work = _prepared(call.op, _apart(call.inp, call.out))
    total = call.out if work.dtype == call.out.dtype else np.empty(call.out.shape, work.dtype)
    request = comm.Ireduce_scatter_block(work, total, _operator(call.op, work.dtype))

    def finish(statuses: list[Any]) -> None:
        _deliver(call.op, total, call.out, comm.size)

    return [request], finish


# ---- moves


def _broadcast(call: c.Broadcast, comm: Any) -> Started:
    buf = call.buf if call.buf.flags.writeable else call.buf.copy()
    return [comm.Ibcast(_bytes(buf), call.root)], _nothing_left


def _all_gather(call: c.AllGather, comm: Any) -> Started:
    inp = _apart(call.inp, call.out)
    return [comm.Iallgather(_bytes(inp), _bytes(call.out))], _nothing_left


def _gather(call: c.Gather, comm: Any) -> Started:
    inp = _apart(call.inp, call.out)
    out = None if call.out is None else _bytes(call.out)
    return [comm.Igather(_bytes(inp), out, call.root)], _nothing_left


def _scatter(call: c.Scatter, comm: Any) -> Started:
    inp = None if call.inp is None else _bytes(_apart(call.inp, call.out))
    return [comm.Iscatter(inp, _bytes(call.out), call.root)], _nothing_left


def _all_to_all(call: c.AllToAll, comm: Any) -> Started:
    ends = []
    for array, splits in ((call.inp, call.inp_splits), (call.out, call.out_splits)):
        counts = [part.nbytes for part in c._parts(array, splits, comm.size)]
        ends.append([_bytes(array), counts, mpi().BYTE])
    return [comm.Ialltoallv(*ends)], _nothing_left


def _barrier(call: c.Barrier, comm: Any) -> Started:
    return [comm.Ibarrier()], _nothing_left


def _reduce_shards(call: ReduceShards, comm: Any) -> Started:
    parts = np.concatenate([packed(call.inp, cuts) for cuts in call.cuts])
    work = _prepared(call.op, parts.astype(call.out.dtype, copy=False))
    total = np.empty(call.out.shape, work.dtype)
    counts = [length(cuts) for cuts in call.cuts]
    request = comm.Ireduce_scatter(work, total, counts, _operator(call.op, work.dtype))

    def finish(statuses: list[Any]) -> None:
        _deliver(call.op, total, call.out, comm.size)

    return [request], finish


def _gather_shards(call: GatherShards, comm: Any) -> Started:
    counts = [length(cuts) * call.inp.itemsize for cuts in call.cuts]
    parts = np.empty(sum(counts), np.uint8)
    request = comm.Iallgatherv(_bytes(call.inp), [parts, counts, mpi().BYTE])

    def finish(statuses: list[Any]) -> None:
        for own, cuts in zip(np.split(parts, np.cumsum(counts)[:-1]), call.cuts, strict=True):
            unpack(own.view(call.out.dtype), call.out, cuts)

    return [request], finish


def _send(call: Send, comm: Any) -> Started:
    return [comm.Isend(_bytes(call.buf), call.dst, call.tag)], _nothing_left


def _recv(call: Recv, comm: Any) -> Started:
    source = mpi().ANY_SOURCE if call.src is None else call.src
    request = comm.Irecv(_bytes(call.buf), source, call.tag)

    def finish(statuses: list[Any]) -> int:
        sender, got = statuses[0].Get_source(), statuses[0].Get_count(mpi().BYTE)
        if got != call.buf.nbytes:
            raise WrongSize(sender, got, call.buf.nbytes)
        return int(sender)

    return [request], finish


_STARTERS: dict[type, Callable[[Any, Any], Started]] = {
    **{c.AllReduce: _all_reduce, c.Reduce: _reduce, c.ReduceScatter: _reduce_scatter},
    **{c.Broadcast: _broadcast, c.AllGather: _all_gather, c.AllToAll: _all_to_all},
    **{c.Gather: _gather, c.Scatter: _scatter, c.Barrier: _barrier},
    **{ReduceShards: _reduce_shards, GatherShards: _gather_shards},
    **{Send: _send, Recv: _recv},
}
