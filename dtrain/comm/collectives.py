"""The collectives as data: one small class each, with its meaning and the algorithm that carries it
out.

Owns: the classes that `ProcessGroup.submit` takes, except point-to-point (`point_to_point`). Each
has `reference(ranks)`, the executable specification: from the fields of all ranks at once (inputs
untouched), the array that the call must leave on each rank (None: nothing). Arrays are NumPy,
C-contiguous, of any dtype without objects; shapes and dtypes are checked at `submit`, before
anything is sent. Ranks are ranks of the group.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from dtrain.comm import algorithms
from dtrain.comm.arrays import check_array, check_pair, describe, dtype_name
from dtrain.comm.channel import Channel
from dtrain.comm.reduce import SUM, ReduceOp, check_op, combine
from dtrain.comm.transports.mailbox import Array

__all__ = [
    "AllGather",
    "AllReduce",
    "AllToAll",
    "Barrier",
    "Broadcast",
    "Collective",
    "Gather",
    "Reduce",
    "ReduceScatter",
    "Scatter",
]

Outputs = list[Array | None]


def _check_root(root: int, size: int, what: str) -> None:
    if not 0 <= root < size:
        raise ValueError(f"{what}: root {root} is not a rank of this group (range({size}))")


def _reduced(op: ReduceOp, arrays: Sequence[Array]) -> Array:
    total = np.empty_like(arrays[0])
    combine(op, [np.copy(a) for a in arrays], total)
    return total


class Collective(ABC):
    """A call that all ranks of a group make together, in the same order."""

    __slots__ = ()

    kind: ClassVar[str]
    # Whether some ranks may come long after the others, in good order.
    patient: ClassVar[bool] = False

    @staticmethod
    @abstractmethod
    def reference(ranks: Sequence[Any]) -> Outputs:
        """What the call leaves in `output` on every rank, given the fields of all ranks."""

    @abstractmethod
    def run(self, channel: Channel) -> None:
        """Do this rank's part."""

    @abstractmethod
    def validate(self, rank: int, size: int) -> None:
        """Raise TypeError, ValueError or RuntimeError for fields that make no sense here."""

    @property
    @abstractmethod
    def signature(self) -> str:
        """The call in words; must be equal on all ranks."""

    @property
    @abstractmethod
    def output(self) -> Array | None:
        """The array that holds the result on this rank."""

    @property
    def nbytes(self) -> int:
        """Bytes of the array that names the size of the call."""
        return 0 if self.output is None else int(self.output.nbytes)


@dataclass(slots=True)
class AllReduce(Collective):
    """Combine `buf` of all ranks and leave the result in `buf` everywhere."""

    buf: Array
    op: ReduceOp = SUM
    kind: ClassVar[str] = "all_reduce"

    @staticmethod
    def reference(ranks: Sequence[AllReduce]) -> Outputs:
        return [_reduced(ranks[0].op, [r.buf for r in ranks]) for _ in ranks]

    def run(self, channel: Channel) -> None:
        algorithms.all_reduce(channel, self.buf, self.op)

    def validate(self, rank: int, size: int) -> None:
        check_op(self.op, check_array(self.buf, self.kind, writable=True).dtype, self.kind)

    @property
    def signature(self) -> str:
        return f"all_reduce({describe(self.buf)}, op={self.op})"

    @property
    def output(self) -> Array | None:
        return self.buf


@dataclass(slots=True)
class Broadcast(Collective):
    """Copy `buf` of `root` into `buf` everywhere."""

    buf: Array
    root: int = 0
    kind: ClassVar[str] = "broadcast"

    @staticmethod
    def reference(ranks: Sequence[Broadcast]) -> Outputs:
        return [np.copy(ranks[ranks[0].root].buf) for _ in ranks]

    def run(self, channel: Channel) -> None:
        algorithms.broadcast(channel, self.buf, self.root)

    def validate(self, rank: int, size: int) -> None:
        _check_root(self.root, size, self.kind)
        check_array(self.buf, self.kind, writable=rank != self.root)

    @property
    def signature(self) -> str:
        return f"broadcast({describe(self.buf)}, src={self.root})"

    @property
    def output(self) -> Array | None:
        return self.buf


