"""The collectives of sharded arrays: each rank owns some pieces of a flat array.

Owns: `ReduceShards` and `GatherShards`, as `collectives` has the others. `cuts[r]` are the pieces
that belong to rank r (`parts.Cuts`), alike on all ranks; packed, they stand one after the other,
and ranks may have different numbers of elements, none too. Nothing is padded, and parameters can
lie in a unit one after the other, each cut along its first dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dtrain.comm import algorithms
from dtrain.comm.arrays import check_array, describe
from dtrain.comm.channel import Channel
from dtrain.comm.collectives import Collective, Outputs
from dtrain.comm.parts import Cuts, length, packed, unpack
from dtrain.comm.reduce import SUM, ReduceOp, check_op, combine, widened
from dtrain.comm.transports.mailbox import Array

__all__ = ["GatherShards", "ReduceShards"]


@dataclass(slots=True)
class ReduceShards(Collective):
    """Combine `inp` of all ranks and leave the pieces of rank r in `out` of rank r, packed.

    Pieces may belong to several ranks. `out` has the dtype of `inp`; or the wider one in which
    16-bit floats are accumulated, and then it is not rounded. `label`: what it is, which must be
    the same on all ranks.
    """

    inp: Array
    out: Array
    cuts: Sequence[Cuts]
    op: ReduceOp = SUM
    label: str = ""
    kind: ClassVar[str] = "reduce_shards"

    @staticmethod
    def reference(ranks: Sequence[ReduceShards]) -> Outputs:
        first = ranks[0]
        total = np.empty(first.inp.shape, first.out.dtype)
        combine(first.op, [np.copy(r.inp) for r in ranks], total)
        return [np.copy(packed(total, cuts)) for cuts in first.cuts]

    def run(self, channel: Channel) -> None:
        algorithms.reduce_shards(channel, self.inp, self.out, self.cuts, self.op)

    def validate(self, rank: int, size: int) -> None:
        check_array(self.inp, self.kind, writable=False)
        check_array(self.out, self.kind, writable=True)
        _check_shards(self.kind, self.inp, self.out, self.cuts, rank, size)
        if self.out.dtype not in (self.inp.dtype, widened(self.inp.dtype)):
            raise TypeError(f"{self.kind}: {describe(self.inp)} into {describe(self.out)}")
        if np.may_share_memory(self.inp, self.out):
            raise ValueError(f"{self.kind}: inp and out overlap")
        check_op(self.op, self.inp.dtype, self.kind)

    @property
    def signature(self) -> str:
        into = "" if self.out.dtype == self.inp.dtype else f", {self.out.dtype}"
        return f"reduce_shards({describe(self.inp)}{into}, op={self.op}{_named(self.label)})"

    @property
    def output(self) -> Array | None:
        return self.out

    @property
    def nbytes(self) -> int:
        return int(self.inp.nbytes)


@dataclass(slots=True)
class GatherShards(Collective):
    """Put the packed `inp` of every rank into the pieces of `out` that belong to it, everywhere.

    `shared`: `out` is one array for all ranks of a host (`sharing.share`); when the call is
    complete all of it may be read. Nobody may read it from before the first rank's call until then.
    `label`: what it is, which must be the same on all ranks.
    """

    inp: Array
    out: Array
    cuts: Sequence[Cuts]
    shared: bool = False
    label: str = ""
    kind: ClassVar[str] = "gather_shards"

    @staticmethod
    def reference(ranks: Sequence[GatherShards]) -> Outputs:
        whole = np.copy(ranks[0].out)
        for rank, cuts in zip(ranks, ranks[0].cuts, strict=True):
            unpack(rank.inp, whole, cuts)
        return [np.copy(whole) for _ in ranks]

    def run(self, channel: Channel) -> None:
        algorithms.gather_shards(channel, self.inp, self.out, self.cuts, self.shared)

    def validate(self, rank: int, size: int) -> None:
        check_array(self.inp, self.kind, writable=False)
        check_array(self.out, self.kind, writable=True)
        _check_shards(self.kind, self.out, self.inp, self.cuts, rank, size)
        if self.inp.dtype != self.out.dtype:
            raise TypeError(f"{self.kind}: {describe(self.inp)} into {describe(self.out)}")

    @property
    def signature(self) -> str:
        return f"gather_shards({describe(self.out)}{', shared' * self.shared}{_named(self.label)})"

    @property
    def output(self) -> Array | None:
        return self.out


def _named(label: str) -> str:
    return f", '{label}'" if label else ""


def _check_shards(
    kind: str, flat: Array, shard: Array, cuts: Sequence[Cuts], rank: int, size: int
) -> None:
    if flat.ndim != 1 or shard.ndim != 1:
        raise ValueError(f"{kind}: expected flat arrays, got {describe(flat)}, {describe(shard)}")
    if len(cuts) != size or any(cut.stop > flat.size for own in cuts for cut in own):
        raise ValueError(f"{kind}: expected pieces of {describe(flat)} for {size} ranks")
    if length(cuts[rank]) != shard.size:
        raise ValueError(
            f"{kind}: rank {rank} owns {length(cuts[rank])} elements, its part is {describe(shard)}"
        )
