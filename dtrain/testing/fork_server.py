"""The process that ranks are forked from: `python -m dtrain.testing.fork_server FD`.

Owns: forking, reaping and killing ranks. Started by `processes` only. It has imported dtrain, has
one thread and no socket of ZeroMQ, so that a fork of it is a sound process after 5 ms, where a new
interpreter takes 400. It ends when the other end of the socket FD is closed, and its ranks with it.

Messages on FD: [b"start", descriptors (letter, notices, output)] and [b"kill PID"]. The letter
holds the task, and then the rank's report; notices is a pipe for the rank's process id and, when
it has ended and was reaped, its exit status (negative for a signal), 8 bytes each.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import random
import select
import signal
import socket
import struct
import sys

import numpy as np

import dtrain.comm.transports.shm
import dtrain.testing.distributed  # noqa: F401  what ranks need is imported once, here
from dtrain.testing import rank

NUMBER = struct.Struct("<q")

_PR_SET_PDEATHSIG = 1


class Server:
    """Serves one process until that closes its end of `control`."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._poll = select.poll()
        self._poll.register(control, select.POLLIN)
        self._ranks: dict[int, tuple[int, int]] = {}  # {descriptor of process: (id, notices)}

    def serve(self) -> None:
        """Blocks until the end of file on `control`; then no rank lives."""
        while True:
            for descriptor, _ in self._poll.poll():
                if descriptor != self._control.fileno():
                    self._reap(descriptor)
                elif not self._obey():
                    return self._end()

    def _obey(self) -> bool:
        """Carry out one message; False at the end of the file."""
        message, descriptors, _, _ = socket.recv_fds(self._control, 64, 3)
        if message == b"start":
            self._start(*descriptors)
        elif message:
            pid = int(message.removeprefix(b"kill "))
            if any(pid == known for known, _ in self._ranks.values()):  # not reaped: still its own
                os.kill(pid, signal.SIGKILL)
        return bool(message)

    def _start(self, letter: int, notices: int, output: int) -> None:
        if len(os.listdir("/proc/self/task")) != 1:
            raise RuntimeError("the fork server has threads: its forks would not be sound")
        server = os.getpid()
        pid = os.fork()
        if pid == 0:
            self._become_rank(server, letter, notices, output)
        os.close(letter)
        os.close(output)
        process = os.pidfd_open(pid)
        self._ranks[process] = (pid, notices)
        self._poll.register(process, select.POLLIN)
        _tell(notices, pid)

    def _become_rank(self, server: int, letter: int, notices: int, output: int) -> None:
        """What the forked child does; does not return."""
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != server:  # it died before the kernel was asked
            os._exit(1)
        self._control.close()
        for process, (_, others) in self._ranks.items():
            os.close(process)
            os.close(others)
        os.close(notices)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        random.seed()
        np.random.seed()
        status = 1
        try:
            status = rank.run(letter)
        finally:  # the server's own frames are above: they must not go on here
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit(status)

    def _reap(self, process: int) -> None:
        pid, notices = self._ranks.pop(process)
        self._poll.unregister(process)
        os.close(process)
        _tell(notices, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        os.close(notices)

    def _end(self) -> None:
        for pid, _ in self._ranks.values():
            os.kill(pid, signal.SIGKILL)
        for process in list(self._ranks):
            self._reap(process)


def _tell(notices: int, number: int) -> None:
    with contextlib.suppress(BrokenPipeError):  # nobody wants to know any more
        os.write(notices, NUMBER.pack(number))


def main() -> None:
    """Serve until the process that started this one ends."""
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who started us
    gc.collect()
    gc.freeze()
    Server(socket.socket(fileno=int(sys.argv[1]))).serve()


if __name__ == "__main__":
    main()
