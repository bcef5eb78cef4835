"""Ranks as processes, each forked from a server that has imported everything (`fork_server`).

Owns: `Process`, one rank; the connection to the server, which is started when it is first needed
and ends with this process. Nothing here waits without a deadline. A letter (memfd) carries the task
there and the report back, so that neither side waits for the other to read.
"""

from __future__ import annotations

import atexit
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any

from dtrain.letters import new_letter, read_letter, write_letter
from dtrain.wire import dumps, loads

__all__ = ["Process", "how_ended", "own_descriptors", "own_process"]

# One thread per process: what dtrun gives to ranks, and threads of BLAS do not survive a fork.
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS")

# How long the server may take to start (its imports take 0.4 s on an idle core) or to end.
_START, _END = 30.0, 10.0


class _Server:
    """The fork server of this process."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "dtrain.testing.fork_server", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=os.environ | dict.fromkeys(_THREADS, "1"),
            )

    def close(self) -> None:
        """End the server and all its ranks."""
        self.control.close()
        if self.owner == os.getpid():
            self.process.wait(_END)


_server: _Server | None = None
_lock = threading.Lock()


def _living_server() -> _Server:
    global _server
    with _lock:
        if _server is not None and (
            _server.owner != os.getpid() or _server.process.poll() is not None
        ):
            _server.control.close()
            _server = None
        if _server is None:
            _server = _Server()
            atexit.register(_server.close)
        return _server


def own_process() -> int | None:
    """The process id of the server, if it has been started: no leak of any test."""
    return None if _server is None else _server.process.pid


def own_descriptors() -> list[int]:
    """The descriptors that lead to the server."""
    return [] if _server is None else [_server.control.fileno()]


class Process:
    """One forked process that runs a task of `rank.run`; `pid` is its process id."""

    def __init__(self, task: dict[str, Any]) -> None:
        self.status: int | None = None
        self._server = _living_server()
        self._letter = new_letter("dtrain-task")
        here = {"environ": dict(os.environ), "cwd": os.getcwd(), "path": sys.path}
        write_letter(self._letter, dumps(here | task))
        self._notices, theirs = os.pipe()
        try:
            # Standard output and standard error of the rank: what descriptor 2 is here and now.
            descriptors = [self._letter, theirs, 2]
            socket.send_fds(self._server.control, [b"start"], descriptors)
        finally:
            os.close(theirs)
        self.pid = self._read(time.monotonic() + _START)

    def _read(self, deadline: float) -> int:
        """The next number that the server tells of this process."""
        left = max(0.0, deadline - time.monotonic())
        if not select.select([self._notices], [], [], left)[0]:
            raise TimeoutError("no word from the process in time")
        data = os.read(self._notices, 8)
        if len(data) < 8:
            self.status = -signal.SIGKILL  # by the kernel: its parent has died
            raise RuntimeError("the fork server of dtrain.testing has ended: see its output")
        return int.from_bytes(data, "little", signed=True)

    def wait(self, deadline: float) -> int:
        """The exit status, negative for a signal; TimeoutError at `deadline` (time.monotonic())."""
        if self.status is None:
            self.status = self._read(deadline)
        return self.status

    def report(self) -> list[Any] | None:
        """What an ended process has reported; None if it did not come to that."""
        text = read_letter(self._letter)
        return loads(text) if text else None

    def close(self) -> None:
        """Kill the process if it still runs, and give back the descriptors; idempotent."""
        if self._notices < 0:
            return
        if self.status is None:
            self._server.control.send(f"kill {self.pid}".encode())
            self.wait(time.monotonic() + _END)
        os.close(self._notices)
        os.close(self._letter)
        self._notices = -1


def how_ended(status: int) -> str:
    """The exit status in words."""
    return signal.Signals(-status).name if status < 0 else f"exit code {status}"
