"""Transports whose messages move while somebody waits in them: one thread at a time looks.

Owns: `PumpedTransport`, between `Transport` and the media that are read from sockets. Rules: 1. one
of the waiting threads is inside `_pump`, the others wait for it to hand on that duty. 2. Sockets
are closed when nobody is inside.
"""

from __future__ import annotations

import os
import time
from abc import abstractmethod

from dtrain.comm.transports.base import Transport, seconds_left
from dtrain.errors import DistError, PeerLost

__all__ = ["PumpedTransport"]


class PumpedTransport(Transport):
    """A transport that brings `_pump`, `_wake` and `_destroy`."""

    _pumping = False  # whether a thread is inside `_pump`; changes under the mailbox's lock

    @abstractmethod
    def _pump(self, deadline: float) -> None:
        """Wait for something to arrive, or a peer to be lost, and take it in."""

    @abstractmethod
    def _destroy(self, linger: float) -> None:
        """Give everything back; what is not written in `linger` seconds is lost."""

    def _advance(self, version: int, deadline: float) -> None:
        box = self.mailbox
        with box.lock:
            if box.version != version:
                return
            if self._pumping:
                box.changed.wait(seconds_left(deadline))
                return
            self._pumping = True
        try:
            self._pump(deadline)
        finally:
            with box.lock:
                self._pumping = False
                box.changed.notify_all()

    def _await_loss(self, peer: int, patience: float) -> DistError:
        """How `peer` was lost, to whom nothing can be sent: what it sent last may say.

        Takes in what arrives, and gives it to nobody: who sends is not who listens.
        """
        end = time.monotonic() + patience
        while peer not in self.mailbox.lost and time.monotonic() < end:
            self._advance(self.mailbox.version, time.monotonic() + patience / 10)
        return self.mailbox.lost.get(peer, PeerLost(peer)).copy()

    def abandon(self) -> None:
        if self._leave():
            self._destroy(linger=0.0)

    def _leave(self) -> bool:
        """Stop everything of this rank; False when there is nothing (more) to close here."""
        if self.closed or os.getpid() != self._owner:
            return False
        self.closed = True
        self.fail(PeerLost(self.rank, orderly=True))
        with self.mailbox.lock:  # nobody else may be inside a socket that is closed
            self.mailbox.changed.wait_for(lambda: not self._pumping, 1.0)
        return True
