"""A group of which only this rank exists: for a dry run of a program written for many.

Owns: `FakeGroup`, which takes every call that `group.ProcessGroup` takes, checks its arguments and
completes it at once. Nothing is sent, and what other ranks would have brought does not come: an
output keeps its values, but for an all-gather, where each part is this rank's own. The results are
therefore wrong, as they are in torch's FakeProcessGroup; shapes, dtypes and the order of calls are
right.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dtrain.comm.collectives import AllGather, Collective
from dtrain.comm.point_to_point import Recv, Send
from dtrain.comm.record import CallRecord, GroupStatistics, Recorder, call_site
from dtrain.comm.topology import members_of
from dtrain.comm.transports.mailbox import Array
from dtrain.comm.work import Work
from dtrain.errors import GroupAborted
from dtrain.tape import Tape

__all__ = ["FakeGroup"]


class FakeGroup:
    """Rank `rank` of `size`, alone."""

    runs_aside = True

    def __init__(self, rank: int, size: int, *, name: str = "default", timeout: float) -> None:
        if not 0 <= rank < size:
            raise ValueError(f"group {name!r}: rank {rank} is not in range({size})")
        self.rank, self.size = rank, size
        self.name, self.timeout = name, float(timeout)
        self.store = None  # nobody is to be met
        self._recorder = Recorder.of(name, rank, size)
        self._next_seq = 0
        self._failure: GroupAborted | None = None

    def submit(
        self,
        call: Collective | Send | Recv,
        *,
        async_op: bool = False,
        timeout: float | None = None,
    ) -> Work:
        """Check one call and complete it; never blocks."""
        call.validate(self.rank, self.size)
        if self._failure is not None:
            raise GroupAborted(f"group {self.name!r}: {call.kind} cannot run: {self._failure}")
        words = call.signature if isinstance(call, Collective) else str(call)
        record = CallRecord(self.name, self._next_seq, words, call_site(), call.nbytes)
        self._next_seq += 1
        now = time.monotonic()
        self._recorder.begin(record, now)
        self._recorder.finish(record, call.kind, now, now, None)
        if isinstance(call, AllGather):
            call.out.reshape(self.size, -1)[...] = call.inp.reshape(-1)
        if not isinstance(call, Collective):
            work = Work(record, call.buf)
            work.finish(source=self._source(call))
            return work
        return Work(record, call.output, done=True)

    def _source(self, call: Send | Recv) -> int | None:
        if isinstance(call, Send):
            return None
        return (self.rank + 1) % self.size if call.src is None else call.src

    def abort(self, reason: str | BaseException) -> None:
        """Make every later call fail."""
        self._failure = GroupAborted(f"group {self.name!r} was aborted: {reason}")

    def empty(self, shape: int | Sequence[int], dtype: npt.DTypeLike) -> Array:
        """An uninitialised array."""
        return np.empty(shape, dtype)

    def split(
        self,
        ranks: Sequence[int],
        *,
        name: str | None = None,
        timeout: float | None = None,
        transport: object = None,
    ) -> FakeGroup:
        """A new group of some ranks, in the order given."""
        members = members_of(ranks, self.rank, self.size)
        return FakeGroup(
            members.index(self.rank),
            len(members),
            name=name or f"{self.name}[{','.join(map(str, members))}]",
            timeout=self.timeout if timeout is None else timeout,
        )

    def record_on(self, tape: Tape | None) -> None:
        """From now on show calls on this timeline; None: no more."""
        self._recorder.tape = tape

    def statistics(self) -> GroupStatistics:
        """Counters since the group was made; no message is ever sent."""
        return GroupStatistics(
            calls=self._recorder.snapshot(),
            messages_sent=0,
            bytes_sent=0,
            completed=self._next_seq,
            queued=0,
            waits={},
        )

    def close(self, timeout: float = 5.0) -> None:
        """Nothing is under way, and nothing is held."""
        self._recorder.close()
        self._failure = self._failure or GroupAborted(f"group {self.name!r} is closed")

    def __repr__(self) -> str:
        state = "open" if self._failure is None else "closed"
        return f"<FakeGroup {self.name!r} rank {self.rank}/{self.size} | {state}>"
