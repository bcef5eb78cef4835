"""How the parameters of a unit lie in one flat array, and which rows of each belong to which rank.

Owns: `Layout`, pure arithmetic that all ranks do alike. Rules: parameters stand one after the other
in the order given, each aligned to a cache line; each is cut along dimension 0 as `torch.chunk`
cuts, so that the last ranks may have fewer rows, or none. Nothing is padded to equal shards.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from dtrain.comm.parts import Cuts
from dtrain.flat import Array

Shape = tuple[int, ...]

_LINE = 64  # bytes


class Layout:
    """The places of parameters of these shapes, all of `dtype`, among `size` ranks.

    `total` elements in all. `offsets[i]`: where parameter i starts. `cuts[r]`: what belongs to rank
    r, as pieces of the flat array.
    """

    def __init__(self, shapes: Sequence[Shape], dtype: Any, size: int) -> None:
        self.shapes, self.dtype, self.size = list(shapes), np.dtype(dtype), size
        sizes = [math.prod(shape) for shape in shapes]
        step = max(1, _LINE // self.dtype.itemsize)
        self.offsets, self.total = [], 0
        for count in sizes:
            self.offsets.append(self.total)
            self.total += -(-count // step) * step
        self.cuts: list[Cuts] = [
            [cut for cut in map(self._cut, range(len(shapes)), [rank] * len(shapes))
             if cut.start < cut.stop]
            for rank in range(size)
        ]  # fmt: skip

    def rows(self, index: int, rank: int) -> slice:
        """The rows of a parameter that a rank owns."""
        count = self.shapes[index][0]
        step = -(-count // self.size)
        return slice(min(rank * step, count), min((rank + 1) * step, count))

    def shard_shape(self, index: int, rank: int) -> Shape:
        """The shape of what a rank owns of a parameter."""
        rows = self.rows(index, rank)
        return (rows.stop - rows.start, *self.shapes[index][1:])

    def _cut(self, index: int, rank: int) -> slice:
        width, rows = math.prod(self.shapes[index][1:]), self.rows(index, rank)
        at = self.offsets[index]
        return slice(at + rows.start * width, at + rows.stop * width)

    def views(self, flat: Array) -> list[Array]:
        """The whole parameters in `flat`."""
        return [
            flat[at : at + math.prod(shape)].reshape(shape)
            for at, shape in zip(self.offsets, self.shapes, strict=True)
        ]

    def own_views(self, flat: Array, rank: int) -> list[Array]:
        """What a rank owns of each parameter, in the flat array of the whole unit."""
        return [view[self.rows(index, rank)] for index, view in enumerate(self.views(flat))]

    def shard_views(self, packed: Array, rank: int) -> list[Array]:
        """What a rank owns of each parameter, in an array of its own pieces one after the other."""
        return list(self._parts(packed, rank))

    def _parts(self, packed: Array, rank: int) -> Iterator[Array]:
        at = 0
        for index in range(len(self.shapes)):
            shape = self.shard_shape(index, rank)
            count = math.prod(shape)
            yield packed[at : at + count].reshape(shape)
            at += count
