"""Ranks with shared memory: collectives go through a `Window`, all else by messages.

Owns: `ShmTransport`, and the decision of all its ranks whether there is memory that they share.
Messages between two ranks, news, goodbyes and deaths are those of `ZmqTransport`. Ranks of one host
(boot and host name, told through the store) make a window, on x86-64 Linux (`futex.AVAILABLE`: the
window relies on its order of stores). When the group spans hosts, the ranks of each make one, an
`Island`, if every host has consecutive ranks and some host has more than one. All ranks decide
alike, by what all have told; else all of them use messages alone: with one line at INFO where the
machines or the placement are not made for windows, with a RuntimeWarning where memory is short.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
import warnings
from collections.abc import Sequence
from typing import Any

from dtrain.comm.store.base import Store
from dtrain.comm.topology import Placement, host_id
from dtrain.comm.transports import futex
from dtrain.comm.transports.handover import Offer
from dtrain.comm.transports.island import Island
from dtrain.comm.transports.mailbox import Array
from dtrain.comm.transports.window import NOWHERE, Segment, Window
from dtrain.comm.transports.zmq import ZmqTransport
from dtrain.errors import PeerLost
from dtrain.wire import dumps, loads

__all__ = ["ShmTransport"]

# What ranks that have all met may take to hand over a descriptor.
_HANDOVER = 10.0

_log = logging.getLogger("dtrain.comm")


class ShmTransport(ZmqTransport):
    """One rank's end of a group whose ranks share memory, all of them or those of each host.

    Making it takes two more gathers in the store than `ZmqTransport`. Its `name` is "zmq" when the
    ranks have agreed to do without windows. A rank alone has nobody to share with. `host` stands
    for the identity of this host (default `topology.host_id`), where that does not tell which ranks
    can share memory: for containers, and for tests.
    """

    name = "shm"

    def __init__(
        self, store: Store, rank: int, size: int, timeout: float, *, host: str | None = None
    ) -> None:
        super().__init__(store, rank, size, timeout)
        if size == 1:
            return
        try:
            self._agree(store, host or host_id(), timeout)
        except BaseException:
            self.abandon()
            raise
        if self.memory is None:
            self.name = "zmq"

    def _agree(self, store: Store, host: str, timeout: float) -> None:
        """Make the window of this host's ranks; none when one rank of the group cannot."""
        able = Offer() if futex.AVAILABLE else contextlib.nullcontext(None)
        with able as offer, contextlib.ExitStack() as undo:
            segment, trouble = _allocate() if offer is not None else (None, "")
            if segment is not None:
                undo.callback(segment.close)
            mine = [host, b"" if offer is None else offer.address]
            told = self._tell_all(store, "memory", trouble, mine, timeout)
            if told is None:
                return
            hosts, addresses = zip(*told, strict=True)
            placement = Placement(hosts)
            if not self._suits(placement, addresses) or offer is None or segment is None:
                return
            members = placement.hosts[placement.host_of[self.rank]]
            window, trouble = self._join(members, segment, offer, addresses)
            if window is not None:
                undo.pop_all()
                undo.callback(window.close)
            if self._tell_all(store, "window", trouble, None, timeout) is None or window is None:
                return
            undo.pop_all()
        self._share(window, placement)

    def _suits(self, placement: Placement, addresses: Sequence[bytes]) -> bool:
        """Whether windows are possible and of use; rank 0 says why not."""
        hosts = placement.hosts
        if not all(addresses):
            why = f"needs x86-64 Linux, which rank {addresses.index(b'')} does not have"
        elif len(hosts) == 1:
            return True
        elif not placement.in_runs:
            why = f"needs hosts with consecutive ranks, and they have {hosts}"
        elif len(hosts) == self.size:
            why = "has nobody to share with: every rank has a host to itself"
        else:
            return True
        if self.rank == 0:
            _log.info("transport 'shm' %s: messages ('zmq') take its place", why)
        return False

    def _share(self, window: Window, placement: Placement) -> None:
        self.memory = window
        if len(placement.hosts) == 1:
            self.window = window
        else:
            self.island = Island(window, placement, self.rank)
        self.neighbours = placement.hosts[placement.host_of[self.rank]]

    def lend(self, nbytes: int) -> int:
        return NOWHERE if self.memory is None else self.memory.lend(nbytes)

    def borrow(self, rank: int, place: int, nbytes: int) -> Array:
        assert self.memory is not None
        return self.memory.borrow(self.neighbours.index(rank), place, nbytes)

    def _tell_all(
        self, store: Store, key: str, trouble: str, value: object, timeout: float
    ) -> list[Any] | None:
        """The values of all ranks, or None (and a warning) when one has trouble."""
        mine = dumps([trouble, value])
        told = [loads(v) for v in store.gather(key, self.rank, self.size, mine, timeout)]
        for rank, (reason, _) in enumerate(told):
            if reason:
                warnings.warn(
                    f"rank {rank} {reason}; each rank of a group needs {Segment.needed:,} bytes of"
                    " shared memory for it. This group exchanges messages ('zmq') instead, which"
                    " is slower.",
                    RuntimeWarning,
                    stacklevel=2,
                )
                return None
        return [value for _, value in told]

    def _join(
        self, members: Sequence[int], segment: Segment, offer: Offer, addresses: Sequence[bytes]
    ) -> tuple[Window | None, str]:
        """The window of `members`, or None and why it could not be made."""
        taken: list[tuple[int, int]] = []
        try:
            others = [addresses[peer] for peer in members if peer != self.rank]
            deadline = time.monotonic() + _HANDOVER
            taken = offer.exchange(segment.descriptor, others, deadline)
            everybody, place = list(taken), members.index(self.rank)
            everybody.insert(place, (segment.descriptor, os.getpid()))
            descriptors, processes = zip(*everybody, strict=True)
            return Window(place, segment, descriptors, processes), ""
        except OSError as error:
            return None, f"cannot share memory with the other ranks of its host ({error})"
        finally:
            for descriptor, _ in taken:
                os.close(descriptor)

    def look(self) -> None:
        super().look()
        if self.memory is not None:
            for place in self.memory.dead():
                rank = place if self.island is None else self.island.members[place]
                self.mailbox.lose(rank, PeerLost(rank))

    def close(self, timeout: float = 1.0) -> None:
        if self.memory is not None and not self.closed:
            self.memory.leave()
        super().close(timeout)

    def _destroy(self, linger: float) -> None:
        super()._destroy(linger)
        if self.memory is not None:
            self.memory.close()
            self.memory = self.window = self.island = None


def _allocate() -> tuple[Segment | None, str]:
    """This rank's memory, or None and why there is none."""
    try:
        return Segment(), ""
    except OSError as error:
        return None, f"cannot allocate shared memory ({error})"