@dataclass(slots=True)
class Reduce(Collective):
    """Combine `buf` of all ranks into `buf` of `root`; elsewhere `buf` keeps its values."""

    buf: Array
    root: int = 0
    op: ReduceOp = SUM
    kind: ClassVar[str] = "reduce"

    @staticmethod
    def reference(ranks: Sequence[Reduce]) -> Outputs:
        total = _reduced(ranks[0].op, [r.buf for r in ranks])
        return [total if k == r.root else np.copy(r.buf) for k, r in enumerate(ranks)]

    def run(self, channel: Channel) -> None:
        algorithms.reduce(channel, self.buf, self.root, self.op)

    def validate(self, rank: int, size: int) -> None:
        _check_root(self.root, size, self.kind)
        check_array(self.buf, self.kind, writable=rank == self.root)
        check_op(self.op, self.buf.dtype, self.kind)

    @property
    def signature(self) -> str:
        return f"reduce({describe(self.buf)}, dst={self.root}, op={self.op})"

    @property
    def output(self) -> Array | None:
        return self.buf


@dataclass(slots=True)
class AllGather(Collective):
    """Put `inp` of all ranks one after the other into `out` everywhere.

    `out` has N times the elements.
    """

    inp: Array
    out: Array
    kind: ClassVar[str] = "all_gather"

    @staticmethod
    def reference(ranks: Sequence[AllGather]) -> Outputs:
        joined = np.concatenate([r.inp.reshape(-1) for r in ranks])
        return [joined.reshape(r.out.shape) for r in ranks]

    def run(self, channel: Channel) -> None:
        algorithms.all_gather(channel, self.inp, self.out)

    def validate(self, rank: int, size: int) -> None:
        check_array(self.inp, self.kind, writable=False)
        check_array(self.out, self.kind, writable=True)
        check_pair(self.out, self.inp, size, self.kind)

    @property
    def signature(self) -> str:
        return f"all_gather({describe(self.inp)})"

    @property
    def output(self) -> Array | None:
        return self.out


@dataclass(slots=True)
class Gather(Collective):
    """Put `inp` of all ranks one after the other into `out` of `root`; `out` is None elsewhere."""

    inp: Array
    out: Array | None = None
    root: int = 0
    kind: ClassVar[str] = "gather"

    @staticmethod
    def reference(ranks: Sequence[Gather]) -> Outputs:
        joined = np.concatenate([r.inp.reshape(-1) for r in ranks])
        return [None if r.out is None else joined.reshape(r.out.shape) for r in ranks]

    def run(self, channel: Channel) -> None:
        algorithms.gather(channel, self.inp, self.out, self.root)

    def validate(self, rank: int, size: int) -> None:
        _check_root(self.root, size, self.kind)
        check_array(self.inp, self.kind, writable=False)
        if rank == self.root:
            check_array(self.out, "gather on the destination rank", writable=True)
            assert self.out is not None
            check_pair(self.out, self.inp, size, self.kind)
        elif self.out is not None:
            raise ValueError("gather: out must be None on all ranks but the destination")

    @property
    def signature(self) -> str:
        return f"gather({describe(self.inp)}, dst={self.root})"

    @property
    def output(self) -> Array | None:
        return self.out

    @property
    def nbytes(self) -> int:
        return int(self.inp.nbytes)


@dataclass(slots=True)
class Scatter(Collective):
    """Cut `inp` of `root` in N equal parts and put part r into `out` of rank r.

    `inp` is None elsewhere.
    """

    inp: Array | None
    out: Array
    root: int = 0
    kind: ClassVar[str] = "scatter"

    @staticmethod
    def reference(ranks: Sequence[Scatter]) -> Outputs:
        whole = ranks[ranks[0].root].inp
        assert whole is not None
        parts = np.split(whole.reshape(-1), len(ranks))
        return [np.copy(part).reshape(r.out.shape) for part, r in zip(parts, ranks, strict=True)]

    def run(self, channel: Channel) -> None:
        algorithms.scatter(channel, self.inp, self.out, self.root)

    def validate(self, rank: int, size: int) -> None:
        _check_root(self.root, size, self.kind)
        check_array(self.out, self.kind, writable=True)
        if rank == self.root:
            check_array(self.inp, "scatter on the source rank", writable=False)
            assert self.inp is not None
            check_pair(self.inp, self.out, size, self.kind)
        elif self.inp is not None:
            raise ValueError("scatter: inp must be None on all ranks but the source")

    @property
    def signature(self) -> str:
        return f"scatter({describe(self.out)}, src={self.root})"

    @property
    def output(self) -> Array | None:
        return self.out


