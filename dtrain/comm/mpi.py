"""A process group where MPI is at home: `mpiexec -n 4 python script.py`, without dtrun.

Owns: `MpiGroup`, which does over an MPI communicator what `group.ProcessGroup` does over a
transport. Rules: 1. every call is one nonblocking MPI operation; whoever waits moves it on, and
between looks sleeps. A call that nobody waits for goes on as far as MPI takes it by itself. 2. MPI
knows no deadlines and no mismatches: a call that is not complete in time raises here, and the group
has failed; calls that differ between ranks are undefined, as everywhere in MPI. 3. MPI cannot take
an operation back: closing a failed group ends the whole job (MPI_Abort).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dtrain.comm.collectives import Collective
from dtrain.comm.mpi_calls import mpi, start
from dtrain.comm.point_to_point import Recv, Send
from dtrain.comm.record import CallRecord, GroupStatistics, Recorder, call_site
from dtrain.comm.topology import members_of
from dtrain.comm.transports.mailbox import Array
from dtrain.comm.work import Work
from dtrain.errors import CollectiveTimeout, DistBackendError, GroupAborted
from dtrain.tape import Tape

__all__ = ["MpiGroup"]

_LOOKS = 200  # before the first sleep; with 20 of them 4 bytes took 420 us instead of 70, 2 ranks
_FIRST_SLEEP, _LAST_SLEEP = 2e-5, 1e-3  # seconds, doubling


class MpiGroup:
    """The ranks of communicator `comm` (default: all of the job).

    `timeout` is the default deadline of a call, in seconds from its start.
    """

    runs_aside = True

    def __init__(self, comm: Any = None, *, name: str = "default", timeout: float) -> None:
        self.comm = mpi().COMM_WORLD if comm is None else comm
        self.rank, self.size = int(self.comm.rank), int(self.comm.size)
        self.name, self.timeout = name, float(timeout)
        self.store = None  # MPI needs no rendezvous
        self._recorder = Recorder.of(name, self.rank, self.size)
        self._lock = threading.Lock()
        self._flights: set[_Flight] = set()  # also keeps the arrays of what runs
        self._next_seq = 0
        self._failure: BaseException | None = None
        self._closed = False

    def submit(
        self,
        call: Collective | Send | Recv,
        *,
        async_op: bool = False,
        timeout: float | None = None,
    ) -> Work:
        """Issue one call; blocks until it is complete unless `async_op`.

        As `group.ProcessGroup.submit`, but without `CollectiveMismatch` and `PeerLost`: MPI tells
        neither.
        """
        call.validate(self.rank, self.size)
        patience = self.timeout if timeout is None else float(timeout)
        with self._lock:
            self._check_open(call.kind)
            words = call.signature if isinstance(call, Collective) else str(call)
            record = CallRecord(self.name, self._next_seq, words, call_site(), call.nbytes)
            self._next_seq += 1
            self._recorder.begin(record, time.monotonic())
            requests, finish = start(call, self.comm)
            flight = _Flight(self, call, record, requests, finish, patience)
            self._flights.add(flight)
        if not async_op:
            flight.work.wait()
        return flight.work

    def _check_open(self, what: str) -> None:
        if self._failure is not None:
            raise GroupAborted(
                f"group {self.name!r}: {what} cannot run, the group has failed: {self._failure}"
            ) from self._failure
        if self._closed:
            raise GroupAborted(f"group {self.name!r} is closed: {what} cannot run")

    def landed(self, flight: _Flight, error: BaseException | None, began: float) -> None:
        """A call is complete, or has failed: then the group has."""
        now = time.monotonic()
        with self._lock:
            if error is None:
                self._flights.discard(flight)
                self._recorder.finish(flight.record, flight.call.kind, began, now, None)
                return
            self._recorder.fail(flight.record, now)
            if self._failure is None:
                self._failure = error

    def abort(self, reason: str | BaseException) -> None:
        """End the whole job: MPI has no way to make one group fail on all its ranks."""
        self._failure = GroupAborted(f"group {self.name!r} was aborted: {reason}")
        self.comm.Abort(1)

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
    ) -> MpiGroup:
        """A new group of some ranks, in the order given, made by these alone.

        Blocks until all of them have come; MPI knows no deadline for that. ValueError for another
        `transport`.
        """
        members = members_of(ranks, self.rank, self.size)
        if transport is not None:
            raise ValueError(f"a group of an MPI job is an MPI group, not {transport!r}")
        self._check_open("split")
        group = self.comm.Get_group().Incl(members)
        return MpiGroup(
            self.comm.Create_group(group),
            name=name or f"{self.name}[{','.join(map(str, members))}]",
            timeout=self.timeout if timeout is None else timeout,
        )

    def record_on(self, tape: Tape | None) -> None:
        """From now on show calls on this timeline; None: no more."""
        self._recorder.tape = tape

    def statistics(self) -> GroupStatistics:
        """Counters since the group was made; MPI does not tell its messages and bytes: 0."""
        return GroupStatistics(
            calls=self._recorder.snapshot(),
            messages_sent=0,
            bytes_sent=0,
            completed=self._next_seq - len(self._flights),
            queued=0,
            waits=dict(self._recorder.waits),
        )

    def close(self, timeout: float = 5.0) -> None:
        """Finish what is under way, at most `timeout` seconds; idempotent.

        A group with calls that cannot be finished ends the job.
        """
        if self._closed:
            return
        for flight in list(self._flights):
            flight.drive(timeout)
        self._closed = True
        self._recorder.close()
        if self._flights:
            self.abort(self._failure or "closed while calls were under way")

    def __repr__(self) -> str:
        state = "failed" if self._failure else "closed" if self._closed else "open"
        return f"<MpiGroup {self.name!r} rank {self.rank}/{self.size} | {state}>"


class _Flight:
    """One call under way."""

    def __init__(
        self,
        group: MpiGroup,
        call: Any,
        record: CallRecord,
        requests: list[Any],
        finish: Callable[[list[Any]], int | None],
        timeout: float,
    ) -> None:
        self.group, self.record, self.timeout = group, record, timeout
        self.call, self._requests, self._finish = call, requests, finish
        self._began = time.monotonic()
        self._lock = threading.RLock()  # a callback of the work may look at it
        output = call.output if isinstance(call, Collective) else call.buf
        self.work = Work(record, output, self.drive)

    def drive(self, timeout: float | None) -> None:
        """Look whether MPI has finished, until it has, `timeout` or the call's deadline."""
        deadline = self._began + self.timeout
        until = deadline if timeout is None else min(deadline, time.monotonic() + timeout)
        looks, pause = 0, _FIRST_SLEEP
        while not self._look():
            looks += 1
            if time.monotonic() >= until:
                if until == deadline:
                    self._give_up()
                return
            if looks > _LOOKS:
                time.sleep(pause)
                pause = min(2 * pause, _LAST_SLEEP)

    def _look(self) -> bool:
        """Whether the call is over, well or not."""
        with self._lock:
            if not self._requests:
                return True
            statuses = [mpi().Status() for _ in self._requests]
            try:
                if not mpi().Request.Testall(self._requests, statuses):
                    return False
                source = self._finish(statuses)
            except Exception as error:
                self._land(self._explained(error))
            else:
                self._land(None, source)
            return True

    def _give_up(self) -> None:
        with self._lock:
            if self._requests:
                self._land(self._late())

    def _land(self, error: BaseException | None, source: int | None = None) -> None:
        # A request that failed is kept, with its arrays: MPI may still write to them.
        self._stuck, self._requests = self._requests if error else [], []
        self.group.landed(self, error, self._began)
        self.work.finish(error, source)

    def _explained(self, error: Exception) -> BaseException:
        if isinstance(error, mpi().Exception):
            return DistBackendError(f"{self.record}: {error.Get_error_string()}")
        return error

    def _late(self) -> BaseException:
        return CollectiveTimeout(
            f"{self.record} at {self.record.site} is not complete after {self.timeout} s: some rank"
            " has not made this call (MPI does not tell which)",
            group=self.group.name,
            seq=self.record.seq,
            rank=None,
            timeout=self.timeout,
        )
