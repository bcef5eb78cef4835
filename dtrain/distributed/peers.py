"""The ranks of a group for code that must not know of communication (`dtrain.ranks.Peers`).

SyncBatchNorm asks for it. Rules: arrays in, new arrays out; each call is one collective.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dtrain.comm.collectives import AllGather, AllReduce
from dtrain.distributed.world import ProcessGroup, current_world, resolve

Array = np.ndarray[Any, Any]


class GroupPeers:
    """`Peers` over a process group."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group

    def gather(self, values: Array) -> Array:
        rows = np.empty((self.group.size(), values.size), values.dtype)
        self.group.issue(AllGather(values, rows))
        return rows

    def sum(self, values: Array) -> Array:
        total = values.copy()
        self.group.issue(AllReduce(total))
        return total


def peers_of(group: Any) -> GroupPeers | None:
    """The other ranks of `group`; None before `init_process_group` and in a group of one."""
    if group is None and current_world().default is None:
        return None
    where = resolve(group)
    return None if where.size() == 1 else GroupPeers(where)
