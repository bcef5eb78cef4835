"""Arrays that the ranks of one host have in common.

Owns: `share`. An array is lent by one of them, each of a host's ranks in turn, so that the memory
of many is charged to all alike; how it is lent is the transport's (`lend`, `borrow`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dtrain.comm.collectives import AllGather, AllReduce
from dtrain.comm.reduce import MAX
from dtrain.comm.transports.base import Transport
from dtrain.comm.transports.mailbox import Array
from dtrain.comm.transports.window import NOWHERE

__all__ = ["share"]


def share(group: Any, shape: int | Sequence[int], dtype: npt.DTypeLike) -> Array | None:
    """An uninitialised array that the ranks of this host have in common: a collective call.

    What one of them writes the others see; who may when is theirs to agree on (a barrier). Its
    memory is used again when all of them have let go of it and its views. None on all ranks of
    `group` when those of some host have no memory to share: on messages alone, on MPI, or where it
    is used up (with a RuntimeWarning). Waits for all ranks; sends a few bytes.
    """
    wanted = (shape,) if isinstance(shape, int) else tuple(shape)
    kind = np.dtype(dtype)
    nbytes = math.prod(wanted) * kind.itemsize
    if group.size == 1 or nbytes == 0:
        return np.empty(wanted, kind)
    transport: Transport | None = getattr(group, "transport", None)
    if transport is None or not transport.neighbours:
        return None
    owner = transport.neighbours[transport.shares % len(transport.neighbours)]
    transport.shares += 1
    mine = np.full(1, transport.lend(nbytes) if owner == group.rank else NOWHERE, np.int64)
    places = np.empty(group.size, np.int64)
    group.submit(AllGather(mine, places))
    place = int(places[owner])
    found = None if place == NOWHERE else transport.borrow(owner, place, nbytes)
    lacks = np.array(found is None)
    group.submit(AllReduce(lacks, MAX))  # when it is complete, all have borrowed
    return None if found is None or lacks else found.view(kind).reshape(wanted)
