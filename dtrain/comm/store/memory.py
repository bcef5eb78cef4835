"""A store inside one process, for ranks that are threads (torch calls it HashStore).

Owns: `MemoryStore`, a `Table` behind a condition variable. Every mutation wakes those who wait, and
each of them looks for itself whether its command is possible now.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from dtrain.comm.store.base import (
    DEFAULT_TIMEOUT,
    MUTATING,
    NotYet,
    Store,
    Table,
    Timeout,
    timed_out,
)

__all__ = ["MemoryStore"]


class MemoryStore(Store):
    """One object that all thread ranks share."""

    def __init__(self, timeout: Timeout = DEFAULT_TIMEOUT) -> None:
        super().__init__(timeout)
        self._table = Table()
        self._changed = threading.Condition()

    def _call(self, command: str, args: list[Any], timeout: float) -> Any:
        deadline = time.monotonic() + timeout
        with self._changed:
            while True:
                try:
                    result = self._table.do(command, args)
                except NotYet as waiting:
                    if not self._changed.wait(deadline - time.monotonic()):
                        raise timed_out(waiting, timeout) from None
                else:
                    if command in MUTATING:
                        self._changed.notify_all()
                    return result

    def _gather(self, key: str, rank: int, size: int, value: bytes, timeout: float) -> list[bytes]:
        number = self._call("join", [key, rank, size, value], timeout)
        return list(self._call("collect", [key, number, rank], timeout))

    def clone(self) -> MemoryStore:
        twin = type(self)(self.timeout)
        twin._table, twin._changed = self._table, self._changed
        return twin

    def close(self) -> None:
        """Nothing to give back: the store ends with its last reference."""
