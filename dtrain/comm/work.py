"""Handles of what is not finished yet: `Future` (torch.futures) and `Work` (torch.distributed).

Rules: completed once, by one thread; waiting never spins; a callback runs in the thread that
completes, or at once in the caller when it is already complete.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from dtrain.comm.transports.mailbox import Array
from dtrain.errors import CollectiveTimeout

__all__ = ["Future", "Work"]

T = TypeVar("T")
S = TypeVar("S")

_log = logging.getLogger("dtrain.comm")


class Future(Generic[T]):
    """A value that comes later (torch.futures.Future).

    `drive(timeout)` is for values that only come while somebody waits for them: it is called by
    those who wait.
    """

    def __init__(self, drive: Callable[[float | None], None] | None = None) -> None:
        self._drive = drive
        self._lock = threading.Lock()
        self._completed: threading.Condition | None = None  # made by the first who has to wait
        self._done = False
        self._value: T | None = None
        self._error: BaseException | None = None
        self._callbacks: list[Callable[[Future[T]], None]] = []

    def done(self) -> bool:
        """Whether there is a value or an error."""
        if self._drive is not None and not self._done:
            self._drive(0.0)
        return self._done

    def wait(self, timeout: float | None = None) -> T:
        """The value; blocks until it is there.

        Raises the error, or TimeoutError after `timeout` seconds.
        """
        if self._drive is not None and not self._done:
            until = None if timeout is None else time.monotonic() + timeout
            self._drive(timeout)
            # Another thread may be about to complete it: there is time left then.
            left = None if until is None else max(0.0, until - time.monotonic())
        else:
            left = timeout
        if not self._done and not self._await(left):
            raise TimeoutError(f"the future is not complete after {timeout} s")
        return self.value()

    def _await(self, timeout: float | None) -> bool:
        with self._lock:
            if self._completed is None:
                self._completed = threading.Condition(self._lock)
            return self._completed.wait_for(lambda: self._done, timeout)

    def value(self) -> T:
        """The value of a complete future.

        Raises its error, or RuntimeError when it is not complete.
        """
        if not self._done:
            raise RuntimeError("Future.value() called before the future is complete; use wait()")
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]

    def exception(self) -> BaseException | None:
        """The error of a future that failed, None otherwise."""
        return self._error

    def set_result(self, result: T) -> None:
        """Complete with a value and run the callbacks."""
        self._complete(result, None)

    def set_exception(self, error: BaseException) -> None:
        """Complete with an error and run the callbacks."""
        self._complete(None, error)

    def _complete(self, value: T | None, error: BaseException | None) -> None:
        with self._lock:
            if self._done:
                raise RuntimeError("the future is already complete: it can be completed once")
            self._value, self._error, self._done = value, error, True
            callbacks, self._callbacks = self._callbacks, []
            if self._completed is not None:
                self._completed.notify_all()
        for callback in callbacks:
            self._run(callback)

    def add_done_callback(self, callback: Callable[[Future[T]], None]) -> None:
        """Call `callback(self)` on completion.

        What it raises is logged, as in torch: nobody else can take it.
        """
        with self._lock:
            if not self._done:
                self._callbacks.append(callback)
                return
        self._run(callback)

    def _run(self, callback: Callable[[Future[T]], None]) -> None:
        try:
            callback(self)
        except Exception:
            _log.exception("a done-callback of a future failed")

    def then(self, callback: Callable[[Future[T]], S]) -> Future[S]:
        """A future of `callback(self)`; it fails with what the callback raises."""
        result: Future[S] = self._following()

        def run(future: Future[T]) -> None:
            try:
                value = callback(future)
            except BaseException as error:
                result.set_exception(error)
            else:
                result.set_result(value)

        self.add_done_callback(run)
        return result

    def _following(self) -> Future[Any]:
        return Future(None if self._drive is None else self._move_on)

    def _move_on(self, timeout: float | None) -> None:
        """Whoever waits for what follows from this future drives it."""
        if self._drive is not None and not self._done:
            self._drive(timeout)


class Work:
    """One submitted call. Returned by `ProcessGroup.submit`; complete it with `wait`.

    `what` names the call in errors (by `str`, when one is raised). A call that is complete already
    (`done`) has a future only when somebody asks for it.
    """

    __slots__ = ("_future", "_output", "_source", "finished_at", "what")

    def __init__(
        self,
        what: object,
        output: Array | None,
        drive: Callable[[float | None], None] | None = None,
        *,
        done: bool = False,
    ) -> None:
        self.what = what
        self._output = output
        # Point-to-point calls move on while somebody waits for them.
        self._future: Future[Array | None] | None = None if done else Future(drive)
        self._source: int | None = None
        self.finished_at: float | None = None  # by time.monotonic; not told of a call that was done

    def wait(self, timeout: float | None = None) -> bool:
        """Block until the call is complete; True, or its error.

        `timeout` (seconds) bounds this wait alone: when it passes, `CollectiveTimeout` is raised
        and the call goes on. Without it the timeout of the call itself bounds the wait.
        """
        if self._future is None:
            return True
        try:
            self._future.wait(timeout)
        except TimeoutError:
            if self._future.exception() is not None:
                raise
            raise CollectiveTimeout(
                f"{self.what} is still running after a wait of {timeout} s",
                rank=None,
                timeout=timeout,
            ) from None
        return True

    def is_completed(self) -> bool:
        """Whether it has finished, well or not; does not block."""
        return self._future is None or self._future.done()

    def is_success(self) -> bool:
        """Whether it has finished well."""
        return self.is_completed() and self.exception() is None

    def exception(self) -> BaseException | None:
        """Why it failed, or None."""
        return None if self._future is None else self._future.exception()

    def result(self) -> Array | None:
        """The array that the call left its result in (None where it has none); waits."""
        self.wait()
        return self._output

    def source_rank(self) -> int:
        """Where a receive came from; waits."""
        self.wait()
        if self._source is None:
            raise RuntimeError(f"{self.what} has no source rank: only a receive has")
        return self._source

    def get_future(self) -> Future[Array | None]:
        """A future of `result()`."""
        if self._future is None:
            complete: Future[Array | None] = Future()
            complete.set_result(self._output)
            self._future = complete
        return self._future

    def finish(self, error: BaseException | None = None, source: int | None = None) -> None:
        """Complete the work; for the group alone."""
        assert self._future is not None
        self._source, self.finished_at = source, time.monotonic()
        if error is not None:
            self._future.set_exception(error)
        else:
            self._future.set_result(self._output)
