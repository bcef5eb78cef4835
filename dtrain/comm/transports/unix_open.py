"""A group on one host that ranks join and leave: `UnixTransport` with a door that stays open.

Owns: `OpenUnixTransport`. Rules: 1. who joins connects to all that are there; nobody else connects.
2. Whoever knows this rank's address, which holds a token, is let in, if it is a process of this
user. 3. Ranks are numbers that are used once: who comes back is somebody new.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import time
from collections.abc import Mapping

from dtrain.comm import security
from dtrain.comm.store.base import Store
from dtrain.comm.store.memory import MemoryStore
from dtrain.comm.transports.unix import UnixTransport

__all__ = ["MOST", "OpenUnixTransport"]

# Ranks are below that.
MOST = 1 << 16

# What a rank that is there may take to let one in that joins: it may be stopped.
_PATIENCE = 10.0


class OpenUnixTransport(UnixTransport):
    """Rank `rank`, alone at first. `address` is for the eyes of those who may join."""

    def __init__(self, rank: int) -> None:
        super().__init__(MemoryStore(), rank, MOST, 0.0)
        self.peers = []

    def _meet(self, store: Store, timeout: float) -> None:
        self._token = secrets.token_bytes(16)
        self._door = security.listen_nameless()
        self._door.setblocking(False)
        self._epoll.register(self._door, select.EPOLLIN)

    @property
    def address(self) -> bytes:
        """Where this rank can be joined."""
        return self._token + bytes(self._door.getsockname())

    def reach(self, addresses: Mapping[int, bytes]) -> set[int]:
        """Connect to ranks, and return those who are still there. Blocks until these have let us
        in.

        TimeoutError when one does not within 10 s.
        """
        return {rank for rank, address in addresses.items() if self._reach(rank, address)}

    def _reach(self, rank: int, address: bytes) -> bool:
        try:
            connection = self._ask(address, time.monotonic() + _PATIENCE)
        except (ConnectionError, FileNotFoundError):
            return False
        with connection:
            try:
                self._join(rank, connection)
            except ConnectionError:
                return False
            self._know(rank, security.process_of(connection))
        return True

    def _know(self, rank: int, process: int) -> None:
        self.peers.append(rank)
        if process != os.getpid():
            with contextlib.suppress(ProcessLookupError):  # its socket tells of it
                self._watch_process(rank, process)

    def _expects(self, rank: int) -> bool:
        return rank != self.rank and rank not in self._links

    def _heed(self, descriptor: int, event: int) -> None:
        if descriptor != self._door.fileno():
            super()._heed(descriptor, event)
            return
        with contextlib.suppress(BlockingIOError):
            connection, _ = self._door.accept()
            with connection, contextlib.suppress(TimeoutError, ConnectionError):
                rank = self._welcome(connection, self._token)
                if rank >= 0:
                    self._know(rank, security.process_of(connection))

    def _destroy(self, linger: float) -> None:
        super()._destroy(linger)
        self._door.close()
