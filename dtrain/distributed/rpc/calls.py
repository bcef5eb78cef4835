"""What a worker knows of its calls: futures, calls under way, and counters by function.

Owns: `RpcFuture`, `Call`, `Statistics`. Rules: 1. waiting for a future inside a called function
lets another call use the thread. 2. Callbacks run in a thread of the pool. 3. An answer is read by
whoever asks for it first, not by the thread that moves messages.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from dtrain.comm.transports.base import seconds_left
from dtrain.comm.work import Future
from dtrain.distributed.rpc.pool import Pool, waiting
from dtrain.distributed.rpc.shift import Shift

__all__ = ["Call", "RpcFuture", "Statistics"]

# A function that took less than that (in seconds) so many times in a row is short. A hop to another
# thread costs 40 us.
_BRIEF, _RUNS = 100e-6, 4


class RpcFuture(Future[Any]):
    """The answer to a call. Source: torch.futures.Future.

    `cancel` stops waiting and tells the called worker, which drops the call if it has not begun.
    """

    def __init__(self, pool: Pool, shift: Shift | None = None) -> None:
        super().__init__()
        self._pool, self._shift = pool, shift
        self._read: Callable[[], Any] | None = None
        self._give_up: Callable[[], object] | None = None

    def arrive(self, read: Callable[[], Any]) -> None:
        """Complete with what `read()` will return or raise, to whoever asks first."""
        self._read = read
        self.set_result(None)

    def value(self) -> Any:
        self._settle()
        return super().value()

    def exception(self) -> BaseException | None:
        self._settle()
        return super().exception()

    def _settle(self) -> None:
        if self._read is None or not self._done:
            return
        with self._lock:
            if self._read is None:
                return
            try:
                self._value = self._read()
            except Exception as error:
                self._error = error
            self._read = None

    def _await(self, timeout: float | None) -> bool:
        with waiting():
            shift = self._shift
            if shift is None:
                return super()._await(timeout)
            deadline = math.inf if timeout is None else time.monotonic() + timeout
            shift.lend_a_hand(self.done, deadline)
            if self._done:
                return True
            shift.blocked.add(self)
            try:
                return super()._await(None if timeout is None else seconds_left(deadline))
            finally:
                shift.blocked.discard(self)

    def _run(self, callback: Callable[[Future[Any]], None]) -> None:
        self._pool.submit(lambda: super(RpcFuture, self)._run(callback))

    def cancel(self) -> bool:
        """Give the call up: whoever waits gets CancelledError. False when it is done already."""
        if self._done or self._give_up is None:
            return False
        self._give_up()
        return True

    def _following(self) -> RpcFuture:
        """Of what follows from this call: to cancel it is to cancel the call."""
        result = RpcFuture(self._pool)  # no message completes it: nobody need move any
        result._give_up = self.cancel
        return result


@dataclass(slots=True)
class Call:
    """A call to `worker` that has no answer yet.

    Times are by time.monotonic(); a `deadline` of None never comes.
    """

    future: RpcFuture
    worker: int
    what: str
    nbytes: int
    begun: float
    deadline: float | None
    timeout: float


@dataclass(slots=True)
class Statistics:
    """Calls served, by function: [calls, bytes, seconds in the queue, seconds of execution].

    `brief` says which functions have been short so far: how often in a row.
    """

    rows: dict[str, list[float]] = field(default_factory=dict)
    runs: dict[str, int] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, function: str, nbytes: int, queued: float, ran: float) -> None:
        """One call more."""
        with self.lock:
            row = self.rows.setdefault(function, [0, 0, 0.0, 0.0])
            for i, amount in enumerate((1, nbytes, queued, ran)):
                row[i] += amount
            self.runs[function] = self.runs.get(function, 0) + 1 if ran < _BRIEF else 0

    def brief(self, function: str) -> bool:
        """Whether the next call of `function` is likely to be short."""
        return self.runs.get(function, 0) >= _RUNS

    def table(self) -> dict[str, dict[str, float]]:
        """A copy, with the columns named."""
        columns = ("calls", "bytes", "queue_seconds", "run_seconds")
        with self.lock:
            return {name: dict(zip(columns, row, strict=True)) for name, row in self.rows.items()}
