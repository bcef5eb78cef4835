"""Arrays handed from one rank of a host to another in memory that both see.

Owns: `Lender`, a rank's own nameless file (memfd), and `Borrower`, another rank's view of it. An
array is copied once, into the file; the receiver uses it where it is, and says so when it has let
go of the last view. In front of it stands a word: 1 while it is lent. Rules: 1. pages are allocated
for real before they are written, so that a write never fails. 2. Who is dead has let go. 3. When
nothing is lent, all but `_KEEP` goes back to the machine. x86-64 Linux only (`futex.AVAILABLE`).
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque

import numpy as np

from dtrain.comm.transports.heap import ALIGNMENT, Heap
from dtrain.comm.transports.mailbox import Array, as_bytes
from dtrain.comm.transports.window import NOWHERE, map_file

__all__ = ["Borrower", "Lender"]

# What is lent at a time is at most so much of the machine's memory; the rest travels as messages.
_SHARE = 8

# Memory that stays allocated although nothing is lent: new pages cost 4 times what a copy does.
_KEEP = 64 << 20

# How many of the arrays that are lent are looked after each time: more than are added.
_LOOK = 8


class Lender:
    """Memory of this rank for others. OSError where there is none. Thread-safe."""

    def __init__(self) -> None:
        self.descriptor = os.memfd_create("dtrain-lent", os.MFD_CLOEXEC)
        try:
            memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
            self._length = memory // _SHARE // ALIGNMENT * ALIGNMENT
            os.ftruncate(self.descriptor, self._length)
            self._bytes = np.frombuffer(map_file(self.descriptor), np.uint8)
        except BaseException:
            os.close(self.descriptor)
            raise
        self._lock = threading.Lock()
        self._heap = Heap(0, self._length)
        self._real = 0  # bytes from the start that are allocated
        self._lent: deque[tuple[int, int, int]] = deque()  # (to whom, start, stop)

    def lend(self, array: Array, to: int) -> int:
        """A copy of the C-contiguous `array` for rank `to`: its place, or `NOWHERE`: no memory."""
        with self._lock:
            found = self._allocate(ALIGNMENT + array.nbytes, to)
        if found is None:
            return NOWHERE
        start, _ = found
        self._bytes[start + ALIGNMENT : start + ALIGNMENT + array.nbytes] = as_bytes(array)
        return start

    def _allocate(self, nbytes: int, to: int) -> tuple[int, int] | None:
        self._collect()
        found = self._heap.take(nbytes)
        if found is None:
            return None
        start, stop = found
        if stop > self._real:
            try:
                os.posix_fallocate(self.descriptor, self._real, stop - self._real)
            except OSError:
                self._heap.give_back(start, stop)
                return None
            self._real = stop
        self._bytes[start] = 1
        self._lent.append((to, start, stop))
        return found

    def _collect(self) -> None:
        for _ in range(min(_LOOK, len(self._lent))):
            item = self._lent.popleft()
            if self._bytes[item[1]]:
                self._lent.append(item)
            else:
                self._heap.give_back(*item[1:])

    def collect(self) -> None:
        """Take back what others have let go of; now and then."""
        with self._lock:
            for _ in range(len(self._lent)):
                self._collect()
            if not self._lent and self._real > _KEEP:
                os.ftruncate(self.descriptor, _KEEP)
                os.ftruncate(self.descriptor, self._length)
                self._real = _KEEP

    def forget(self, rank: int) -> None:
        """`rank` is dead."""
        with self._lock:
            for to, start, _ in self._lent:
                if to == rank:
                    self._bytes[start] = 0

    @property
    def lent(self) -> int:
        """How many bytes are lent, as far as is known."""
        with self._lock:
            return sum(stop - start for _, start, stop in self._lent)

    def close(self) -> None:
        """Give back the descriptor. The memory goes with the last array that lives in it."""
        os.close(self.descriptor)


class Borrower:
    """What a rank sees of another one's memory: of its `descriptor`, which stays the caller's."""

    def __init__(self, descriptor: int) -> None:
        self._map = map_file(descriptor)
        self._bytes = np.frombuffer(self._map, np.uint8)

    def borrow(self, place: int, nbytes: int) -> Array:
        """The bytes lent at `place`. ValueError where nothing is lent."""
        end = place + ALIGNMENT + nbytes
        if place < 0 or place % ALIGNMENT or nbytes < 0 or end > self._bytes.size:
            raise ValueError(f"nothing can be lent at {place} (of {self._bytes.size} bytes)")
        # Every view's base is this array, which is therefore the last one to go.
        array = np.frombuffer(self._map, np.uint8, nbytes, place + ALIGNMENT)
        flag = self._bytes[place : place + 1]
        weakref.finalize(array, flag.fill, 0).atexit = False
        return array[:]
