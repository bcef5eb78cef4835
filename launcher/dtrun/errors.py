"""How a run failed: what each worker left behind, which failure came first, and the report.

A worker that was stopped by dtrun, or failed only because it lost a peer, is not the root cause as
long as another worker failed by itself. Among those the earliest in time is. The report keeps the
shape and the field names of torchrun's.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from dtrun.spec import BOOTSTRAP

RULE, THIN_RULE = "=" * 60, "-" * 60
# Frames of the launcher's bootstrap in a faulthandler dump, where they cannot be cut off before.
BOOTSTRAP_FRAMES = (BOOTSTRAP, "<frozen runpy>")


class Failure(NamedTuple):
    """One worker that did not succeed; `exitcode` is negative for a signal, as in Popen."""

    rank: int
    local_rank: int
    pid: int
    exitcode: int
    time: float  # seconds since the epoch
    message: str = ""
    traceback: str = ""
    lost_peer: bool = False
    stopped_by: int | None = None  # the signal dtrun had sent it
    error_file: str = "<N/A>"
    host: str = ""
    out_of_memory: str = ""  # that the kernel has killed it for memory, in words

    @property
    def consequence(self) -> bool:
        """Whether another worker is the likely reason."""
        return self.lost_peer or self.stopped_by is not None


class Recorded(NamedTuple):
    """What a worker wrote about its own end."""

    message: str = ""
    traceback: str = ""
    lost_peer: bool = False
    time: float | None = None
    thread: str | None = None  # of an exception that did not end the process, and was printed


def read_recorded(path: str, fault_path: str, exitcode: int) -> Recorded:
    """The worker's error file, or its fault log when a signal ended it; empty without either."""
    if exitcode < 0 and (fault := _read(fault_path)):
        lines = fault.splitlines(keepends=True)
        shown = [line for line in lines if not any(own in line for own in BOOTSTRAP_FRAMES)]
        return Recorded(message=lines[0].strip(), traceback="".join(shown))
    text = _read(path)
    if not text:
        return Recorded()
    import json  # a launcher has to start quickly and seldom to report

    try:
        fields = json.loads(text)
        return Recorded(
            str(fields["message"]),
            str(fields["traceback"]),
            bool(fields["lost_peer"]),
            float(fields["time"]),
            fields["thread"],
        )
    except (ValueError, KeyError, TypeError):
        return Recorded(traceback=text)  # written by the program itself, in a form of its own


def from_fields(fields: Mapping[str, Any]) -> Failure:
    """A failure that another node has sent."""
    return Failure(**{name: fields[name] for name in Failure._fields})


def root_cause(failures: list[Failure]) -> Failure:
    """The failure to show first: the earliest that no other worker explains."""
    return min(failures, key=lambda failure: (failure.consequence, failure.time))


def exit_code(failure: Failure) -> int:
    """The launcher's exit code: the worker's own, or 128 + n for signal n, as a shell says it."""
    return failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode


def report(name: str, failures: list[Failure], hostname: str, last_calls: str = "") -> str:
    """The failure report: the root cause with its whole traceback, then a line for each other.

    `last_calls`: lines that say what the ranks were doing.
    """
    first = root_cause(failures)
    named = f"  ({signal_name(-first.exitcode)})" if first.exitcode < 0 else ""
    when = time.strftime("%Y-%m-%d_%H:%M:%S", time.localtime(first.time))
    lines = [
        RULE,
        f"{name} FAILED",
        THIN_RULE,
        "Root Cause (first observed failure):",
        f"  time      : {when}",
        f"  host      : {first.host or hostname}",
        f"  rank      : {first.rank} (local_rank: {first.local_rank})",
        f"  exitcode  : {first.exitcode} (pid: {first.pid}){named}",
        f"  error_file: {first.error_file}",
        f"  traceback : {_first_line(first)}",
    ]
    if first.traceback:
        lines.append(first.traceback.rstrip("\n"))
    others = sorted(failure for failure in failures if failure is not first)
    if others:
        lines += [THIN_RULE, "Other Failures:", *(f"  {line(one)}" for one in others)]
    if last_calls:
        lines += [THIN_RULE, "Last Calls:", last_calls.rstrip("\n")]
    return "\n".join([*lines, RULE, ""])


def signal_name(number: int) -> str:
    """SIGKILL for 9; a number without a name (a real-time signal) as "signal 40"."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _first_line(failure: Failure) -> str:
    if failure.exitcode >= 0:
        return "" if failure.traceback else "none: the process ended itself, see its output above"
    hint = ""
    if failure.exitcode == -signal.SIGKILL and failure.stopped_by is None:
        hint = f" ({failure.out_of_memory or 'sent by a user, a scheduler, or the kernel'})"
    name = signal_name(-failure.exitcode)
    return f"Signal {-failure.exitcode} ({name}) received by PID {failure.pid}{hint}"


def line(failure: Failure) -> str:
    """One failure in a line."""
    who = f"rank {failure.rank} (local_rank: {failure.local_rank}, pid: {failure.pid})"
    if failure.stopped_by is not None and not failure.message:
        return f"{who}: stopped by dtrun ({signal_name(failure.stopped_by)})"
    code = failure.exitcode
    how = f"exitcode {code}" if code >= 0 else f"exitcode {code} ({signal_name(-code)})"
    told = failure.message or failure.out_of_memory
    message = f", {told}" if told else ""
    return f"{who}: {how}{message}{' (lost a peer)' if failure.lost_peer else ''}"


def _read(path: str) -> str:
    """The text of a file, "" when the worker has not written one."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except FileNotFoundError:
        return ""
