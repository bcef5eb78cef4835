"""Ranks of one host with shared memory: collectives go through a `Window`, all else by messages.

Owns: `ShmTransport`, and the decision of all its ranks whether there is a window. Messages between
two ranks, news, goodbyes and deaths are those of `ZmqTransport`. All ranks must be on one host
(boot and host name, told through the store), on x86-64 Linux (`futex.AVAILABLE`: the window relies
on its order of stores), and have the memory; else all of them use messages alone: with one line at
INFO where the machine has no windows, with a RuntimeWarning where memory is short.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
import warnings

from dtrain.comm.store.base import Store
from dtrain.comm.transports import futex
from dtrain.comm.transports.handover import Offer
from dtrain.comm.transports.window import Segment, Window
from dtrain.comm.transports.zmq import ZmqTransport
from dtrain.errors import PeerLost
from dtrain.wire import dumps, loads

__all__ = ["ShmTransport"]

# What ranks that have all met may take to hand over a descriptor.
_HANDOVER = 10.0

_log = logging.getLogger("dtrain.comm")


class ShmTransport(ZmqTransport):
    """One rank's end of a group whose ranks share memory.

    Making it takes two more gathers in the store than `ZmqTransport`. Its `name` is "zmq" when the
    ranks have agreed to do without a window. A rank alone has nobody to share with.
    """

    name = "shm"

    def __init__(self, store: Store, rank: int, size: int, timeout: float) -> None:
        super().__init__(store, rank, size, timeout)
        if size == 1:
            return
        try:
            self.window = self._agree(store, timeout) if self._possible() else None
        except BaseException:
            self.abandon()
            raise
        if self.window is None:
            self.name = "zmq"

    def _possible(self) -> bool:
        """Whether this kind of machine has windows; ranks of one host say the same."""
        if not futex.AVAILABLE:
            _log.info("transport 'shm' needs x86-64 Linux: messages ('zmq') take its place")
        return futex.AVAILABLE

    def _agree(self, store: Store, timeout: float) -> Window | None:
        """The window, or None on every rank when one of them could not make it."""
        with Offer() as offer, contextlib.ExitStack() as undo:
            segment, trouble = _allocate()
            if segment is not None:
                undo.callback(segment.close)
            addresses = self._tell_all(store, "memory", trouble, offer.address, timeout)
            if addresses is None or segment is None:
                return None
            window, trouble = self._join(segment, offer, addresses)
            if window is not None:
                undo.pop_all()
                undo.callback(window.close)
            if self._tell_all(store, "window", trouble, b"", timeout) is None:
                return None
            undo.pop_all()
            return window

    def _tell_all(
        self, store: Store, key: str, trouble: str, value: bytes, timeout: float
    ) -> list[bytes] | None:
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
        self, segment: Segment, offer: Offer, addresses: list[bytes]
    ) -> tuple[Window | None, str]:
        """The window, or None and why it could not be made."""
        taken: list[tuple[int, int]] = []
        try:
            others = [addresses[peer] for peer in self.peers]
            deadline = time.monotonic() + _HANDOVER
            taken = offer.exchange(segment.descriptor, others, deadline)
            everybody = list(taken)
            everybody.insert(self.rank, (segment.descriptor, os.getpid()))
            descriptors, processes = zip(*everybody, strict=True)
            return Window(self.rank, segment, descriptors, processes), ""
        except OSError as error:
            return None, f"cannot share memory with the other ranks ({error})"
        finally:
            for descriptor, _ in taken:
                os.close(descriptor)

    def look(self) -> None:
        super().look()
        if self.window is not None:
            for rank in self.window.dead():
                self.mailbox.lose(rank, PeerLost(rank))

    def close(self, timeout: float = 1.0) -> None:
        if self.window is not None and not self.closed:
            self.window.leave()
        super().close(timeout)

    def _destroy(self, linger: float) -> None:
        super()._destroy(linger)
        if self.window is not None:
            self.window.close()
            self.window = None


def _allocate() -> tuple[Segment | None, str]:
    """This rank's memory, or None and why there is none."""
    try:
        return Segment(), ""
    except OSError as error:
        return None, f"cannot allocate shared memory ({error})"
