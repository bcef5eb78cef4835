"""Worlds that span hosts, made of thread ranks on one: each is told which host it is on.

`placed("aba")` is a transport factory for three ranks, the first and the last of which are on one
host; `islands(2, 1)` is `placed("001")`. `pairs` serves any number of ranks, two to a host.
"""

from __future__ import annotations

from dtrain.comm.transports.shm import ShmTransport

__all__ = ["islands", "pairs", "placed"]


class placed:
    """`hosts[r]` is where rank r is."""

    def __init__(self, hosts):
        self.hosts = list(hosts)

    def __call__(self, store, rank, size, timeout):
        return ShmTransport(store, rank, size, timeout, host=str(self.hosts[rank]))

    def __repr__(self):
        return f"shm on hosts {self.hosts}"


def islands(*sizes):
    return placed([h for h, size in enumerate(sizes) for _ in range(size)])


def pairs(store, rank, size, timeout):
    return ShmTransport(store, rank, size, timeout, host=str(rank // 2))
