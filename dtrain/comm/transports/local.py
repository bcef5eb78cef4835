"""Ranks as threads of one process: a message is written straight into the mailbox of its receiver.

Owns: the table of the endpoints that live in this process. A real transport with the rules of all
the others (deaths, goodbyes, counting); most tests run on it.
"""

from __future__ import annotations

import itertools
import os
import weakref

import numpy as np

from dtrain.comm.store.base import Store
from dtrain.comm.transports.base import Transport, rendezvous, seconds_left
from dtrain.comm.transports.mailbox import Array, Mailbox, as_bytes
from dtrain.errors import DistNetworkError, PeerLost

__all__ = ["LocalTransport"]

_endpoints: weakref.WeakValueDictionary[str, LocalTransport] = weakref.WeakValueDictionary()
_numbers = itertools.count()
_lent: weakref.WeakValueDictionary[int, Array] = weakref.WeakValueDictionary()  # {place: memory}


class LocalTransport(Transport):
    """One thread rank's end of a group inside this process."""

    name = "local"

    def __init__(self, store: Store, rank: int, size: int, timeout: float) -> None:
        super().__init__(rank, size)
        self.neighbours = range(size)
        self._lending: Array | None = None  # kept until those it was lent to have it
        address = str(next(_numbers))
        _endpoints[address] = self
        peers = rendezvous(store, rank, size, address, timeout)
        strangers = [r for r, peer in enumerate(peers) if peer.pid != os.getpid()]
        if strangers:
            raise DistNetworkError(
                f"transport 'local' joins threads of one process, but ranks {strangers} live in"
                " other processes; use 'zmq'"
            )
        # None: a rank that was done with the group and left before this one had looked it up.
        self._peers = [_endpoints.get(peer.address) for peer in peers]
        for gone in [r for r, peer in enumerate(self._peers) if peer is None]:
            self.mailbox.lose(gone, PeerLost(gone))  # unless it has said goodbye to this mailbox

    def lend(self, nbytes: int) -> int:
        self._lending = np.empty(nbytes, np.uint8)
        place = next(_numbers)
        _lent[place] = self._lending
        return place

    def borrow(self, rank: int, place: int, nbytes: int) -> Array:
        return _lent[place]

    def _send(self, dst: int, tag: int, buf: Array, note: bytes) -> None:
        self._box(dst).begin(self.rank, tag, note, buf.nbytes, as_bytes(buf), owned=False)

    def _tell(self, dst: int, body: bytes) -> None:
        self._box(dst).add_news(self.rank, body)

    def _box(self, dst: int) -> Mailbox:
        peer = self._peers[dst]
        if peer is None or dst in self.mailbox.lost:
            raise self.mailbox.lost[dst].copy()
        return peer.mailbox

    def _advance(self, version: int, deadline: float) -> None:
        box = self.mailbox
        with box.lock:
            if box.version == version:
                box.changed.wait(seconds_left(deadline))

    def _watch(self, src: int) -> None:
        """Nothing to do: a peer that leaves says so to every mailbox."""

    def _wake(self) -> None:
        """Nothing to do: everybody waits in the mailbox."""

    def flush(self, deadline: float) -> None:
        """Nothing to wait for: `send` has already copied."""
        self.check_usable()

    def close(self, timeout: float = 1.0) -> None:
        self._leave(orderly=True)

    def abandon(self) -> None:
        self._leave(orderly=False)

    def _leave(self, *, orderly: bool) -> None:
        if self.closed:
            return
        self.closed = True
        gone = PeerLost(self.rank, orderly=orderly)
        for peer in self._peers:
            if peer is not None and peer is not self:
                peer.mailbox.lose(self.rank, gone)
        self.mailbox.fail(gone)
        self._peers = []
