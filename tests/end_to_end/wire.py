"""A cable between two hosts that delays, loses and doubles packets: where the kernel has no netem.

Owns: `Wire`. Two TAP devices are its ends; a thread carries each frame from one to the other when
its time has come, so that jitter also changes their order. Both directions have faults of their
own, which may be changed meanwhile, and are counted: a fault that did not happen was not tested.
Needs root and /dev/net/tun.
"""

from __future__ import annotations

import errno
import fcntl
import heapq
import os
import random
import select
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

_TUNSETIFF, _TAP_WITHOUT_HEADER = 0x400454CA, 0x1002
_FRAME = 70_000
TOO_LATE = 0.5  # seconds


@dataclass(slots=True)
class Direction:
    """What happens to the frames of one end. Seconds, and probabilities."""

    delay: float = 0.0
    jitter: float = 0.0
    loss: float = 0.0
    twice: float = 0.0
    carried: int = 0
    lost: int = 0
    doubled: int = 0
    overtaken: int = 0  # came later than one that was sent behind it


class Wire:
    """Carries frames between the devices `names` until `close`; `ways[i]` is what end i sends."""

    def __init__(self, seed: int = 1, **faults: float) -> None:
        self.names = [f"wire{os.getpid()}{end}" for end in "ab"]
        self.ways = [Direction(**faults), Direction(**faults)]
        self.late = 0.0  # seconds: the most by which a frame came later than it should
        self._ends = [_tap(name) for name in self.names]
        self._dice = random.Random(seed)
        self._stop, self._stopper = os.pipe()
        self._thread = threading.Thread(target=self._carry, name="wire", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread; the devices go with their descriptors."""
        os.write(self._stopper, b"x")
        self._thread.join(10)
        for descriptor in (*self._ends, self._stop, self._stopper):
            os.close(descriptor)

    def _carry(self) -> None:
        waiting: list[tuple[float, int, int, bytes]] = []  # when, number, from which end, frame
        latest, number = [0, 0], 0
        while True:
            left = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
            ready = select.select([*self._ends, self._stop], [], [], left)[0]
            if self._stop in ready:
                return
            for end in (end for end in (0, 1) if self._ends[end] in ready):
                for frame in _frames(self._ends[end]):
                    number += 1
                    for due in self._fate(self.ways[end]):
                        heapq.heappush(waiting, (due, number, end, frame))
            while waiting and waiting[0][0] <= time.monotonic():
                due, sent, end, frame = heapq.heappop(waiting)
                self.late = max(self.late, time.monotonic() - due)
                way = self.ways[end]
                way.carried += 1
                way.overtaken += sent < latest[end]
                latest[end] = max(latest[end], sent)
                _put(self._ends[1 - end], frame)

    def _fate(self, way: Direction) -> list[float]:
        """When a frame arrives: once, twice or never."""
        if self._dice.random() < way.loss:
            way.lost += 1
            return []
        copies = 1 + (self._dice.random() < way.twice)
        way.doubled += copies - 1
        now = time.monotonic()
        spread = way.jitter
        return [now + way.delay + self._dice.uniform(-spread, spread) for _ in range(copies)]


@contextmanager
def judged(wire: Wire) -> Iterator[None]:
    """A failure counts only where the thread of the wire got a core when it needed one."""
    try:
        yield
    except (AssertionError, subprocess.TimeoutExpired):
        if wire.late > TOO_LATE:
            pytest.skip(f"not run: the wire itself was late by {wire.late:.1f} s")
        raise


def _tap(name: str) -> int:
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH", name.encode(), _TAP_WITHOUT_HEADER))
    return descriptor


def _frames(end: int) -> list[bytes]:
    """Those that wait at an end of the wire."""
    found = []
    while len(found) < 64:
        try:
            found.append(os.read(end, _FRAME))
        except BlockingIOError:
            break
    return found


def _put(end: int, frame: bytes) -> None:
    """Into the device, if that is up: a frame into one that is down is lost, as on any cable."""
    try:
        os.write(end, frame)
    except OSError as error:
        if error.errno not in (errno.EIO, errno.EAGAIN):
            raise
