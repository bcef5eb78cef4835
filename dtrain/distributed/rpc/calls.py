"""What a worker knows of its calls: futures, calls under way, and counters by function.

Owns: `RpcFuture`, `Call`, `Statistics`. Rules: 1. waiting for a future inside a called function
lets another call use the thread. 2. Callbacks run in a thread of the pool, never in the I/O thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from dtrain.comm.work import Future
from dtrain.distributed.rpc.pool import Pool, waiting

__all__ = ["Call", "RpcFuture", "Statistics"]


class RpcFuture(Future[Any]):
    """The answer to a call. Source: torch.futures.Future.

    `cancel` stops waiting and tells the called worker, which drops the call if it has not begun.
    """

    def __init__(self, pool: Pool) -> None:
        super().__init__()
        self._pool = pool
        self._give_up: Callable[[], None] | None = None

    def _await(self, timeout: float | None) -> bool:
        with waiting():
            return super()._await(timeout)

    def _run(self, callback: Callable[[Future[Any]], None]) -> None:
        self._pool.submit(lambda: super(RpcFuture, self)._run(callback))

    def cancel(self) -> bool:
        """Give the call up: whoever waits gets CancelledError. False when it is done already."""
        if self._done or self._give_up is None:
            return False
        self._give_up()
        return True


@dataclass(slots=True)
class Call:
    """A call to `worker` that has no answer yet; `deadline` by time.monotonic(), None: never."""

    future: RpcFuture
    worker: int
    what: str
    deadline: float | None
    timeout: float


@dataclass(slots=True)
class Statistics:
    """Calls served, by function: [calls, bytes, seconds in the queue, seconds of execution]."""

    rows: dict[str, list[float]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, function: str, nbytes: int, queued: float, ran: float) -> None:
        """One call more."""
        with self.lock:
            row = self.rows.setdefault(function, [0, 0, 0.0, 0.0])
            for i, amount in enumerate((1, nbytes, queued, ran)):
                row[i] += amount

    def table(self) -> dict[str, dict[str, float]]:
        """A copy, with the columns named."""
        columns = ("calls", "bytes", "queue_seconds", "run_seconds")
        with self.lock:
            return {name: dict(zip(columns, row, strict=True)) for name, row in self.rows.items()}
