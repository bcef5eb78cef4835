"""Parameters from their owners to all ranks: one flat message for each owner.

Owns `owners`, the partition, and `Carriers`, the messages. Rule: a parameter belongs to one rank
and is never split.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dtrain.autograd.node import make
from dtrain.comm.collectives import Broadcast
from dtrain.comm.work import Work
from dtrain.distributed.world import ProcessGroup
from dtrain.flat import FlatBuffer
from dtrain.ops.inplace import bump


def owners(sizes: Sequence[int], loads: list[int]) -> list[int]:
    """The owner of each of `sizes` elements, largest first to whoever has least; adds to `loads`.

    Ties go to the lower index. Source: torch's ZeroRedundancyOptimizer, sorted greedy.
    """
    found = [0] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        found[i] = rank = loads.index(min(loads))
        loads[rank] += sizes[i]
    return found


class Carriers:
    """The messages that bring `parameters` from their owners, `{parameter: group rank}`, to all.

    In memory that ranks share, where they share a host. `as_views`: the parameters themselves move
    there, and nothing is copied. Sends the bytes of the parameters, N - 1 times, in one broadcast
    for each owner.
    """

    def __init__(
        self,
        parameters: Sequence[Any],
        owner_of: dict[Any, int],
        group: ProcessGroup,
        as_views: bool = False,
    ) -> None:
        self.group, self.as_views = group, as_views
        self.parameters = list(parameters)
        self.cargo: list[tuple[int, list[Any], FlatBuffer]] = []
        for rank in range(group.size()):
            theirs = [p for p in self.parameters if owner_of[p] == rank]
            if not theirs:
                continue
            arrays = [p._data for p in theirs]
            buffer = FlatBuffer.of(arrays, allocate=group.arrays.empty)
            self.cargo.append((rank, theirs, buffer))
            for parameter, view in zip(theirs, buffer.views, strict=True) if as_views else ():
                parameter.data = make(view)

    def nbytes(self) -> int:
        """Bytes of this rank's own message."""
        return sum(b.array.nbytes for rank, _, b in self.cargo if rank == self.group.rank())

    def send(self) -> list[Work]:
        """Issue the broadcasts; when they are complete, call `arrive`. Does not block."""
        works = []
        for rank, theirs, buffer in self.cargo:
            if rank == self.group.rank() and not self.as_views:
                buffer.copy_in([p._data for p in theirs])
            works.append(self.group.issue(Broadcast(buffer.array, rank), async_op=True))
        return works

    def arrive(self) -> None:
        """Bring what has come to the parameters of others."""
        for rank, theirs, buffer in self.cargo:
            if rank == self.group.rank():
                continue
            for parameter, view in zip(theirs, buffer.views, strict=True):
                if not self.as_views:
                    np.copyto(parameter._data, view)
                bump(parameter)
