"""`spawn` and `start_processes`: n processes that run `fn(i, *args)`, joined as one.

Owns: their start, their end and the exception that says what failed, with torch.multiprocessing's
names and sentences. Rules: 1. no process outlives its parent, however that ends. 2. Of several
failures the cause is raised: the earliest that is not the loss of another rank. 3. A traceback
comes back through a pipe of its own process: nothing is written to a disk.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple, cast

from dtrain import machine, threads
from dtrain.errors import lost_peer
from dtrain.logs import get_logger
from dtrain.wire import dumps, loads

__all__ = [
    "ProcessContext",
    "ProcessException",
    "ProcessExitedException",
    "ProcessRaisedException",
    "spawn",
    "start_processes",
]

_log = get_logger(__name__)
_PR_SET_PDEATHSIG = 1
# Longer tracebacks keep their end. A pipe holds 64 KiB: writing it never waits for the parent.
_LONGEST = 48 << 10
# A rank that only lost another one may be the first that ends: wait so long for the one it lost.
_CAUSE_SECONDS = 1.0
_TERM_SECONDS = 30.0  # torch's, for SIGTERM to have its effect
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class ProcessException(Exception):
    """A process failed: `error_index`, its number, and `error_pid`."""

    def __init__(self, msg: str, error_index: int, error_pid: int) -> None:
        super().__init__(msg)
        self.msg = msg
        self.error_index = error_index
        self.error_pid = error_pid

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.msg, self.error_index, self.error_pid)


class ProcessRaisedException(ProcessException):
    """A process raised an exception; the text has its traceback."""


class ProcessExitedException(ProcessException):
    """A process ended by a signal (`signal_name`) or with an `exit_code` of its own."""

    def __init__(
        self,
        msg: str,
        error_index: int,
        error_pid: int,
        exit_code: int,
        signal_name: str | None = None,
    ) -> None:
        super().__init__(msg, error_index, error_pid)
        self.exit_code = exit_code
        self.signal_name = signal_name

    def __reduce__(self) -> tuple[Any, ...]:
        fields = (self.msg, self.error_index, self.error_pid, self.exit_code, self.signal_name)
        return type(self), fields


class Failure(NamedTuple):
    """How one process failed; `text` is its traceback, "" where there is none."""

    lost_peer: bool
    time: float  # of the monotonic clock, which all processes of a host share
    number: int  # of the process
    text: str


class ProcessContext:
    """Processes started together. Source: torch.multiprocessing.ProcessContext."""

    def __init__(self, processes: Sequence[BaseProcess], reports: Sequence[Connection]) -> None:
        self.processes = list(processes)
        self.sentinels = {process.sentinel: i for i, process in enumerate(processes)}
        self._reports = list(reports)
        self._failures: list[Failure] = []

    def pids(self) -> list[int]:
        """Their process ids, by number."""
        return [int(process.pid or 0) for process in self.processes]

    def join(self, timeout: float | None = None, grace_period: float | None = None) -> bool:
        """Wait, at most `timeout` seconds, for one process or more to end; whether all have.

        Call it until it returns True. When a process failed the others are ended: they have
        `grace_period` seconds to end by themselves, then get SIGTERM and, `grace_period` (30 if
        None) seconds later, SIGKILL. Raises `ProcessRaisedException` or `ProcessExitedException`.
        """
        self._reap(timeout)
        if self._failures and self._failures[0].lost_peer:
            deadline = time.monotonic() + _CAUSE_SECONDS
            while all(failure.lost_peer for failure in self._failures) and self.sentinels:
                if not self._reap(max(0.0, deadline - time.monotonic())):
                    break
        if self._failures:
            self._stop(grace_period)
            self._raise(min(self._failures))
        return not self.sentinels

    def _reap(self, timeout: float | None) -> int:
        """Note the end of those that have ended, once one has; how many there were."""
        ready = wait(self.sentinels, timeout=timeout) if self.sentinels else []
        for sentinel in ready:
            index = self.sentinels.pop(cast("int", sentinel))
            process, report = self.processes[index], self._reports[index]
            process.join()
            with report:
                if process.exitcode != 0:
                    self._failures.append(_read(report, index))
        return len(ready)

    def _stop(self, grace_period: float | None) -> None:
        """End all that still run. Blocks at most two grace periods."""
        if grace_period is not None:
            self._wait_for_all(grace_period)
        for process in self._alive():
            _log.info("process %s gets SIGTERM: another one failed", process.pid)
            process.terminate()
        self._wait_for_all(_TERM_SECONDS if grace_period is None else grace_period)
        for process in self._alive():
            _log.warning("process %s did not end by SIGTERM and gets SIGKILL", process.pid)
            process.kill()
        for process in self.processes:
            process.join()
        for report in self._reports:
            report.close()
        self.sentinels.clear()

    def _wait_for_all(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))

    def _alive(self) -> Iterable[BaseProcess]:
        return [process for process in self.processes if process.is_alive()]

    def _raise(self, failure: Failure) -> None:
        """The exception of a failure, in torch's words."""
        index, process = failure.number, self.processes[failure.number]
        pid, code = int(process.pid or 0), int(process.exitcode or 0)
        if failure.text:
            head = f"\n\n-- Process {index:d} terminated with the following error:\n"
            raise ProcessRaisedException(head + failure.text, index, pid)
        if code < 0:
            name = _signal_name(-code)
            raise ProcessExitedException(
                f"process {index:d} terminated with signal {name}", index, pid, code, name
            )
        raise ProcessExitedException(
            f"process {index:d} terminated with exit code {code:d}", index, pid, code
        )


