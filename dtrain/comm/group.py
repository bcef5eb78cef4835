"""One process group: an ordered sequence of collectives over one transport.

Rule 1: `submit` is the only way in. Collectives run one at a time, in the order of their numbers:
at once in the caller when nothing is queued, else in the group's one daemon thread, which is
started when it is first needed. Rule 2: a collective is matched with its peers by its number alone;
point-to-point calls are matched by (source, destination, tag) and stand outside the sequence. Rule
3: the first failure is told to all ranks and is the reason of every later one: nothing runs in a
group that has failed. Wrong arguments (ValueError, TypeError, RuntimeError) are raised before
anything is sent and harm nobody.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from dtrain import env
from dtrain.comm.agreement import STALL, Agreement
from dtrain.comm.blame import words_of
from dtrain.comm.channel import Channel
from dtrain.comm.collectives import Collective
from dtrain.comm.point_to_point import Pending, Recv, Send
from dtrain.comm.record import (
    POINT_TO_POINT,
    CallRecord,
    GroupStatistics,
    Recorder,
    call_site,
)
from dtrain.comm.store.base import Store
from dtrain.comm.store.prefix import PrefixStore
from dtrain.comm.topology import members_of
from dtrain.comm.transports.base import Factory, create
from dtrain.comm.transports.mailbox import Array
from dtrain.comm.work import Work
from dtrain.errors import DistError, GroupAborted
from dtrain.tape import Tape

__all__ = ["DEFAULT_TIMEOUT", "ProcessGroup"]

# As in torch for backends other than NCCL.
DEFAULT_TIMEOUT = 1800.0


@dataclass(slots=True)
class _Job:
    """One collective on its way through the group."""

    call: Collective
    record: CallRecord
    timeout: float
    work: Work | None  # None: the caller runs it himself


class ProcessGroup:
    """The ranks of a group as seen by one of them.

    All `size` ranks make the group at the same time from the same `store` (one `gather` in it);
    that waits up to `timeout` seconds and raises `StoreTimeout` naming the ranks that did not come.
    `transport` is a registered name or a factory. `timeout` is also the default deadline of each
    call, in seconds from its start. The store stays the caller's: it must live as long as
    sub-groups are to be made, and `close` does not close it.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        *,
        transport: str | Factory = "local",
        name: str = "default",
        timeout: float = DEFAULT_TIMEOUT,
    ) -> None:
        if not 0 <= rank < size:
            raise ValueError(f"group {name!r}: rank {rank} is not in range({size})")
        self.rank, self.size = rank, size
        self.name, self.timeout = name, float(timeout)
        self.store = store
        self._factory = transport
        make = partial(create, transport) if isinstance(transport, str) else transport
        self.transport = make(store, rank, size, self.timeout)
        self.runs_aside = self.transport.runs_aside
        self._recorder = Recorder.of(name, rank, size)
        self._agreement = Agreement(name, self.transport, self._recorder, env.stall_warning())
        self._children: Counter[str] = Counter()  # {members: how many groups of them were made}
        # All below changes under `_lock` only.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._next_seq = 0
        self._queue: deque[_Job] = deque()
        self._running: _Job | None = None
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._closed = False

    # ---- calls

    def submit(
        self,
        call: Collective | Send | Recv,
        *,
        async_op: bool = False,
        timeout: float | None = None,
    ) -> Work:
        """Issue one call; blocks until it is complete unless `async_op`.

        `timeout`: seconds from the start of the call, default the group's. Raises what is wrong
        with the arguments (nothing was sent then), `CollectiveMismatch`, `CollectiveTimeout`,
        `PeerLost`, or `GroupAborted` with the first failure as its cause. With `async_op` these
        come out of `Work.wait`. The arrays of a call must not be touched before it is complete.
        """
        call.validate(self.rank, self.size)
        patience = self.timeout if timeout is None else float(timeout)
        if isinstance(call, Collective):
            return self._submit_collective(call, patience, async_op)
        work = self._point_to_point(call, patience)
        if not async_op:
            work.wait()
        return work

    def _submit_collective(self, call: Collective, timeout: float, async_op: bool) -> Work:
        signature, site = call.signature, call_site()
        with self._lock:
            self._check_open(signature)
            record = CallRecord(
                self.name, self._next_seq, signature, site, call.nbytes, call.patient
            )
            self._next_seq += 1
            at_once = not async_op and self._running is None and not self._queue
            work = Work(record, call.output, done=at_once)
            job = _Job(call, record, timeout, None if at_once else work)
            if at_once:
                self._running = job
            else:
                self._enqueue(job)
        if at_once:
            error = self._run(job)
            if error is not None:
                raise error
        elif not async_op:
            work.wait()
        return work

    def _check_open(self, what: str) -> None:
        if self._failure is not None:
            raise self._too_late(what) from self._failure
        if self._closed:
            raise GroupAborted(f"group {self.name!r} is closed: {what} cannot run")
        self.transport.check_usable()

    def _too_late(self, what: str) -> GroupAborted:
        return GroupAborted(
            f"group {self.name!r}: {what} cannot run, the group has failed: {self._failure}"
        )

    def _enqueue(self, job: _Job) -> None:
        self._recorder.queue(job.record, time.monotonic())
        self._queue.append(job)
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._serve, name=f"dtrain-{self.name}-{self.rank}", daemon=True
            )
            self._thread.start()
        self._changed.notify_all()

    def _serve(self) -> None:
        """The group's thread: run what is queued until the group is closed."""
        while True:
            with self._lock:
                self._changed.wait_for(
                    lambda: self._running is None and (bool(self._queue) or self._closed)
                )
                if not self._queue:
                    return
                job = self._running = self._queue.popleft()
            self._run(job)

    def _run(self, job: _Job) -> BaseException | None:
        error = self._execute(job)
        with self._lock:
            self._running = None
            if self._thread is not None or self._closed:  # nobody else waits for that
                self._changed.notify_all()
        if job.work is not None:
            job.work.finish(error)
        return error

    def _execute(self, job: _Job) -> BaseException | None:
        """Carry out one collective; whatever goes wrong becomes the failure of the group."""
        started = time.monotonic()
        record = job.record
        try:
            if self._failure is not None:
                raise self._too_late(str(record)) from self._failure
            self._recorder.begin(record, started)
            self._agreement.enter(record)
            channel = Channel(
                self.transport,
                self._agreement,
                record,
                stall_at=started + STALL,
                deadline=started + job.timeout,
            )
            job.call.run(channel)
            channel.flush()
        except BaseException as error:
            self._recorder.fail(record, time.monotonic())
            return self._fail(error, str(record), record.seq, job.timeout)
        self._recorder.finish(record, job.call.kind, started, time.monotonic(), channel.waits)
        return None

    def _point_to_point(self, call: Send | Recv, timeout: float) -> Work:
        words, site = str(call), call_site()
        self._check_open(words)
        where = f"group {self.name!r} {words}"
        fail = partial(self._fail, where=where, seq=None, timeout=timeout)
        record = CallRecord(self.name, POINT_TO_POINT, words, site, call.nbytes)
        started = time.monotonic()
        self._recorder.begin_message(record, started)
        try:
            finish = call.start(self.transport, self.name, site)
        except BaseException as error:
            self._recorder.fail(record, time.monotonic())
            raise fail(error) from None

        def ended(error: BaseException | None) -> BaseException | None:
            now = time.monotonic()
            if error is None:
                self._recorder.finish(record, call.kind, started, now, None)
                return None
            self._recorder.fail(record, now)
            return fail(error)

        vigil = partial(self._agreement.vigil, record)
        return Pending(where, call.buf, finish, ended, vigil, started + timeout).work

    # ---- failure

    def _fail(
        self, error: BaseException, where: str, seq: int | None, timeout: float
    ) -> BaseException:
        """The error to raise for `error`; the group has been made to fail with it everywhere."""
        if isinstance(error, GroupAborted) and error.__cause__ is self._failure is not None:
            return error
        explained = self._agreement.explain(error, where, seq, timeout)
        if explained is not error:
            explained.__cause__ = error.__cause__
        return self._poison(explained)

    def _poison(self, error: BaseException) -> BaseException:
        """Make `error` the reason of every later failure, here and elsewhere."""
        with self._lock:
            if self._failure is not None:
                return self._failure if isinstance(error, DistError) else error
            self._failure = error
        # Told even if it came from another rank, and before anybody here wakes up and leaves:
        # whoever sees this rank's goodbye has then heard the reason. Each rank tells once.
        self._agreement.tell_failure(error)
        self.transport.fail(error)
        return error

    def abort(self, reason: str | BaseException) -> None:
        """Make the group fail now, on all ranks: calls that run or wait raise `GroupAborted`.

        From any thread.
        """
        text = str(reason) if isinstance(reason, str) else f"{type(reason).__name__}: {reason}"
        sentence = f"group {self.name!r} was aborted by rank {self.rank}: {text}"
        error = GroupAborted(sentence, rank=self.rank)
        if isinstance(reason, BaseException):
            error.__cause__ = reason
        self._poison(error)

    def excuse(self, reason: BaseException) -> None:
        """Tell the others why this rank is about to close the group: `reason` ends it.

        They raise a failure of another group as their own; else their `PeerLost` says it.
        """
        if self._failure is not None or self._closed:
            return
        if isinstance(reason, DistError):
            self._poison(reason)
        else:
            self._agreement.tell_leave(words_of(reason))

    # ---- the rest

    def empty(self, shape: int | Sequence[int], dtype: npt.DTypeLike) -> Array:
        """An uninitialised array that is cheap to use in this group's collectives.

        Where the ranks share memory it lives there, and collectives on it copy nothing when all
        ranks use such arrays; its memory is used again when it and its views are gone. With a
        RuntimeWarning it is an ordinary array when that memory is used up.
        """
        window = self.transport.memory
        wanted = (shape,) if isinstance(shape, int) else tuple(shape)
        return np.empty(wanted, dtype) if window is None else window.empty(wanted, dtype)

    def split(
        self,
        ranks: Sequence[int],
        *,
        name: str | None = None,
        timeout: float | None = None,
        transport: str | Factory | None = None,
    ) -> ProcessGroup:
        """A new group of some of this group's ranks, in the order given; only these take part in
        making it.

        Rank i of the new group is `ranks[i]` here. All members must ask for the same list; the n-th
        group with one list is the n-th for all of them. Blocks until all members have come (at most
        `timeout` seconds).
        """
        members = members_of(ranks, self.rank, self.size)
        key = ",".join(map(str, members))
        self._children[key] += 1
        return ProcessGroup(
            PrefixStore(f"{self.name}[{key}]#{self._children[key]}", self.store),
            members.index(self.rank),
            len(members),
            transport=transport or self._factory,
            name=name or f"{self.name}[{key}]",
            timeout=self.timeout if timeout is None else timeout,
        )

    def record_on(self, tape: Tape | None) -> None:
        """From now on show calls on this timeline; None: no more."""
        self._recorder.tape = tape

    def statistics(self) -> GroupStatistics:
        """Counters since the group was made."""
        with self._lock:
            queued, running = len(self._queue), self._running is not None
            started = self._next_seq - queued
        return GroupStatistics(
            calls=self._recorder.snapshot(),
            messages_sent=self.transport.messages_sent,
            bytes_sent=self.transport.bytes_sent,
            completed=started - running,
            queued=queued,
            waits=dict(self._recorder.waits),
        )

    def close(self, timeout: float = 5.0) -> None:
        """Finish what is queued, say goodbye, give everything back; idempotent.

        Waits at most about `timeout` seconds for calls that are under way and aborts them then.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
            idle = self._changed.wait_for(self._idle, timeout)
        if not idle:
            self.abort(f"closed while calls were under way ({self!r})")
            with self._lock:
                self._changed.wait_for(self._idle, 1.0)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(1.0)
        self.transport.close()
        self._recorder.close()

    def _idle(self) -> bool:
        return self._running is None and not self._queue

    def abandon(self) -> None:
        """Leave without goodbye: to the others this rank has died. For tests of just that."""
        with self._lock:
            self._closed = True
            self._changed.notify_all()
        self.transport.abandon()
        self._recorder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None and not self._closed:
            self.abort(error)
        self.close()

    def __repr__(self) -> str:
        head = f"<ProcessGroup {self.name!r} rank {self.rank}/{self.size} {self.transport.name} | "
        return f"{head}{self._state()}>"

    def _state(self) -> str:
        with self._lock:
            running, queued = self._running, len(self._queue)
            if self._failure is not None:
                return f"failed: {type(self._failure).__name__}"
            if self._closed:
                return "closed"
            if running is None:
                return f"idle, {self._next_seq} done"
            size = f"{running.call.nbytes / 2**20:.1f} MB"
            return f"1 running (#{running.record.seq} {running.call.kind} {size}), {queued} queued"
