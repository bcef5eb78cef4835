"""One attempt: starts all workers of this node, moves their output, and sees all of them end.

One thread, one loop, one sleep: a poll over signals (SIGCHLD when a worker ends), the workers'
output, room on the console, and the next deadline. What to do is `Supervisor`'s decision.
"""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import time
from collections.abc import Collection, Mapping, Sequence

from dtrun import debug, numa, process
from dtrun.errors import Failure, read_recorded
from dtrun.keeper import ASK_SIGNAL
from dtrun.shortage import Shortage
from dtrun.spec import (
    STDERR,
    STDOUT,
    Attempt,
    Spec,
    command,
    environment,
    error_file,
    exit_file,
    fault_file,
    heeds,
)
from dtrun.streams import LOG_NAMES, Streams
from dtrun.supervisor import ABANDONED, STOP_SECONDS, Supervisor

# What `should_stop` in a rank takes over; an interrupt is for whoever sits at the terminal.
HEEDED = (signal.SIGTERM, signal.SIGUSR1)

# For a console that takes nothing while dtrun is being stopped.
LAST_WORDS_SECONDS = 0.2


class Undying(Exception):
    """Workers that SIGKILL does not end; says which."""


class Signals:
    """Turns signals into bytes on a descriptor that a selector can wait for."""

    def __init__(self, signals: set[int]) -> None:
        self.fd, write = os.pipe()
        os.set_blocking(self.fd, False)
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        for signum in signals:
            signal.signal(signum, lambda *_: None)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)

    def read(self) -> list[int]:
        """The signals that have arrived, SIGCHLD apart; call it when `fd` is readable."""
        return [number for number in os.read(self.fd, 4096) if number != signal.SIGCHLD]


