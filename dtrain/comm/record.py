"""What a group has done: counters per kind of call, and the last calls in order.

Owns: `call_site`, `CallRecord`, `Recorder`, and the frozen snapshots that `ProcessGroup.statistics`
hands out.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["CallRecord", "GroupStatistics", "KindStatistics", "Recorder", "call_site"]

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
    """One call of this rank: what it was, where it was made, whether it has finished."""

    group: str
    seq: int
    signature: str
    site: str
    done: bool = False

    def __str__(self) -> str:
        return f"group {self.group!r} #{self.seq} {self.signature}"

    def told(self) -> str:
        """The call as one of the last ones in an error."""
        return f"#{self.seq} {self.signature} at {self.site}{'' if self.done else ' (unfinished)'}"


@dataclass(frozen=True, slots=True)
class KindStatistics:
    """Finished calls of one kind: how many, bytes of their buffers, seconds spent in them."""

    count: int = 0
    bytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class GroupStatistics:
    """A snapshot of one group on this rank.

    `messages_sent` and `bytes_sent` are what the transport carried for it, without
    acknowledgements' headers and control messages; `completed` counts collectives in sequence,
    `queued` those that wait for the group's thread.
    """

    calls: Mapping[str, KindStatistics]
    messages_sent: int
    bytes_sent: int
    completed: int
    queued: int


@dataclass(slots=True)
class Recorder:
    """Counters and the ring of last calls. Only the thread that runs a call writes."""

    kinds: dict[str, list[float]] = field(default_factory=dict)  # {kind: [count, bytes, seconds]}
    ring: deque[CallRecord] = field(default_factory=lambda: deque(maxlen=RING))

    def begin(self, record: CallRecord) -> None:
        self.ring.append(record)

    def count(self, kind: str, nbytes: int, seconds: float) -> None:
        counts = self.kinds.setdefault(kind, [0, 0, 0.0])
        counts[0] += 1
        counts[1] += nbytes
        counts[2] += seconds

    def find(self, seq: int) -> CallRecord | None:
        """The call with this sequence number, if it is among the last ones."""
        return next((record for record in reversed(self.ring) if record.seq == seq), None)

    def last(self) -> list[str]:
        """The last calls in words, oldest first."""
        return [record.told() for record in list(self.ring)[-TOLD:]]

    def snapshot(self) -> dict[str, KindStatistics]:
        return {k: KindStatistics(int(c), int(b), s) for k, (c, b, s) in list(self.kinds.items())}
