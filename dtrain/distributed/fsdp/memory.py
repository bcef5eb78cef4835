"""Where the parameters of a unit are when they are whole, and where its gradients are made.

Owns: `Shared`, `OnHosts` and `Private`, the three homes of an unsharded unit, and `Pool`, which
lends the flat arrays of gradients. Rules: 1. On one host the ranks' shards are slices of one array
that all of them see: to gather is to wait for who still writes. 2. Over several hosts with shared
memory each host keeps such an array; what belongs to the others is gathered into it once after each
change. Not where hosts have one rank each, nor where units are to be given back by all means.
3. Else a rank gathers into pages of its own, which go back to the machine at `release`; the address
stays, so that what autograd has saved of it is right again when it is gathered again.
"""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np

from dtrain.comm.shards import GatherShards
from dtrain.comm.sharing import share
from dtrain.comm.work import Work
from dtrain.distributed.fsdp.hooks import gather_by
from dtrain.distributed.fsdp.layout import Layout
from dtrain.distributed.fsdp.offload import mapped
from dtrain.distributed.world import ProcessGroup
from dtrain.flat import Array


class Home:
    """`array` holds the unit while it is whole, in `dtype`; `shards[i]` is what this rank owns of
    parameter i, in the dtype of the layout.
    """

    # Whether gathering moves anything: else other ranks read what this one writes into its shards.
    moves = True
    # Whether `array` keeps its values until the parameters change.
    stays = True

    array: Array
    shards: list[Array]

    def publish(self) -> None:
        """Bring this rank's shards into `array`, where that is something else."""

    def gather(self, group: ProcessGroup, label: str, async_op: bool) -> Work | None:
        """Fill `array` from all shards; None: there is nothing to wait for."""
        raise NotImplementedError

    def gather_by(self, comm: Any, group: ProcessGroup) -> None:
        """The same by the user's all-gather; blocks for it. Nothing where nothing moves."""

    def release(self) -> None:
        """`array` is not read until it is gathered again."""


class Shared(Home):
    """One array for all ranks of the group. In the dtype of the layout, the shards lie in it."""

    moves = False

    def __init__(self, layout: Layout, rank: int, array: Array, packed: Array | None) -> None:
        self.array, self._packed = array, packed
        if packed is None:
            self.shards = layout.own_views(array, rank)
        else:
            self.shards = layout.shard_views(packed, rank)
            self._own = layout.own_views(array, rank)

    def publish(self) -> None:
        if self._packed is not None:
            for own, shard in zip(self._own, self.shards, strict=True):
                np.copyto(own, shard, casting="unsafe")

    def gather(self, group: ProcessGroup, label: str, async_op: bool) -> Work | None:
        return None


class _Gathered(Home):
    """Shards of this rank, packed, in the dtype in which they travel."""

    def __init__(
        self, layout: Layout, rank: int, array: Array, packed: Array, *, shared: bool
    ) -> None:
        self.array, self._packed, self._shared = array, packed, shared
        self._cuts = layout.cuts
        self.shards = layout.shard_views(packed, rank)

    def gather(self, group: ProcessGroup, label: str, async_op: bool) -> Work | None:
        sent = self._packed.astype(self.array.dtype, copy=False)
        call = GatherShards(sent, self.array, self._cuts, self._shared, label)
        return group.issue(call, async_op=async_op)

    def gather_by(self, comm: Any, group: ProcessGroup) -> None:
        sent = self._packed.astype(self.array.dtype, copy=False)
        gather_by(comm, sent, self.array, self._cuts, group)


class OnHosts(_Gathered):
    """One array for the ranks of each host, which stays until the parameters change."""


class Private(_Gathered):
    """Pages of this rank alone."""

    stays = False

    def __init__(self, layout: Layout, rank: int, dtype: Any, packed: Array) -> None:
        nbytes = layout.total * np.dtype(dtype).itemsize
        self._pages = mmap.mmap(-1, max(1, nbytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        array = np.frombuffer(self._pages, dtype, layout.total)
        super().__init__(layout, rank, array, packed, shared=False)

    def release(self) -> None:
        self._pages.madvise(mmap.MADV_DONTNEED)


def home_for(
    layout: Layout, group: ProcessGroup, dtype: Any, *, given_back: bool, offload: bool = False
) -> Home:
    """Memory for a unit: collective, as all ranks must come to the same kind.

    `given_back`: over several hosts, rather gather it again than keep it on each. `offload`: shards
    are in a file.
    """
    kind, rank = np.dtype(dtype), group.rank()
    if offload:
        count = sum(cut.stop - cut.start for cut in layout.cuts[rank])
        return Private(layout, rank, kind, mapped(count, layout.dtype))
    island = getattr(getattr(group.arrays, "transport", None), "island", None)
    alone = island is not None and all(len(ranks) == 1 for ranks in island.placement.hosts)
    if alone or (island is not None and given_back):
        return Private(layout, rank, kind, _packed(layout, rank))
    array = share(group.arrays, layout.total, kind)
    if array is not None and island is None:
        packed = None if kind == layout.dtype else _packed(layout, rank)
        return Shared(layout, rank, array, packed)
    if array is not None:
        return OnHosts(layout, rank, array, _packed(layout, rank), shared=True)
    return Private(layout, rank, kind, _packed(layout, rank))


def _packed(layout: Layout, rank: int) -> Array:
    return np.empty(sum(cut.stop - cut.start for cut in layout.cuts[rank]), layout.dtype)


class Pool:
    """Flat arrays that are cheap to reduce in `group`, lent again and again.

    `held` bytes are lent or waiting to be; `most` were lent at once.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group
        self._free: list[Array] = []
        self.held = self.lent = self.most = 0

    def take(self, count: int, dtype: Any) -> Array:
        """`count` elements, uninitialised; `give` takes them back."""
        kind = np.dtype(dtype)
        nbytes = count * kind.itemsize
        fitting = [room for room in self._free if room.nbytes >= nbytes]
        if fitting:
            room = min(fitting, key=lambda each: each.nbytes)
            self._free = [each for each in self._free if each is not room]
        else:
            room = self._group.arrays.empty(nbytes, np.uint8)
            self.held += room.nbytes
        self.lent += room.nbytes
        self.most = max(self.most, self.lent)
        return room[:nbytes].view(kind)

    def give(self, array: Array) -> None:
        """Take back what `take` lent."""
        room = array.base if array.base is not None else array
        self.lent -= room.nbytes
        self._free.append(room)
