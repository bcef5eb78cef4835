"""Memory that the ranks of one host share: counters to meet at, room to exchange data in, a heap.

Owns: `Window`, one rank's view of the memory of all. Each rank owns one nameless file (memfd) that
every rank maps whole: [control page | two halves of staging | heap]. It has no name, so nothing of
it can outlive the processes. Files are as long as the machine's memory is large, and empty; pages
are allocated for real (`posix_fallocate`) before they are handed out, so that a write never fails.
Knows nothing of collectives, of errors of peers, of deadlines: `channel.Channel` does.

[Note: phases] A rank writes what it has to tell and then its counter, and reads what others told
when their counters are at least its own. The machine keeps the order of stores (`futex.AVAILABLE`).
A counter that is read at phase p proves that its rank has finished whatever it read at phase p-1.
Hence two halves are enough, for staging and for headers: a half that is written for phase p was
last read after phase p-2, and its readers have announced p-1 since.
"""

from __future__ import annotations

import ctypes
import errno
import math
import os
import select
import sys
import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dtrain.comm.transports import futex
from dtrain.comm.transports.heap import ALIGNMENT, Heap
from dtrain.comm.transports.mailbox import Array

__all__ = ["HALF", "NOWHERE", "Segment", "Window", "map_file"]

# Bytes of one half of the staging room. Measured: 1 MiB copies 64 MiB in half the time of 512 KiB,
# whose phases are too many; of 2 MiB, what one rank writes has left the other's cache.
HALF = 1024 * 1024

# How many ways of looking at the halves are kept.
_VIEWS = 256

# The place of an array that does not live in the window.
NOWHERE = -1

_PAGE = 4096
_STAGING = _PAGE
_HEAP = _STAGING + 2 * HALF

# The control page in words of 8 bytes; what different ranks write lies in different cache lines.
_PHASE, _ASLEEP, _LEFT, _CORE = 0, 8, 48, 56
_HEADERS = (16, 32)  # each: fingerprint, sequence number, place of the array

# Spins before a rank sleeps in the kernel, each a sched_yield of 0.4 us. With more ranks than cores
# the time belongs to those who are waited for.
_SPINS, _SPINS_CROWDED = 200, 4


# Phases between two looks at which rank is on which core: the fewest and the most.
_CORE_LOOK, _CORE_REST = 64, 512