class Group:
    """The workers of one attempt, by local rank.

    A descriptor that is registered with a function as its data is that function's to deal with.
    """

    def __init__(
        self,
        spec: Spec,
        attempt: Attempt,
        streams: Streams,
        environ: Mapping[str, str],
        memory: Sequence[tuple[int, int]],
        spared: Collection[int] = (),
    ) -> None:
        self.supervisor = Supervisor(range(spec.nproc))
        self._memory = memory  # of each local rank
        self._cores = numa.shares(spec.numa_binding, spec.nproc)
        self._shortage = Shortage()
        self.spared = spared  # children of this process that are no workers
        self.heeded = False  # a signal to stop was given to ranks that end by themselves
        self.spec = spec
        self._attempt = attempt
        self._streams = streams
        self._environ = environ
        self._workers: list[subprocess.Popen[bytes]] = []
        self._ended: dict[int, float] = {}  # wall-clock time of each end, as error files have it
        self._stopped_by: dict[int, int] = {}  # the signal dtrun sent before the end

    def run(self, selector: selectors.BaseSelector, signals: Signals) -> list[Failure]:
        """Run all workers to their end and return those that did not succeed.

        Raises OSError when a worker cannot be started; those started before it are killed then.
        Raises `Undying` when a worker has not ended GIVE_UP_SECONDS after SIGKILL.
        """
        try:
            for local_rank in range(self.spec.nproc):
                self._start(local_rank)
        except OSError:
            for worker in self._workers:
                process.signal_group(worker, signal.SIGKILL)
            raise
        while self.supervisor.living:
            self._step(selector, signals)
            if self.supervisor.state == ABANDONED:
                raise Undying(self._undying())
        self._sweep()
        self._streams.drain()
        return [self._failure(rank) for rank, one in enumerate(self._workers) if one.returncode]

    def _start(self, local_rank: int) -> None:
        os.makedirs(os.path.join(self._attempt.error_dir, str(local_rank)))
        stdout, stderr = (
            self._streams.open(local_rank, bit, self._attempt.error_dir) for bit in (STDOUT, STDERR)
        )
        memory = self._memory[local_rank]
        env = environment(self.spec, self._attempt, local_rank, self._environ)
        try:
            worker = process.spawn(
                command(self.spec, local_rank, self._environ),
                env | {"DTRAIN_MEMORY": ",".join(map(str, memory))},
                # One reader can make sense of a shared stdin, several cannot.
                None if local_rank == 0 else subprocess.DEVNULL,
                stdout,
                stderr,
                memory,
                self._cores[local_rank],
            )
        finally:
            for fd in (stdout, stderr):
                if fd is not None and fd >= 0:
                    os.close(fd)
        self._workers.append(worker)

    def _step(self, selector: selectors.BaseSelector, signals: Signals) -> None:
        """Sleep until something happens, and deal with it."""
        self._streams.watch()
        for key, _ in selector.select(self._timeout()):
            if key.fd == signals.fd:
                self._on_signals(signals.read())
            elif key.data is not None:
                key.data()
            else:
                self._streams.ready(key.fd)
        now = time.monotonic()
        self._streams.show_tails(now)
        self._send(self.supervisor.tick(now))

    def stop(self, *, grace: bool) -> None:
        """End all workers, because of what happened on another node."""
        patience = STOP_SECONDS if grace else self._patience(signal.SIGTERM)
        signum = self.supervisor.stop(time.monotonic(), grace=grace, patience=patience)
        self._send(signum, gently=self.heeded)

    def _timeout(self) -> float | None:
        due = [d for d in (self.supervisor.deadline, self._streams.deadline) if d is not None]
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _on_signals(self, received: list[int]) -> None:
        now = time.monotonic()
        for local_rank in sorted(self.supervisor.living):
            code = self._workers[local_rank].poll()
            if code is not None:
                self._tell_end(local_rank, code)
                self._ended[local_rank] = time.time()
                self.supervisor.exited(local_rank, code, now)
        for signum in received:
            if signum == ASK_SIGNAL and signum not in self.spec.stop_signals:
                text = debug.ask(self._attempt.run_dir)
                self._streams.say(text or "dtrun: no rank has joined a group yet\n")
                self._pass_on(signum)
                continue
            patience = self._patience(signum)
            self._send(self.supervisor.signalled(signum, now, patience), gently=self.heeded)

    def _patience(self, signum: int) -> float:
        """How long the ranks may go on after a signal; `heeded` says whether they asked for it."""
        living = self.supervisor.living
        self.heeded = signum in HEEDED and all(heeds(self._attempt, rank) for rank in living)
        return self.spec.shutdown_timeout if self.heeded else STOP_SECONDS

    def _pass_on(self, signum: int) -> None:
        """Give a signal that ends nobody to those ranks that have asked for it."""
        for local_rank in self.supervisor.living:
            if heeds(self._attempt, local_rank):
                self._workers[local_rank].send_signal(signum)

    def _tell_end(self, local_rank: int, code: int) -> None:
        """Write down how a worker ended, for those who miss it; the file appears complete."""
        path = exit_file(self._attempt, self.spec.rank(local_rank))
        try:
            with open(f"{path}.partial", "w", encoding="utf-8") as file:
                file.write(f'{{"pid": {self._workers[local_rank].pid}, "code": {code}}}')
            os.replace(f"{path}.partial", path)
        except OSError as error:
            self._streams.say(f"dtrun: cannot tell the other ranks of an end: {error}\n")

    def _send(self, signum: int | None, *, gently: bool = False) -> None:
        """To all workers and what they have started; `gently`: to the workers alone."""
        if signum is not None:
            for local_rank in self.supervisor.living:
                self._stopped_by[local_rank] = signum
                if gently:
                    self._workers[local_rank].send_signal(signum)
                else:
                    process.signal_group(self._workers[local_rank], signum)

    def _sweep(self) -> None:
        left = process.sweep(self.spared)
        if left:
            self._streams.say(f"dtrun: ended {left} process(es) that the workers left behind\n")

    def _undying(self) -> str:
        left = sorted(self.supervisor.living)
        named = (f"rank {self.spec.rank(rank)} (pid {self._workers[rank].pid})" for rank in left)
        return ", ".join(named)

    def _failure(self, local_rank: int) -> Failure:
        worker = self._workers[local_rank]
        path = error_file(self._attempt, local_rank)
        recorded = read_recorded(path, fault_file(self._attempt, local_rank), worker.returncode)
        if recorded.thread is None:
            self._log_traceback(local_rank, recorded.traceback)
        kept = self.spec.log_dir is not None and os.path.exists(path)
        return Failure(
            rank=self.spec.rank(local_rank),
            local_rank=local_rank,
            pid=worker.pid,
            exitcode=worker.returncode,
            time=recorded.time or self._ended[local_rank],
            message=recorded.message,
            traceback=recorded.traceback,
            lost_peer=recorded.lost_peer,
            stopped_by=self._stopped_by.get(local_rank),
            error_file=path if kept else "<N/A>",
            host=os.uname().nodename,
            out_of_memory=self._shortage.words() if worker.returncode == -signal.SIGKILL else "",
        )

    def _log_traceback(self, local_rank: int, text: str) -> None:
        """The worker did not print it, but its log would not be complete without it."""
        path = os.path.join(self._attempt.error_dir, str(local_rank), LOG_NAMES[STDERR])
        if text and os.path.exists(path):
            with open(path, "a", encoding="utf-8", errors="backslashreplace") as log:
                log.write(text)


def flush(
    streams: Streams, selector: selectors.BaseSelector, signals: Signals, *, hurry: bool
) -> None:
    """Give the consoles what they have not taken; in a `hurry`, or after a signal, not for long."""
    deadline = time.monotonic() + LAST_WORDS_SECONDS if hurry else None
    while streams.pending():
        streams.watch()
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            return
        for key, _ in selector.select(left):
            if key.fd == signals.fd:
                if signals.read():
                    return
            elif key.data is None:
                streams.ready(key.fd)
