"""`Work`: the handle of a call on tensors, over the comm tower's handle of a call on arrays.

What remains to be done with tensors once the arrays are complete (copying staged results back,
counting versions) is done once, by whoever waits first.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from dtrain.comm.store.base import as_seconds
from dtrain.comm.work import Future, Work as ArrayWork


def seconds(timeout: timedelta | float | None) -> float | None:
    """A timeout, as timedelta or number, in seconds; ValueError unless it is positive."""
    if timeout is None:
        return None
    value = as_seconds(timeout)
    if value <= 0:
        raise ValueError(f"a timeout must be positive, got {timeout}")
    return value


class Work:
    """One call under way. Source: torch.distributed.Work.

    `tensors` is what `result()` and the future give; `finish` completes them after the arrays.
    """

    def __init__(
        self, work: ArrayWork, tensors: list[Any], finish: Callable[[], None] | None = None
    ) -> None:
        self._work = work
        self._tensors = tensors
        self._finish = finish
        self._lock = threading.Lock()
        self._issued_at = time.monotonic()

    def _complete(self) -> None:
        with self._lock:
            finish, self._finish = self._finish, None
            if finish is not None:
                finish()

    def wait(self, timeout: timedelta | float | None = None) -> bool:
        """Block until the call is complete, its own deadline has passed or `timeout` has.

        Returns True; raises what went wrong (`CollectiveTimeout`, `PeerLost`, ...).
        """
        self._work.wait(seconds(timeout))
        self._complete()
        return True

    synchronize = wait
    block_current_stream = wait  # there are no streams: whoever calls it is what waits

    def is_completed(self) -> bool:
        """Whether it has finished, well or not; does not block."""
        return self._work.is_completed()

    def is_success(self) -> bool:
        """Whether it has finished well; does not block."""
        return self._work.is_success()

    def exception(self) -> BaseException | None:
        """Why it failed, or None."""
        return self._work.exception()

    def result(self) -> list[Any]:
        """The tensors that hold the result; waits."""
        self.wait()
        return self._tensors

    def source_rank(self) -> int:
        """The group rank a receive came from; waits."""
        return self._work.source_rank()

    _source_rank = source_rank

    def _get_duration(self) -> float:
        """Milliseconds from the call to its end; RuntimeError before that."""
        if not self._work.is_completed():
            raise RuntimeError(f"{self._work.what} has not finished: it has no duration yet")
        # What was complete when it was issued took no time that could be told.
        return max(0.0, (self._work.finished_at or 0.0) - self._issued_at) * 1e3

    def _get_sequence_number(self) -> int:
        """The number of the collective in its group.

        RuntimeError for a message, which has none: messages are matched by source and tag.
        """
        number = getattr(self._work.what, "seq", None)
        if number is None:
            raise RuntimeError(f"{self._work.what} is a message: only collectives have a number")
        return int(number)

    def boxed(self) -> Work:
        """The work itself: there is no TorchScript that would need it in a box."""
        return self

    @staticmethod
    def unbox(obj: Work) -> Work:
        """What was `boxed`."""
        return obj

    def get_future(self) -> Future[Any]:
        """A future of `result()`."""

        def value(future: Future[Any]) -> list[Any]:
            future.value()
            self._complete()
            return self._tensors

        return self._work.get_future().then(value)
