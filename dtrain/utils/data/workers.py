"""The worker processes of a DataLoader, seen from the loop: they read ahead, in order.

Each worker is a fresh interpreter (worker.py): nothing is forked, so neither threads nor sockets of
this process can hurt, and the main script needs no guard. What it costs: the dataset is pickled to
each worker, which takes 0.3 s to start; `persistent_workers=True` pays that once.
Tasks go round the workers, and so do the answers: batch i comes from the worker that got task i.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import weakref
from collections import deque
from collections.abc import Iterator
from itertools import cycle
from multiprocessing.connection import Connection
from time import monotonic
from typing import Any

from dtrain.utils.data.worker import Job, encode, receive, send

LIFE_CHECK = 1.0  # seconds between looks at whether a worker lives, were its end inherited
END_GRACE = 3.0  # seconds a worker has to end by itself, before it is killed
_NOTHING = object()


class Workers:
    """`job.count` processes that fetch what `iterate` reads from an index iterator.

    They end when the iteration does (if not `persistent`), when this object is dropped, or with
    this process. RuntimeError when a batch takes longer than `timeout` seconds (0: no limit), or
    the worker that works on it dies.
    """

    def __init__(self, job: Job, *, prefetch: int, timeout: float, persistent: bool) -> None:
        self._prefetch, self._timeout, self._persistent = prefetch, timeout, persistent
        self._used = False
        frames = _encode_job(job)
        self._workers: list[_Handle] = []
        self.close = weakref.finalize(self, _end, self._workers)
        for number in range(job.count):
            self._workers.append(_Handle(number))
        for worker in self._workers:
            worker.send(encode(worker.number))
            worker.send(frames)

    def iterate(self, indices: Iterator[Any]) -> Iterator[Any]:
        """The fetched batches in the order of `indices`; reading ahead starts at once."""
        if self._used:
            self._restart()
        self._used = True
        turns = cycle(self._workers)
        pending: deque[_Handle] = deque()
        for _ in range(self._prefetch * len(self._workers)):
            self._assign(indices, turns, pending)
        return self._results(indices, turns, pending)

    def _assign(
        self, indices: Iterator[Any], turns: Iterator[_Handle], pending: deque[_Handle]
    ) -> None:
        """Give the next index, if there is one, to the next worker that has not come to an end."""
        index = next(indices, _NOTHING)
        if index is _NOTHING:
            return
        for worker in (next(turns) for _ in self._workers):
            if not worker.ended:
                worker.send(encode(("fetch", index)))
                pending.append(worker)
                return

    def _results(
        self, indices: Iterator[Any], turns: Iterator[_Handle], pending: deque[_Handle]
    ) -> Iterator[Any]:
        try:
            while pending:
                worker = pending.popleft()
                kind, value = worker.receive(self._timeout)
                if kind == "error":
                    _raise_again(worker.number, *value)
                if not worker.ended:  # what an ended one still had is void, and not made up for
                    worker.ended = kind == "end"
                    self._assign(indices, turns, pending)
                if kind == "data":
                    yield value
        finally:
            if not self._persistent:
                self.close()

    def _restart(self) -> None:
        """Drop what an earlier iteration left unread, and start datasets anew."""
        for worker in self._workers:
            worker.send(encode(("restart", None)))
        for worker in self._workers:
            while worker.receive(self._timeout)[0] != "restarted":
                pass
            worker.ended = False


class _Handle:
    """One process and this side's end of the socket pair."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.ended = False  # its iterable dataset is through
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    f"from dtrain.utils.data.worker import main; main({theirs.fileno()})",
                ],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=_environment(),
            )
        self.pipe = Connection(ours.detach())

    def send(self, frames: list[Any]) -> None:
        try:
            send(self.pipe, frames)
        except OSError as error:
            raise self._died() from error

    def receive(self, timeout: float) -> tuple[str, Any]:
        """The next answer; RuntimeError after `timeout` seconds (0: never) or without a worker."""
        deadline = monotonic() + timeout if timeout else None
        try:
            while not self.pipe.poll(LIFE_CHECK if deadline is None else min(LIFE_CHECK, timeout)):
                if deadline is not None and monotonic() >= deadline:
                    raise RuntimeError(
                        f"DataLoader timed out after {timeout} seconds: worker {self.number} (pid "
                        f"{self.process.pid}) has not finished its batch"
                    )
                if self.process.poll() is not None:
                    raise self._died()
            answer: tuple[str, Any] = receive(self.pipe)
        except (EOFError, OSError) as error:
            raise self._died() from error
        return answer

    def _died(self) -> RuntimeError:
        try:
            code: int | None = self.process.wait(END_GRACE)
        except subprocess.TimeoutExpired:
            code = None
        return RuntimeError(
            f"DataLoader worker {self.number} (pid(s) {self.process.pid}) exited unexpectedly with "
            f"exit code {code}. What it said is on the standard error stream; with num_workers=0 "
            "the dataset is read in this process."
        )


def _encode_job(job: Job) -> list[Any]:
    try:
        return encode(job)
    except Exception as error:
        raise TypeError(
            "the dataset, collate_fn or worker_init_fn of a DataLoader cannot be sent to worker "
            f"processes: {error}. Open files, locks and connections in __getitem__ or in "
            "worker_init_fn, or use num_workers=0."
        ) from error


def _environment() -> dict[str, str]:
    """This process's, with its import path and one computing thread."""
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return {**os.environ, **threads, "PYTHONPATH": path}


class _Text(str):
    """A message that a KeyError shows with its line breaks."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _raise_again(number: int, kind: type[Exception], text: str) -> None:
    message = f"Caught {kind.__name__} in DataLoader worker process {number}.\nOriginal {text}"
    try:
        error: Exception = kind(_Text(message))
    except Exception:  # a class that wants other arguments
        error = RuntimeError(message)
    raise error


def _end(workers: list[_Handle]) -> None:
    """Close the pipes, which ends the workers; kill those that do not within END_GRACE."""
    for worker in workers:
        worker.pipe.close()
    deadline = monotonic() + END_GRACE
    for worker in workers:
        try:
            worker.process.wait(max(0.0, deadline - monotonic()))
        except subprocess.TimeoutExpired:
            worker.process.kill()
            worker.process.wait()
