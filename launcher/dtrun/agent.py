"""The launcher proper: reserves what a run needs, starts the group, restarts it, and reports.

The exit code is 0 when every worker of one attempt succeeded; the code of the worker that failed
first (128 + n for signal n, as in a shell); 128 + n when dtrun itself was ended by signal n; 2
when rank 0's address cannot be used; 126 when a worker cannot be started; 75 when one cannot be
ended.
"""

from __future__ import annotations

import os
import selectors
import socket
from collections.abc import Mapping

from dtrun import debug, errors, process, secret
from dtrun.group import Group, Signals, Undying, flush
from dtrun.keeper import CANNOT_START
from dtrun.membership import TRY_AGAIN
from dtrun.output import make_log_dir
from dtrun.rendezvous import reserve_port
from dtrun.spec import Attempt, Spec, threads_line
from dtrun.streams import Streams
from dtrun.supervisor import GIVE_UP_SECONDS

BAD_ADDRESS = 2
CANNOT_END = (
    f"{{}} has not ended {GIVE_UP_SECONDS:g} s after SIGKILL: the kernel cannot end it, as when it "
    "waits for a disk or a file server that does not answer. It is left behind; look at this host "
    "before you start dtrun here again"
)


class Agent:
    """One run on this node; `signals` are the ones to be stopped by."""

    def __init__(
        self, spec: Spec, run_dir: str, environ: Mapping[str, str], signals: set[int]
    ) -> None:
        self._spec = spec
        self._run_dir = run_dir
        self._environ = environ
        self._selector = selectors.PollSelector()
        self._signals = Signals(signals)
        self._selector.register(self._signals.fd, selectors.EVENT_READ)
        self._hostname = socket.gethostname()
        self._streams = Streams(spec, self._selector, self._hostname)
        self._log_dir = run_dir
        self._received: int | None = None
        self._in_order = False  # the ranks were told to stop, and have ended with 0
        self._last_calls = ""  # of the ranks of an attempt that failed
        self._group: Group | None = None  # of the attempt that runs, or was the last
        self._memory = [process.make_memory() for _ in range(spec.nproc)]
        self._spared: tuple[int, ...] = ()  # children that are no workers

    def run(self) -> int:
        """Launch, see everything end, and return the exit code. Blocks until then."""
        try:
            code = self._reserve_and_run()
        except OSError as error:
            self._streams.say(f"dtrun: error: cannot start the workers: {error}\n")
            code = CANNOT_START
        except Undying as error:
            self._streams.say(f"dtrun: error: {CANNOT_END.format(error)}\n")
            code = TRY_AGAIN
        hurry = self._received is not None
        flush(self._streams, self._selector, self._signals, hurry=hurry)
        return code

    def _reserve_and_run(self) -> int:
        spec = self._spec
        if spec.nnodes > 1:  # the address is another machine's, perhaps
            return self._run_attempts(spec.master_addr, spec.master_port)
        try:
            holder = reserve_port(spec.master_addr, spec.master_port)
        except OSError as error:
            where = f"{spec.master_addr} port {spec.master_port or '0 (any)'}"
            self._streams.say(f"dtrun: error: cannot reserve {where}: {error.strerror}\n")
            return BAD_ADDRESS
        with holder:
            return self._run_attempts(*holder.getsockname()[:2])

    def _run_attempts(self, addr: str, port: int) -> int:
        self._announce()
        for number in range(self._spec.max_restarts + 1):
            failures = self._attempt(self._spec, self._numbered(number, number, addr, port))
            if self._received is not None:
                return self._stopped()
            if not failures:
                return 0
            target, host = self._spec.target, self._hostname
            self._streams.say(errors.report(target, failures, host, self._last_calls))
            if number < self._spec.max_restarts:
                left = f"{number + 1} of {self._spec.max_restarts}"
                self._streams.say(f"dtrun: restart {left} of all workers\n")
        return errors.exit_code(errors.root_cause(failures))

    def _stopped(self) -> int:
        """Say which signal has ended the run; the exit code."""
        assert self._received is not None
        name = errors.signal_name(self._received)
        if self._in_order:
            self._streams.say(f"dtrun: told to stop by {name}, all workers have ended in order\n")
            return 0
        self._streams.say(f"dtrun: stopped by {name}, all workers have ended\n")
        return 128 + self._received

    def _secret(self) -> bytes | None:
        """One node needs none that others know; several without one use each user's own."""
        if self._spec.secret is None and self._spec.nnodes == 1:
            return secret.fresh().encode()
        return self._spec.secret

    def _announce(self) -> None:
        threads = threads_line(self._spec.nproc, self._environ)
        if threads:
            self._streams.say(f"dtrun: {threads}\n")
        if self._spec.log_dir is not None:
            self._log_dir = make_log_dir(self._spec.log_dir, self._spec.run_id)
            self._streams.say(f"dtrun: logs are in {self._log_dir}\n")

    def _numbered(self, number: int, restarts: int, addr: str, port: int) -> Attempt:
        return Attempt(
            number=number,
            master_addr=addr,
            master_port=port,
            run_dir=os.path.join(self._run_dir, str(number)),
            error_dir=os.path.join(self._log_dir, f"attempt_{number}"),
            restarts=restarts,
        )

    def _attempt(self, spec: Spec, attempt: Attempt) -> list[errors.Failure]:
        """Run all workers of this node once; those that did not succeed."""
        os.mkdir(attempt.run_dir, 0o700)
        content = self._secret()
        if content is not None:
            secret.hand_over(attempt.run_dir, secret.Secret(content))
        self._streams.spec = spec
        self._group = Group(spec, attempt, self._streams, self._environ, self._memory, self._spared)
        failures = self._group.run(self._selector, self._signals)
        self._received = self._group.supervisor.received
        self._in_order = self._group.heeded and not failures
        if failures and self._received is None:
            kept = "" if spec.log_dir is None else attempt.error_dir
            self._last_calls = debug.ask(attempt.run_dir, "--report", kept)
        return failures
