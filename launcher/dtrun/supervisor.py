"""The life of one worker group as a state machine: what to send to the workers, and when.

It decides and never acts: no clock, no process, no signal is touched here. Each event returns the
signal that every living worker must now be sent, or None; `deadline` says when to call `tick`.

    RUNNING --a worker fails--> GRACE --time--> STOPPING --time--> KILLED
       +-- another node's news ---+-----------------+         |
       |                          |                 ^         |
       +----- dtrun is signalled -+-----------------+         +-- signalled again --> KILLED

Ranks that lose a peer usually find out and raise by themselves: GRACE lets them say so. The times
add up to less than the two seconds within which everything is gone, but what the kernel cannot end
(a process that waits for a disk or a file server): KILLED --time--> ABANDONED.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable

RUNNING, GRACE, STOPPING, KILLED = "running", "grace", "stopping", "killed"
ABANDONED = "abandoned"
GRACE_SECONDS = 1.0
STOP_SECONDS = 0.6
# A process that was killed gives its memory back first: many gigabytes take seconds.
GIVE_UP_SECONDS = 10.0


class Supervisor:
    """The state of one worker group; times are seconds of any one monotonic clock."""

    def __init__(self, workers: Iterable[int]) -> None:
        self.living = set(workers)
        self.state = RUNNING
        self.deadline: float | None = None
        self.received: int | None = None  # the first signal dtrun itself was sent

    def exited(self, worker: int, code: int, now: float) -> None:
        """A worker ended; the first failure starts the end of all."""
        self.living.remove(worker)
        if code != 0 and self.state == RUNNING:
            self._enter(GRACE, now + GRACE_SECONDS)

    def signalled(self, signum: int, now: float, patience: float = STOP_SECONDS) -> int | None:
        """dtrun was sent a signal: pass it on, and kill after `patience`; at the second one now."""
        if self.received is not None:
            return self._kill(now)
        self.received = signum
        if self.state in (STOPPING, KILLED, ABANDONED):
            return None
        self._enter(STOPPING, now + patience)
        return signum

    def stop(self, now: float, *, grace: bool, patience: float = STOP_SECONDS) -> int | None:
        """End the group because of what happened on another node; with `grace`, as a failure."""
        if self.state != RUNNING:
            return None
        if grace:
            self._enter(GRACE, now + GRACE_SECONDS)
            return None
        self._enter(STOPPING, now + patience)
        return signal.SIGTERM

    def tick(self, now: float) -> int | None:
        """Time has passed: the next, harder step once the deadline is over."""
        if self.deadline is None or now < self.deadline:
            return None
        if self.state == GRACE:
            self._enter(STOPPING, now + STOP_SECONDS)
            return signal.SIGTERM
        if self.state == KILLED:
            self._enter(ABANDONED, None)
            return None
        return self._kill(now)

    def _kill(self, now: float) -> int | None:
        if self.state in (KILLED, ABANDONED):
            return None
        self._enter(KILLED, now + GIVE_UP_SECONDS)
        return signal.SIGKILL

    def _enter(self, state: str, deadline: float | None) -> None:
        self.state, self.deadline = state, deadline
