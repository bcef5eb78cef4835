"""How much may be under way to one worker: calls and bytes without an answer.

Owns: `Room`. Rules: 1. whoever wants more waits, where it calls. 2. A call of any size may go while
the room is not full, so that large ones do not wait for ever; it holds at most one call too many.
"""

from __future__ import annotations

import threading

__all__ = ["Room"]

# Enough to keep a worker busy; what waits there is in its memory.
CALLS, BYTES = 4096, 1 << 29


class Room:
    """`enter` before a call, `leave` with its end; thread-safe."""

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self.calls = 0  # without an answer
        self._bytes = 0

    def _is_open(self) -> bool:
        return self.calls < CALLS and self._bytes < BYTES

    def enter(self, nbytes: int, timeout: float | None) -> bool:
        """Take room for a call of so many bytes; False if there was none for `timeout` seconds."""
        with self._changed:
            if not self._is_open() and not self._changed.wait_for(self._is_open, timeout):
                return False
            self.calls += 1
            self._bytes += nbytes
            return True

    def leave(self, nbytes: int) -> None:
        """Give it back."""
        with self._changed:
            self.calls -= 1
            self._bytes -= nbytes
            self._changed.notify_all()
