"""What the kernel says of a process of this host: whether it lives, runs or is stopped.

Owns: reading /proc (Linux), and the names of the signals that end one. Standard library only;
nothing here raises for a process that is gone.
"""

from __future__ import annotations

import signal

__all__ = ["ENDED", "STOPPED", "has_ended", "is_stopped", "signal_name", "start_of", "state_of"]

ENDED = "X"
STOPPED = ("T", "t")  # by a signal, by a debugger


def _fields(pid: int) -> list[str]:
    """The fields of /proc/PID/stat behind the name, which may hold anything; [] when it is gone."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def state_of(pid: int) -> str:
    """One letter, as `ps` shows it: R, S, D, T ...; `ENDED` for one that is gone or not reaped."""
    fields = _fields(pid)
    return ENDED if not fields or fields[0] in "ZXx" else fields[0]


def has_ended(pid: int) -> bool:
    """Whether it does not run any more, and never will."""
    return state_of(pid) == ENDED


def is_stopped(pid: int) -> bool:
    """Whether SIGSTOP or a debugger keeps it from running."""
    return state_of(pid) in STOPPED


def start_of(pid: int) -> int:
    """When it started, in clock ticks since boot: tells it from a later one with its number.

    0 when it is gone.
    """
    fields = _fields(pid)
    return int(fields[19]) if fields else 0


def signal_name(number: int) -> str:
    """SIGKILL for 9; a number without a name (a real-time signal) as "signal 40"."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
