"""Envelopes on their way out: numbered, in order, and several in one write where that costs nobody.

Owns: `Outgoing`. A write wakes the other process, which costs more than to pack a small call.
Rules: 1. a message gets its number and is queued or written in one step. 2. What may wait (`soon`)
does so only while the mover of the line has promised to look every millisecond; it goes with the
next message that may not, when enough has come together or the oldest is 200 us old, when anybody
begins to wait for an answer (`flush`), or when the mover looks. 3. Nothing is promised on an idle
line.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from dtrain.errors import PeerLost
from dtrain.wire import dumps, joined

__all__ = ["Outgoing"]

# What goes in one write at most: messages, bytes, and how old the first of them may be (seconds).
_MANY, _FULL, _OLD = 16, 32 * 1024, 200e-6

# While calls are made one after the other the mover looks so often. A look costs 15 us.
_LOOK = 1e-3

# Calls are made one after the other until none has been for so long.
_LULL = 2e-3


class _Queue:
    """What waits to go to one worker."""

    __slots__ = ("bodies", "lock", "nbytes", "sent", "since")

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.sent = 0  # numbers given
        self.bodies: list[bytes] = []
        self.nbytes, self.since = 0, 0.0


class Outgoing:
    """`put` a message, `flush` what waits; `write(to, body)` may raise `PeerLost`."""

    def __init__(self, write: Callable[[int, bytes], None]) -> None:
        self._write = write
        self._queues: defaultdict[int, _Queue] = defaultdict(_Queue)
        self._waiting: set[int] = set()  # for whom something waits
        self._put_at = 0.0
        self._promised = False

    def put(self, to: int, envelope: Sequence[Any], *, soon: bool) -> None:
        """Number an envelope and send it; `soon`: it may wait for others. Raises `PeerLost`."""
        queue, now = self._queues[to], time.monotonic()
        with queue.lock:
            queue.sent += 1
            body = dumps([queue.sent, *envelope])
            if queue.nbytes + len(body) > _FULL:
                self._send(to, queue)
            if not queue.bodies:
                queue.since = now
                self._waiting.add(to)
            queue.bodies.append(body)
            queue.nbytes += len(body)
            if not (soon and self._waits(queue, now)):
                self._send(to, queue)
        if soon:
            self._put_at = now

    def _waits(self, queue: _Queue, now: float) -> bool:
        full = len(queue.bodies) >= _MANY or queue.nbytes >= _FULL or now - queue.since >= _OLD
        return self._promised and not full

    def say(self, to: int, what: int, *about: Any) -> None:
        """Send `what`, which takes the place of a number, and how many were sent before it."""
        queue = self._queues[to]
        with queue.lock, contextlib.suppress(PeerLost):  # then it is known
            self._send(to, queue)
            self._write(to, dumps([what, queue.sent, *about]))

    def flush(self) -> None:
        """Write what waits; whoever is gone needs it no more."""
        for to in tuple(self._waiting) if self._waiting else ():
            queue = self._queues[to]
            with queue.lock, contextlib.suppress(PeerLost):
                self._send(to, queue)

    def _send(self, to: int, queue: _Queue) -> None:
        bodies = queue.bodies
        if bodies:
            queue.bodies, queue.nbytes = [], 0
            self._waiting.discard(to)
            self._write(to, bodies[0] if len(bodies) == 1 else joined(bodies))

    def promise(self, deadline: float) -> float:
        """For the mover, before it looks (`flush`) and waits: until when it may wait at most.

        Whoever moves the line next looks first. Times are those of `time.monotonic()`.
        """
        now = time.monotonic()
        self._promised = now - self._put_at < _LULL
        return min(deadline, now + _LOOK) if self._promised else deadline
