"""What a group has done: counters per kind of call, and the last calls in order.

Owns: `call_site`, `CallRecord`, `Recorder`, and the frozen snapshots that `ProcessGroup.statistics`
hands out. Every call also goes into the flight record of this rank (`dtrain.flight`), which others
can read.
"""

from __future__ import annotations

import logging
import os
import sys
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from dtrain import flight
from dtrain.flight import POINT_TO_POINT
from dtrain.logs import get_logger
from dtrain.tape import Tape

__all__ = [
    "POINT_TO_POINT",
    "CallRecord",
    "GroupStatistics",
    "KindStatistics",
    "Recorder",
    "call_site",
]

_log = logging.getLogger("dtrain.comm")

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep

# How many calls the ring remembers, and how many of them an error tells.
RING = 64
TOLD = 3


def call_site() -> str:
    """The line of the user that led here, "file:line": the innermost outside this package."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename.startswith(_PACKAGE):
        outer = frame.f_back
        if outer is None:
            break
        frame = outer
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


@dataclass(slots=True)
class CallRecord:
    """One call of this rank: what it was, where it was made, whether it has finished.

    `patient`: others may be away for long, in good order. `place`: where it stands in the flight
    record, once it does; `begun`, `ended`: on the monotonic clock; `waits`: {rank: seconds waited
    for it}, None if for nobody. The last two are there once it is done.
    """

    group: str
    seq: int
    signature: str
    site: str
    nbytes: int = 0
    patient: bool = False
    done: bool = False
    place: int | None = None
    begun: float = 0.0
    ended: float = 0.0
    waits: Mapping[int, float] | None = None

    def __str__(self) -> str:
        number = "" if self.seq == POINT_TO_POINT else f"#{self.seq} "
        return f"group {self.group!r} {number}{self.signature}"

    def told(self) -> str:
        """The call as one of the last ones in an error."""
        return f"#{self.seq} {self.signature} at {self.site}{'' if self.done else ' (unfinished)'}"


@dataclass(frozen=True, slots=True)
class KindStatistics:
    """Finished calls of one kind: how many, bytes of their buffers, seconds spent in them.

    `waited`: the part of these seconds spent waiting for other ranks (in shared memory, waits that
    are too short to sleep, under 0.1 ms, do not count).
    """

    count: int = 0
    bytes: int = 0
    seconds: float = 0.0
    waited: float = 0.0


@dataclass(frozen=True, slots=True)
class GroupStatistics:
    """A snapshot of one group on this rank.

    `messages_sent` and `bytes_sent` are what the transport carried for it, without
    acknowledgements' headers and control messages; `completed` counts collectives in sequence,
    `queued` those that wait for the group's thread. `waits`: {rank: seconds for which this rank
    waited for it}: who makes the others wait.
    """

    calls: Mapping[str, KindStatistics]
    messages_sent: int
    bytes_sent: int
    completed: int
    queued: int
    waits: Mapping[int, float]


@dataclass(slots=True)
class Recorder:
    """Counters and the last calls of one group; a call is written by the thread that runs it."""

    section: flight.Section
    # {kind: [count, bytes, seconds, seconds waited for others]}
    kinds: dict[str, list[float]] = field(default_factory=dict)
    waits: dict[int, float] = field(default_factory=dict)  # {rank: seconds waited for it}
    ring: deque[CallRecord] = field(default_factory=lambda: deque(maxlen=RING))
    tape: Tape | None = None  # the timeline, while one is recorded

    @classmethod
    def of(cls, group: str, rank: int, size: int) -> Recorder:
        """That of a group which this process joins; `close` it."""
        get_logger("dtrain.comm").info("group %r: rank %d of %d joins", group, rank, size)
        return cls(flight.section(group, rank, size))

    def queue(self, record: CallRecord, now: float) -> None:
        """A call has to wait for those before it."""
        self._write(flight.QUEUED, record, now)

    def begin(self, record: CallRecord, now: float) -> None:
        """A call starts."""
        self.ring.append(record)
        record.begun = now
        if record.place is None:
            self._write(flight.RUNNING, record, now)
        else:
            self.section.run(record.place, now)

    def begin_message(self, record: CallRecord, now: float) -> None:
        """A call outside of the sequence starts."""
        record.begun = now
        self._write(flight.RUNNING, record, now)

    def _write(self, state: int, record: CallRecord, now: float) -> None:
        record.place = self.section.begin(
            state, record.seq, record.nbytes, now, record.signature, record.site
        )

    def finish(
        self,
        record: CallRecord,
        kind: str,
        started: float,
        ended: float,
        waits: Mapping[int, float] | None,
    ) -> None:
        """A call went well. `waits`: {rank: seconds for which this one waited for it}."""
        record.done, record.ended, record.waits = True, ended, waits
        waited = 0.0 if waits is None else self._charge(waits)
        assert record.place is not None
        self.section.end(record.place, flight.DONE, ended, waited)
        counts = self.kinds.get(kind)
        if counts is None:
            counts = self.kinds[kind] = [0, 0, 0.0, 0.0]
        counts[0] += 1
        counts[1] += record.nbytes
        counts[2] += ended - started
        counts[3] += waited
        tape = self.tape  # another thread may take it away
        if tape is not None:
            _show(tape, record, kind, started, waited)
        if _log.isEnabledFor(logging.DEBUG):
            seconds = ended - started
            _log.debug("%s took %.6f s, %.6f s of it waiting", record, seconds, waited)

    def _charge(self, waits: Mapping[int, float]) -> float:
        for rank, seconds in waits.items():
            self.waits[rank] = self.waits.get(rank, 0.0) + seconds
        return sum(waits.values())

    def fail(self, record: CallRecord, now: float) -> None:
        """A call ended badly."""
        if record.place is not None:
            self.section.end(record.place, flight.FAILED, now, 0.0)

    def close(self) -> None:
        """The group is closed; at level INFO, what it did."""
        flight.close(self.section)
        for kind, counts in self.snapshot().items():
            _log.info("group %r is closed: %s %s", self.section.name, kind, counts)
        if self.waits:
            _log.info("group %r waited, by rank: %s", self.section.name, self.waits)

    def find(self, seq: int) -> CallRecord | None:
        """The call with this sequence number, if it is among the last ones."""
        return next((record for record in reversed(self.ring) if record.seq == seq), None)

    def last(self) -> list[str]:
        """The last calls in words, oldest first."""
        return [record.told() for record in list(self.ring)[-TOLD:]]

    def snapshot(self) -> dict[str, KindStatistics]:
        return {
            kind: KindStatistics(int(count), int(nbytes), seconds, waited)
            for kind, (count, nbytes, seconds, waited) in list(self.kinds.items())
        }


def _show(tape: Tape, record: CallRecord, kind: str, started: float, waited: float) -> None:
    """A finished call on the timeline. `by`: for whom it waited, {rank: ms}."""
    message = record.seq == POINT_TO_POINT
    by = {rank: seconds * 1e3 for rank, seconds in (record.waits or {}).items()}
    tape.add(
        f"{kind} {record.nbytes} B",
        "message" if message else "collective",
        f"{'messages' if message else 'group'} {record.group}",
        started, record.ended,
        group=record.group, seq=record.seq, bytes=record.nbytes, call=record.signature,
        site=record.site, waited_ms=waited * 1e3, by=by,
    )  # fmt: skip
