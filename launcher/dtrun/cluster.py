"""A launch on several nodes that meet: this node's agent, and its end of the line to the head.

The head decides (`membership`), the envoy carries (`envoy`), the agent here obeys: it starts its
ranks when told, ends them when told, reports how they ended, and says what the head says. Its exit
code is the job's, the same on every node; 75 where the head was lost, which is worth a new try.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from dtrun import errors
from dtrun.agent import Agent
from dtrun.membership import TRY_AGAIN, Message
from dtrun.rendezvous import end_of
from dtrun.secret import hand_over
from dtrun.spec import interpreter_flags

LONGEST_TRACEBACK = 20_000  # characters that are sent to other nodes
CLOSING_SECONDS = 4.0  # for the envoy to say good-bye, on the head also to hear it


class Line:
    """The envoy's process and the two pipes to it; `heard` is called with each message.

    A line that breaks is heard as {"say": "lost"}.
    """

    def __init__(
        self,
        opening: Message,
        env: dict[str, str],
        selector: selectors.BaseSelector,
        heard: Callable[[Message], None],
    ) -> None:
        self._heard = heard
        self._selector = selector
        self._text = b""
        self._process = subprocess.Popen(
            [sys.executable, *interpreter_flags(), "-m", "dtrun.envoy"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=env,
        )
        self.pid = self._process.pid
        assert self._process.stdout is not None
        self._fd = self._process.stdout.fileno()
        os.set_blocking(self._fd, False)
        selector.register(self._fd, selectors.EVENT_READ, self._read)
        self.tell(**opening)

    def tell(self, **message: Any) -> None:
        """Send a message; a line that is broken is noticed where it is read."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()

    def _read(self) -> None:
        data = os.read(self._fd, 1 << 16)
        if not data:
            self._selector.unregister(self._fd)
            self._heard({"say": "lost", "why": "the process that talks to the head has ended"})
        *lines, self._text = (self._text + data).split(b"\n")
        for line in lines:
            self._heard(json.loads(line))

    def close(self) -> None:
        """End the envoy: politely, then at once. Blocks for CLOSING_SECONDS at most."""
        if self._fd in self._selector.get_map():
            self._selector.unregister(self._fd)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(CLOSING_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


class ClusterAgent(Agent):
    """One node's part of a job on several nodes that meet."""

    _start: Message | None = None  # an epoch to be started
    _running: int | None = None  # the epoch whose ranks run
    _over: int | None = None  # the exit code, once it is known
    _epoch_secret: bytes | None = None
    _own: tuple[errors.Failure, ...] = ()  # failures here in the last epoch

    def _reserve_and_run(self) -> int:
        self._announce()
        self._line = Line(self._opening(), self._envoys_environment(), self._selector, self._hear)
        self._spared = (self._line.pid,)
        try:
            while self._over is None:
                self._step()
            return self._over
        finally:
            self._line.close()

    def _opening(self) -> Message:
        spec = self._spec
        assert spec.terms is not None
        join = {"say": "join", "host": self._hostname, "nproc": spec.nproc}
        return {
            "terms": list(spec.terms),
            "host": spec.master_addr,
            "port": spec.master_port,
            "is_host": spec.is_head,
            "local_addr": spec.local_addr,
            "join": join | {"wanted": spec.node_rank if spec.terms.static else -1},
        }

    def _envoys_environment(self) -> dict[str, str]:
        """With the secret of the job, if it has one, in a directory like a rank's."""
        env = {**self._environ, "TORCHELASTIC_RUN_ID": self._spec.run_id}
        env |= {"TORCHELASTIC_RESTART_COUNT": "meeting", "DTRAIN_RUN_DIR": self._run_dir}
        if self._spec.secret is not None:
            hand_over(self._run_dir, self._spec.secret)
        return env

    def _step(self) -> None:
        """Run an epoch if one is to be started, else wait for what the head or a signal says."""
        if self._start is not None:
            start, self._start = self._start, None
            self._run_epoch(start)
            return
        self._streams.watch()
        for key, _ in self._selector.select():
            if key.fd == self._signals.fd:
                self._leave_if_told(self._signals.read())
            elif key.data is not None:
                key.data()
            else:
                self._streams.ready(key.fd)

    def _leave_if_told(self, received: list[int]) -> None:
        stops = [signum for signum in received if signum in self._spec.stop_signals]
        if stops and self._over is None:
            self._received = stops[0]
            self._over = self._leave()

    def _leave(self) -> int:
        code = self._stopped()
        assert self._received is not None
        why = f"stopped by {errors.signal_name(self._received)}"
        self._line.tell(say="leave", why=why, code=code, clean=self._in_order)
        return code

    def _run_epoch(self, start: Message) -> None:
        spec = self._spec._replace(
            node_rank=start["node_rank"],
            nnodes=start["nnodes"],
            first_rank=start["first"],
            ranks=start["size"],
        )
        self._epoch_secret = start["secret"].encode()
        attempt = self._numbered(start["epoch"], start["restarts"], start["addr"], start["port"])
        self._running = start["epoch"]
        failures = self._attempt(spec, attempt)
        self._running = None
        self._own = tuple(failures)
        if self._received is not None:
            self._over = self._leave()
        elif self._over is None:
            told = [self._in_words(failure) for failure in failures]
            self._line.tell(say="ended", epoch=start["epoch"], failures=told)

    def _secret(self) -> bytes | None:
        return self._epoch_secret

    def _in_words(self, failure: errors.Failure) -> Message:
        short = failure._replace(traceback=failure.traceback[-LONGEST_TRACEBACK:])
        code = errors.exit_code(failure)
        return short._asdict() | {"consequence": failure.consequence, "code": code}

    # ---- what the head says

    def _hear(self, message: Message) -> None:
        getattr(self, f"_told_{message['say']}")(message)

    def _told_start(self, message: Message) -> None:
        self._start = message

    def _told_stop(self, message: Message) -> None:
        if self._start is not None:  # it has not begun yet
            self._start = None
            self._line.tell(say="ended", epoch=message["epoch"], failures=[])
        elif self._running == message["epoch"]:
            self._streams.say(f"dtrun: {message['why']}: the ranks of this node are stopped\n")
            assert self._group is not None
            self._group.stop(grace=message["grace"])

    def _told_notice(self, message: Message) -> None:
        self._streams.say(f"dtrun: {message['why']}\n")

    def _told_failed(self, message: Message) -> None:
        """The epoch was a failure: show it in full where it happened and on the head."""
        root = message["root"]
        if root is None:
            self._streams.say(f"dtrun: {message['why']}\n")
        else:
            first = errors.from_fields(root)
            own = [one for one in self._own if (one.host, one.pid) == (first.host, first.pid)]
            if own or self._is_head():
                failures = list(self._own) if own else [first]
                host, calls = self._hostname, self._last_calls
                self._streams.say(errors.report(self._spec.target, failures, host, calls))
            else:
                self._streams.say(f"dtrun: failed on {first.host}: {errors.line(first)}\n")
        if message["again"]:
            self._streams.say(f"dtrun: {message['again']} of all workers\n")

    def _is_head(self) -> bool:
        return self._group is not None and self._group.spec.node_rank == 0

    def _told_over(self, message: Message) -> None:
        self._end(message["code"], message["why"])

    def _told_lost(self, message: Message) -> None:
        where = end_of(self._spec.master_addr, self._spec.master_port)
        why = f"the head of the job at {where} is lost: {message['why']}"
        self._end(TRY_AGAIN, f"{why}. Start dtrun again on all nodes to go on")

    def _end(self, code: int, why: str) -> None:
        if self._over is not None:
            return
        self._over, self._start = code, None
        if why:
            self._streams.say(f"dtrun: {why}\n")
        if self._running is not None:
            assert self._group is not None
            self._group.stop(grace=False)
