"""Trials of faults: a world of processes, one of which suffers one; what the others must see.

Owns: `Trial`, `run_trial` with its verdict, the table of verdicts. Rules: a trial has passed only
when the fault was injected; one that could not inject it was "not run", with the reason. Every
survivor must raise in time, all must blame the same rank in the same words, nobody may leave
anything behind, and the victim's process must have ended as that fault ends it.
"""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dtrain.comm.group import ProcessGroup
from dtrain.testing.faults import FAULTS, MEETING, SOON, suffer
from dtrain.testing.processes import Process
from dtrain.testing.world import Outcome, outcome_of, started

__all__ = ["Trial", "Verdict", "run_trial", "table"]

# Seconds after which a rank of a trial hangs. All waits inside are shorter.
_HANGS = 12.0


@dataclass(frozen=True, slots=True)
class Trial:
    """`fault` (of `FAULTS`) strikes rank `victim` of `size` before or amid a call (of `CALLS`)."""

    fault: str
    call: str
    transport: str
    victim: int
    moment: str
    size: int = 3

    def __str__(self) -> str:
        where = f"{self.moment} {self.call} over {self.transport}"
        return f"{self.fault} of rank {self.victim} of {self.size} {where}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """`result` is "passed", "not run" or "failed"; `why` says more, `seconds` is the slowest rank's
    time from the fault to its error.
    """

    trial: Trial
    result: str
    why: str = ""
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"{self.trial}: {self.result}{': ' if self.why else ''}{self.why}"


def run_trial(trial: Trial, program: Callable[..., list[object]] = suffer) -> Verdict:
    """Carry out one trial; blocks for at most about 15 seconds.

    `program` is what each rank does, a function with the arguments and the result of `suffer`.
    """
    plan = (trial.fault, trial.call, trial.transport, trial.victim, trial.moment)
    with started(trial.size, program, plan, timeout=_HANGS, group=None) as ranks:
        deadline = time.monotonic() + _HANGS
        survivors = [rank for rank in range(trial.size) if rank != trial.victim]
        try:
            ends = [outcome_of(rank, ranks[rank], deadline) for rank in survivors]
            victim = _end_of(trial, ranks[trial.victim], ends)
        except TimeoutError as hang:
            return Verdict(trial, "failed", str(hang))
        pids = [rank.pid for rank in ranks]
        if trial.call == "rendezvous" and _leftovers(pids):
            _sweep()  # no survivor knew yet where the victim's socket is
        return judge(trial, ends, victim, _leftovers(pids))


def _end_of(trial: Trial, process: Process, ends: Sequence[Outcome]) -> Outcome:
    """How the victim ended; one that was stopped goes on now, and must find out soon."""
    if trial.fault == "SIGSTOP" and _injected(ends):
        state = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]
        if state != "T":
            return Outcome(trial.victim, error=RuntimeError(f"it was not stopped ({state})"))
        os.kill(process.pid, signal.SIGCONT)
    return outcome_of(trial.victim, process, time.monotonic() + 4 * SOON)


def _injected(ends: Sequence[Outcome]) -> bool:
    return any(end.value is not None and end.value[3] is not None for end in ends)


def judge(
    trial: Trial, ends: Sequence[Outcome], victim: Outcome, leftovers: Sequence[str]
) -> Verdict:
    """The verdict from how survivors and victim ended, and from what is left behind."""
    broken = [f"rank {end.rank}: {end.error}" for end in ends if end.error is not None]
    if broken:
        return Verdict(trial, "failed", "; ".join(broken))
    if not _injected(ends):
        return Verdict(trial, "not run", "that moment was not reached")
    complaints = [*_wrong_with_errors(trial, ends), *_wrong_with_victim(trial, victim)]
    complaints += [f"left behind: {path}" for path in leftovers]
    slowest = max(end.value[3] for end in ends)
    return Verdict(trial, "failed" if complaints else "passed", "; ".join(complaints), slowest)


def _wrong_with_errors(trial: Trial, ends: Sequence[Outcome]) -> Iterable[str]:
    fault, meeting = FAULTS[trial.fault], trial.call == "rendezvous"
    # Who has not been met is not known to have died: the deadline names it.
    allowed = ("StoreTimeout", "PeerLost", "CollectiveTimeout") if meeting else fault.errors
    limit = fault.within + (2 * MEETING if meeting else 0.0)
    for end in ends:
        kind, blamed, text, seconds = end.value
        if kind not in allowed:
            yield f"rank {end.rank} raised {kind} ({text}), expected {' or '.join(allowed)}"
        elif blamed != [trial.victim]:
            yield f"rank {end.rank} blames {blamed}: {text}"
        if seconds > limit:
            yield f"rank {end.rank} raised after {seconds:.2f} s, expected {limit} s"
    if len({end.value[2] for end in ends}) > 1:
        yield "the survivors say different things: " + " | ".join(end.value[2] for end in ends)


def _wrong_with_victim(trial: Trial, victim: Outcome) -> Iterable[str]:
    expected = FAULTS[trial.fault].status
    if victim.status != expected:
        yield f"the victim ended with status {victim.status}, expected {expected}"
    elif expected == 0 and victim.error is not None:
        yield f"the victim: {victim.error}"


def _sweep() -> None:
    """What the next process that opens a group on this host does: remove what dead ones left."""
    with started(1, _open, (), timeout=_HANGS, group={"transport": "zmq"}) as (process,):
        process.wait(time.monotonic() + _HANGS)


def _open(group: ProcessGroup) -> None:
    """All there is to do has been done when the group was made."""


def _leftovers(pids: list[int]) -> list[str]:
    """What is left under the names of these processes."""
    folders = (Path(tempfile.gettempdir()), Path("/dev/shm"))
    return [
        str(path) for folder in folders for pid in pids for path in folder.glob(f"dtrain-{pid}-*")
    ]


def table(verdicts: Iterable[Verdict]) -> str:
    """Trials run / not run / failed, a row for each call, a column for each fault."""
    counts: dict[tuple[str, str], Counter[str]] = {}
    for verdict in verdicts:
        cell = (verdict.trial.call, verdict.trial.fault)
        counts.setdefault(cell, Counter())[verdict.result] += 1
    rows = list(dict.fromkeys(call for call, _ in counts))
    columns = list(dict.fromkeys(fault for _, fault in counts))
    lines = ["".join([f"{'run / not run / failed':24}", *(f"{name:>14}" for name in columns)])]
    for call in rows:
        cells = [_cell(counts.get((call, fault))) for fault in columns]
        lines.append("".join([f"{call:24}", *(f"{cell:>14}" for cell in cells)]))
    return "\n".join(lines)


def _cell(count: Counter[str] | None) -> str:
    if count is None:
        return "-"
    return f"{count['passed'] + count['failed']} / {count['not run']} / {count['failed']}"