@dataclass(slots=True)
class ReduceScatter(Collective):
    """Combine `inp` of all ranks and leave part r of the result in `out` of rank r."""

    inp: Array
    out: Array
    op: ReduceOp = SUM
    kind: ClassVar[str] = "reduce_scatter"

    @staticmethod
    def reference(ranks: Sequence[ReduceScatter]) -> Outputs:
        total = _reduced(ranks[0].op, [r.inp.reshape(-1) for r in ranks])
        parts = np.split(total, len(ranks))
        return [np.copy(part).reshape(r.out.shape) for part, r in zip(parts, ranks, strict=True)]

    def run(self, channel: Channel) -> None:
        algorithms.reduce_scatter(channel, self.inp, self.out, self.op)

    def validate(self, rank: int, size: int) -> None:
        check_array(self.inp, self.kind, writable=False)
        check_array(self.out, self.kind, writable=True)
        check_pair(self.inp, self.out, size, self.kind)
        check_op(self.op, self.inp.dtype, self.kind)

    @property
    def signature(self) -> str:
        return f"reduce_scatter({describe(self.out)}, op={self.op})"

    @property
    def output(self) -> Array | None:
        return self.out


@dataclass(slots=True)
class AllToAll(Collective):
    """Send part r of `inp` to rank r, and put what rank r sends into part r of `out`.

    Parts are along the first axis: `inp_splits` and `out_splits` give their lengths (default: equal
    parts). How many rows rank a sends to rank b must be what b expects from a.
    """

    inp: Array
    out: Array
    inp_splits: Sequence[int] | None = None
    out_splits: Sequence[int] | None = None
    kind: ClassVar[str] = "all_to_all"

    @staticmethod
    def reference(ranks: Sequence[AllToAll]) -> Outputs:
        size = len(ranks)
        sent = [_parts(r.inp, r.inp_splits, size) for r in ranks]
        received = [np.concatenate([sent[src][dst] for src in range(size)]) for dst in range(size)]
        return [flat.reshape(r.out.shape) for flat, r in zip(received, ranks, strict=True)]

    def run(self, channel: Channel) -> None:
        outgoing = _parts(self.inp, self.inp_splits, channel.size)
        incoming = _parts(self.out, self.out_splits, channel.size)
        algorithms.all_to_all(channel, outgoing, incoming)

    def validate(self, rank: int, size: int) -> None:
        check_array(self.inp, self.kind, writable=False)
        check_array(self.out, self.kind, writable=True)
        if self.inp.dtype != self.out.dtype or self.inp.shape[1:] != self.out.shape[1:]:
            raise ValueError(
                f"all_to_all: {describe(self.inp)} and {describe(self.out)} must have the same"
                " dtype and the same shape but for the first dimension"
            )
        if np.may_share_memory(self.inp, self.out):
            raise ValueError("all_to_all: inp and out overlap")
        own = (
            _splits(self.inp, self.inp_splits, size)[rank],
            _splits(self.out, self.out_splits, size)[rank],
        )
        if own[0] != own[1]:
            raise ValueError(
                f"all_to_all: rank {rank} sends {own[0]} rows to itself, expects {own[1]}"
            )

    @property
    def signature(self) -> str:
        rows = ", ".join(["*", *map(str, self.inp.shape[1:])])
        return f"all_to_all({dtype_name(self.inp.dtype)}[{rows}])"

    @property
    def output(self) -> Array | None:
        return self.out


def _splits(array: Array, splits: Sequence[int] | None, size: int) -> list[int]:
    """How many rows of `array` belong to each rank."""
    if array.ndim == 0:
        raise ValueError("all_to_all: a 0-dimensional array has no parts")
    rows = array.shape[0]
    if splits is None:
        if rows % size:
            raise ValueError(f"all_to_all: {rows} rows do not divide into {size} equal parts")
        return [rows // size] * size
    if len(splits) != size or sum(splits) != rows or min(splits) < 0:
        raise ValueError(
            f"all_to_all: expected {size} splits that sum to {rows}, got {list(splits)}"
        )
    return list(splits)


def _parts(array: Array, splits: Sequence[int] | None, size: int) -> list[Array]:
    ends = np.cumsum(_splits(array, splits, size))[:-1]
    return [part.reshape(-1) for part in np.split(array, ends)]


@dataclass(slots=True)
class Barrier(Collective):
    """Return when all ranks have called it."""

    kind: ClassVar[str] = "barrier"

    @staticmethod
    def reference(ranks: Sequence[Barrier]) -> Outputs:
        return [None for _ in ranks]

    def run(self, channel: Channel) -> None:
        algorithms.barrier(channel)

    def validate(self, rank: int, size: int) -> None:
        """Nothing to check."""

    @property
    def signature(self) -> str:
        return "barrier()"

    @property
    def output(self) -> Array | None:
        return None
