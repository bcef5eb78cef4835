"""A heap of byte ranges: which part of a window is handed out, and which is free.

Owns: `Heap`, pure bookkeeping; it never touches the memory. First fit from the lowest address, so
that pages which are real already are used again. A range may be given back at any moment, by a
finalizer inside an allocation too: it is only noted then, and merged by the next `take`.
"""

from __future__ import annotations

import threading
from bisect import insort
from collections import deque

__all__ = ["ALIGNMENT", "Heap"]

# A cache line, and what the widest vector instructions like.
ALIGNMENT = 64


class Heap:
    """The ranges of [start, stop) that nobody has."""

    def __init__(self, start: int, stop: int) -> None:
        self._free = [(start, stop)]  # sorted, disjoint, never touching
        self._returned: deque[tuple[int, int]] = deque()
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> tuple[int, int] | None:
        """A range of at least `nbytes` > 0 bytes, aligned; None when no free one is long enough."""
        length = -(-nbytes // ALIGNMENT) * ALIGNMENT
        with self._lock:
            while self._returned:
                self._merge(*self._returned.popleft())
            for i, (start, stop) in enumerate(self._free):
                if stop - start >= length:
                    rest = (start + length, stop)
                    self._free[i : i + 1] = [rest] if rest[0] < stop else []
                    return start, start + length
        return None

    def give_back(self, start: int, stop: int) -> None:
        """Return a range that `take` gave; from any thread, never waits."""
        self._returned.append((start, stop))

    def _merge(self, start: int, stop: int) -> None:
        insort(self._free, (start, stop))
        merged = self._free[:1]
        for start, stop in self._free[1:]:
            if start == merged[-1][1]:
                merged[-1] = (merged[-1][0], stop)
            else:
                merged.append((start, stop))
        self._free = merged
