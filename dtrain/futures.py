"""Futures under torch.futures' names: `Future`, and waiting for several of them.

The class is the comm tower's (`dtrain.comm.work`): every asynchronous call has one. Source:
torch.futures.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from typing import Any

from dtrain.comm.work import Future as Future


def collect_all(futures: Iterable[Future[Any]]) -> Future[list[Future[Any]]]:
    """A future of the list of `futures`, complete when all of them are.

    It fails with the error of the first in the list that failed.
    """
    parts = list(futures)

    def drive(timeout: float | None) -> None:
        until = None if timeout is None else time.monotonic() + timeout
        for part in parts:
            part._move_on(None if until is None else max(0.0, until - time.monotonic()))

    everything: Future[list[Future[Any]]] = Future(drive)
    lock, left = threading.Lock(), len(parts)

    def one_more(_: Future[Any]) -> None:
        nonlocal left
        with lock:
            left -= 1
            last = left == 0
        if last:
            _finish(everything, parts)

    for part in parts:
        part.add_done_callback(one_more)
    if not parts:
        everything.set_result(parts)
    return everything


def _finish(everything: Future[list[Future[Any]]], parts: list[Future[Any]]) -> None:
    errors = [error for part in parts if (error := part.exception()) is not None]
    if errors:
        everything.set_exception(errors[0])
    else:
        everything.set_result(parts)


def wait_all(futures: Iterable[Future[Any]]) -> list[Any]:
    """The values of `futures`, waited for in order; raises the first error without waiting on."""
    return [future.wait() for future in futures]