def _read(report: Connection, index: int) -> Failure:
    """What a process that has ended said of its failure, if it could."""
    now = time.monotonic()
    with contextlib.suppress(EOFError):
        if report.poll():
            lost, at, text = loads(report.recv_bytes())
            return Failure(lost, at, index, text)
    return Failure(False, now, index, "")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"<Unknown signal {number}>"


def start_processes(
    fn: Callable[..., Any],
    args: tuple[Any, ...] = (),
    nprocs: int = 1,
    join: bool = True,
    daemon: bool = False,
    start_method: str = "spawn",
) -> ProcessContext | None:
    """Start `nprocs` processes that call `fn(i, *args)`, i from 0; `fn` is found by its name.

    `start_method`: "spawn", "forkserver" or "fork" (which sockets and threads of this process do
    not survive). With `join` blocks until all have ended, and raises as `ProcessContext.join`;
    without, returns the context. Each process computes with cores / nprocs threads, at least 1,
    unless OMP_NUM_THREADS or a like variable is set. Source: torch.multiprocessing.
    """
    context: Any = multiprocessing.get_context(start_method)
    own_threads = not any(name in os.environ for name in _THREADS)
    share = max(1, machine.cores() // nprocs) if own_threads and nprocs > 1 else 0
    # The kernel's signal comes from the thread that forks; a fork server outlives us for its forks.
    lasting = threading.current_thread() is threading.main_thread()
    lasting = lasting and start_method != "forkserver"
    processes: list[BaseProcess] = []
    reports: list[Connection] = []
    try:
        for index in range(nprocs):
            ours, theirs = context.Pipe(duplex=False)
            reports.append(ours)
            with theirs:
                given = (theirs, lasting, share, fn, index, args)
                process = context.Process(target=_main, args=given, daemon=daemon)
                process.start()
            processes.append(process)
    except BaseException:
        for process in processes:
            process.kill()
            process.join()
        for report in reports:
            report.close()
        raise
    started = ProcessContext(processes, reports)
    if not join:
        return started
    while not started.join():
        pass
    return None


def spawn(
    fn: Callable[..., Any],
    args: tuple[Any, ...] = (),
    nprocs: int = 1,
    join: bool = True,
    daemon: bool = False,
    start_method: str = "spawn",
) -> ProcessContext | None:
    """`start_processes` with new interpreters. Source: torch.multiprocessing.spawn.

    Another `start_method` is not taken: FutureWarning, as in PyTorch.
    """
    if start_method != "spawn":
        warnings.warn(
            f"This method only supports start_method=spawn (got: {start_method}).\n"
            "To use a different start_method use:\n\t\t torch.multiprocessing.start_processes(...)",
            FutureWarning,
            stacklevel=2,
        )
    return start_processes(fn, args, nprocs, join, daemon, start_method="spawn")


def _main(
    report: Connection,
    lasting: bool,
    share: int,
    fn: Callable[..., Any],
    index: int,
    args: tuple[Any, ...],
) -> None:
    """What a process does; its exit code is 1 when `fn` raises."""
    _die_with_parent(lasting)
    if share:
        threads.set_num_threads(share)
    try:
        fn(index, *args)
    except KeyboardInterrupt:
        pass  # as in PyTorch: Ctrl-C reaches the parent too, which says so
    except Exception as error:
        text = traceback.format_exc()
        report.send_bytes(dumps([lost_peer(error), time.monotonic(), text[-_LONGEST:]]))
        sys.exit(1)


def _die_with_parent(lasting: bool) -> None:
    """Be killed when the parent ends: by the kernel, or by a thread that waits for it.

    The kernel's signal comes when the thread that forked us ends: it has to last.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    if lasting:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if not parent.is_alive():
            os.kill(os.getpid(), signal.SIGKILL)
        return

    def watch() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="dtrain parent", daemon=True).start()