class Segment:
    """This rank's own file, not mapped yet: a control page and staging room that are allocated.

    OSError (ENOSPC, ENOMEM, EFBIG ...) when the machine does not have `needed` bytes.
    """

    needed = _HEAP

    def __init__(self) -> None:
        self.descriptor = os.memfd_create("dtrain-window", os.MFD_CLOEXEC)
        try:
            memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
            os.ftruncate(self.descriptor, _HEAP + memory)
            os.posix_fallocate(self.descriptor, 0, _HEAP)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the descriptor; mappings stay."""
        os.close(self.descriptor)


class Window:
    """The shared memory of `size` ranks as seen by `rank`. Used by one thread at a time.

    `descriptors[r]` is the file of rank r, `processes[r]` its process; the descriptor of `rank`
    itself is `segment`'s, which belongs to the window from now on. OSError when the address space
    is too small.
    """

    def __init__(
        self, rank: int, segment: Segment, descriptors: Sequence[int], processes: Sequence[int]
    ) -> None:
        self.rank, self.size = rank, len(descriptors)
        self.phase = 0
        self._segment = segment
        maps = self._maps = [map_file(descriptor) for descriptor in descriptors]
        self._own_map = maps[rank]
        self._bytes = [np.frombuffer(m, np.uint8) for m in maps]
        self._control = [m[:_PAGE].cast("q") for m in maps]
        self._own = self._control[rank]
        self._others = [(r, c) for r, c in enumerate(self._control) if r != rank]
        self._addresses = [int(b.ctypes.data) for b in self._bytes]
        halves = [_STAGING, _STAGING + HALF]
        self._halves = [[b[start : start + HALF] for b in self._bytes] for start in halves]
        self._half = self._parity = 0
        self._views: dict[tuple[int, tuple[int, ...], np.dtype[Any]], list[Array]] = {}
        self._heap = Heap(_HEAP, len(self._own_map))
        cores = len(os.sched_getaffinity(0))
        self._spins = _SPINS if self.size <= cores else _SPINS_CROWDED
        self._look_at, self._patience = _CORE_LOOK, _CORE_LOOK
        if self.size > cores:
            self._look_at = sys.maxsize
        self._lent: list[tuple[Array, Array]] = []  # (who has let go of it, memory) for all ranks
        self._watched: dict[int, int] = {}  # {descriptor that tells of a process's end: rank}
        self._ends = select.poll()
        try:
            for r, process in enumerate(processes):
                if process != os.getpid():
                    self._watch(r, process)
        except BaseException:
            self._close_watches()
            raise

    # ---- phases

    def arrive(self) -> bool:
        """Announce the next phase; whether all others have announced it too, after a short wait."""
        phase = self.phase = self.phase + 1
        own = self._own
        own[_PHASE] = phase
        # A sleeper notes for which phase he waits, looks again, and sleeps unless the counter has
        # moved. On this machine a store may pass a later load of another word, so that both sides
        # could miss each other: that costs the sleeper one timeout.
        if own[_ASLEEP] == phase:
            futex.wake(self._addresses[self.rank])
        if phase >= self._look_at:
            self._spread_out()
        for _ in range(self._spins):
            if self.lagging() is None:
                return True
            futex.give_way()
        return self.lagging() is None

    def _spread_out(self) -> None:
        """Move to a core of its own if this rank shares one with a rank before it.

        Ranks that wake each other are kept on one core by the scheduler, for seconds, while others
        are idle: a small sum then takes 80 us instead of 20. The affinity stays what it was. A rank
        that is brought back is in the way of something else: it asks less often.
        """
        self._own[_CORE] = here = futex.core()
        self._look_at = self.phase + self._patience
        taken = [control[_CORE] for _, control in self._others]
        if here not in taken[: self.rank]:
            self._patience = _CORE_LOOK
            return
        allowed = os.sched_getaffinity(0)
        free = allowed.difference(taken, [here])
        if free:
            os.sched_setaffinity(0, {min(free)})
            os.sched_setaffinity(0, allowed)
            self._own[_CORE] = min(free)
            self._patience = min(2 * self._patience, _CORE_REST)

    def lagging(self) -> int | None:
        """The first rank that has not announced this phase."""
        phase = self.phase
        for rank, control in self._others:
            if control[_PHASE] < phase:
                return rank
        return None

    def missing(self) -> list[int]:
        """All ranks that have not announced this phase."""
        return [rank for rank, control in self._others if control[_PHASE] < self.phase]

    def sleep(self, rank: int, seconds: float) -> None:
        """Sleep in the kernel until `rank` announces this phase, at most `seconds` < 1."""
        control = self._control[rank]
        control[_ASLEEP] = self.phase
        seen = control[_PHASE]
        if seen < self.phase:
            futex.sleep(self._addresses[rank], seen, seconds)

    # ---- what a phase carries

    def write_header(self, fingerprint: int, seq: int, place: int) -> None:
        """Say which call this is, for the next phase to announce."""
        self._parity ^= 1
        at = _HEADERS[self._parity]
        own = self._own
        own[at], own[at + 1], own[at + 2] = fingerprint, seq, place

    def agrees(self, fingerprint: int) -> bool:
        """Whether all ranks have written this fingerprint; behind the phase."""
        at = _HEADERS[self._parity]
        return all(control[at] == fingerprint for _, control in self._others)

    def places(self) -> list[int]:
        """Where the array of each rank lives; behind the phase."""
        at = _HEADERS[self._parity] + 2
        return [control[at] for control in self._control]

    def seen(self, rank: int) -> int | None:
        """The last sequence number that `rank` wrote; None before its first."""
        control = self._control[rank]
        return max(control[at + 1] for at in _HEADERS) if control[_PHASE] else None

    def next_half(self) -> list[Array]:
        """The halves of staging, one per rank, in which the next phase may exchange data."""
        self._half ^= 1
        return self._halves[self._half]

    def next_half_as(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> list[Array]:
        """`next_half`, as arrays of that shape and dtype; kept, as most calls repeat others."""
        self._half ^= 1
        key = (self._half, shape, dtype)
        found = self._views.get(key)
        if found is None:
            if len(self._views) >= _VIEWS:
                self._views.clear()
            found = [np.ndarray(shape, dtype, half) for half in self._halves[self._half]]
            self._views[key] = found
        return found

    def this_half(self) -> list[Array]:
        """What `next_half` gave last."""
        return self._halves[self._half]

    # ---- arrays that live here

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """An uninitialised array in this rank's part; it may outlive the window.

        Its memory is used again when it and all its views are gone. An ordinary array, with a
        RuntimeWarning, when the machine has no more memory to share.
        """
        kind = np.dtype(dtype)
        count = math.prod(shape)
        nbytes = count * kind.itemsize
        if nbytes == 0:
            return np.empty(shape, kind)
        try:
            start, stop = self._allocate(nbytes)
        except OSError as error:
            warnings.warn(
                f"no {nbytes:,} bytes of shared memory for an array ({error}): it is an ordinary"
                " one, and collectives on it copy",
                RuntimeWarning,
                stacklevel=3,
            )
            return np.empty(shape, kind)
        # Every view's base is this array, which is therefore the last one to go.
        flat = np.frombuffer(self._own_map, kind, count, start)
        weakref.finalize(flat, self._heap.give_back, start, stop).atexit = False
        return flat.reshape(shape)

    def _allocate(self, nbytes: int) -> tuple[int, int]:
        found = self._heap.take(nbytes)
        if found is None:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        start, stop = found
        try:
            os.posix_fallocate(self._segment.descriptor, start, stop - start)
        except BaseException:
            self._heap.give_back(start, stop)
            raise
        return start, stop

    def lend(self, nbytes: int) -> int:
        """Set aside memory of this rank for all; its place, or `NOWHERE` when there is none.

        In front of it stands a byte for each rank: not 0 when the rank has let go of it. What all
        have let go of is used again, by this rank's next `lend`.
        """
        self._lent = [(gone, memory) for gone, memory in self._lent if not gone.all()]
        memory = self.empty((self._front + nbytes,), np.uint8)
        place = self.place_of(memory)
        if place != NOWHERE:
            memory[: self.size] = 0
            self._lent.append((memory[: self.size], memory))
        return place

    def borrow(self, owner: int, place: int, nbytes: int) -> Array:
        """The bytes that `owner` has lent at `place`; this rank lets go with its last view."""
        # Every view's base is this array, which is therefore the last one to go.
        array = np.frombuffer(self._maps[owner], np.uint8, nbytes, place + self._front)
        own = self._bytes[owner][place + self.rank : place + self.rank + 1]
        weakref.finalize(array, own.fill, 1).atexit = False
        return array[:]

    @property
    def _front(self) -> int:
        """Bytes in front of lent memory."""
        return -(-self.size // ALIGNMENT) * ALIGNMENT

    def place_of(self, array: Array) -> int:
        """Where `array` lives in this rank's part, or `NOWHERE`."""
        place = int(array.__array_interface__["data"][0]) - self._addresses[self.rank]
        return place if _HEAP <= place < len(self._own_map) else NOWHERE

    def at(self, rank: int, place: int, like: Array) -> Array:
        """The array of `rank` at `place`, flat, with the dtype and the number of elements of
        `like`.
        """
        return self._bytes[rank][place : place + like.nbytes].view(like.dtype)

    # ---- the end

    def _watch(self, rank: int, process: int) -> None:
        descriptor = os.pidfd_open(process)
        self._watched[descriptor] = rank
        self._ends.register(descriptor, select.POLLIN)

    def dead(self) -> list[int]:
        """Ranks whose process has ended without `leave`; does not wait."""
        watched = self._watched
        if not watched:
            return []
        ranks = [watched[descriptor] for descriptor, _ in self._ends.poll(0)]
        return [r for r in ranks if not self._control[r][_LEFT]]

    def leave(self) -> None:
        """Say that this rank goes in good order."""
        self._own[_LEFT] = 1

    def close(self) -> None:
        """Give back the descriptors. The memory goes with the last array that lives in it."""
        self._lent = []
        self._close_watches()
        self._segment.close()

    def _close_watches(self) -> None:
        watched, self._watched = self._watched, {}
        for descriptor in watched:
            self._ends.unregister(descriptor)
            os.close(descriptor)


def map_file(descriptor: int) -> memoryview:
    """The whole file; no memory is set aside for it.

    It is unmapped when nothing refers to it any more, views of it included. (`mmap.mmap` would hold
    a descriptor as long.)
    """
    length = os.fstat(descriptor).st_size
    address = futex.map_shared(descriptor, length)
    mapped = (ctypes.c_ubyte * length).from_address(address)
    weakref.finalize(mapped, futex.unmap, address, length).atexit = False
    return memoryview(mapped).cast("B")
