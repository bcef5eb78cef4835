"""Where ranks are: which of them share a host, which of them make a sub-group.

Owns: the identity of a host as ranks tell it to each other when they meet, and `Placement`, what
follows from it. It is what they say and not what environment variables say, so it holds for any
sub-group, and all ranks conclude the same. `members_of`: who a sub-group has.
"""

from __future__ import annotations

import functools
import socket
from collections.abc import Sequence
from pathlib import Path

__all__ = ["Placement", "host_id", "members_of"]

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@functools.cache
def host_id() -> str:
    """Equal for two processes exactly when they run on the same boot of the same host (or
    container).
    """
    boot = _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else "?"
    return f"{socket.gethostname()}/{boot}"


def members_of(ranks: Sequence[int], rank: int, size: int) -> list[int]:
    """The ranks of a sub-group that `rank` of `size` asks for; ValueError if there is none such."""
    members = list(ranks)
    if len(set(members)) != len(members) or not set(members) <= set(range(size)):
        raise ValueError(f"split: {members} are not distinct ranks of range({size})")
    if rank not in members:
        raise ValueError(f"split: rank {rank} is not one of {members}; only members call it")
    return members


class Placement:
    """The ranks of each host, in the order of the hosts' first ranks. `ids[r]`: the host of r.

    In an exchange over hosts each rank sends to one rank of every other host, its carrier there:
    the ranks of a host are dealt out to those of the other in turn.
    """

    def __init__(self, ids: Sequence[str]) -> None:
        by_id: dict[str, list[int]] = {}
        for rank, name in enumerate(ids):
            by_id.setdefault(name, []).append(rank)
        self.hosts = list(by_id.values())
        self.host_of = [
            next(h for h, r in enumerate(self.hosts) if k in r) for k in range(len(ids))
        ]

    @property
    def in_runs(self) -> bool:
        """Whether each host has consecutive ranks, so that a sum can go from host to host."""
        return [r for ranks in self.hosts for r in ranks] == list(range(len(self.host_of)))

    def carrier(self, rank: int, host: int) -> int:
        """Who on `host` takes what `rank`, of another host, sends there."""
        there = self.hosts[host]
        return there[self.hosts[self.host_of[rank]].index(rank) % len(there)]

    def carried(self, rank: int) -> list[int]:
        """The ranks of other hosts that `rank` is the carrier of, on its host."""
        here = self.host_of[rank]
        others = [r for r, host in enumerate(self.host_of) if host != here]
        return [r for r in others if self.carrier(r, here) == rank]
