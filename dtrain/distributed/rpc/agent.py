"""One worker: calls others, serves their calls, and keeps the books of references.

Owns: `Agent`; what it does for others is the `Server`'s. Six messages: CALL (run this; with a name,
keep the result under it), FETCH (send the value of a reference), REPLY, CANCEL, BOOKS (of
`ledger`), and DRAIN while shutting down. Rules: 1. who moves messages reads envelopes and keeps the
books; an answer is read by who waits for it. 2. A call is sent once and never again; it ends with
an answer, a timeout or the loss of its worker. 3. What is given away is in the books before it is
sent.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import defaultdict
from concurrent.futures import CancelledError
from functools import partial
from typing import Any

from dtrain.comm.record import call_site
from dtrain.comm.store.base import Store
from dtrain.distributed.rpc import failures
from dtrain.distributed.rpc.calls import Call, RpcFuture
from dtrain.distributed.rpc.failures import RpcTimeout
from dtrain.distributed.rpc.ledger import Name
from dtrain.distributed.rpc.line import Line, as_buffer
from dtrain.distributed.rpc.members import Members
from dtrain.distributed.rpc.options import patience as patience_of
from dtrain.distributed.rpc.payload import Packed, pack, unpack
from dtrain.distributed.rpc.pool import Pool, waiting
from dtrain.distributed.rpc.references import References
from dtrain.distributed.rpc.requests import arguments, in_words
from dtrain.distributed.rpc.room import Room
from dtrain.distributed.rpc.rref import RRef, called
from dtrain.distributed.rpc.server import Server
from dtrain.distributed.world import current_world
from dtrain.errors import PeerLost

__all__ = ["Agent"]

CALL, FETCH, REPLY, CANCEL, BOOKS, DRAIN = range(6)

# A body beyond this goes beside its envelope, which must fit into one frame.
_INLINE = 64 * 1024

# How often one asks those who are waited for whether messages are missing, in seconds.
_CHECK = 1.0

_log = logging.getLogger("dtrain.rpc")


class Agent:
    """Worker `rank` among `members`, with `threads` threads; calls may take `patience` seconds."""

    def __init__(
        self, line: Line, rank: int, members: Members, threads: int, patience: float
    ) -> None:
        self.rank, self.names, self.patience = rank, members, patience
        self.pool = Pool(threads, f"rpc {members[rank]}")
        self._line = line
        self.store: Store | None = None  # the one that was opened for this agent, to be closed
        line.shift.spill = self.pool.submit
        self.references = References(self, rank, self.pool, self._post_books)
        self._world = current_world()
        self.server = Server(
            members,
            rank,
            self.pool,
            line.shift,
            self.references,
            pack=self._packed,
            unpack=self._unpacked,
            reply=self._reply,
            tape=lambda: self._world.tape,
        )
        self._calls: dict[int, Call] = {}
        self._ids = itertools.count()
        self._room: defaultdict[int, Room] = defaultdict(Room)
        self._lost: dict[int, PeerLost] = {}
        members.lost = lambda worker: worker in self._lost or worker in line.lost
        self.failed: BaseException | None = None
        self.sent = 0
        self.drains: dict[tuple[int, int], list[int]] = {}  # {(round, worker): [sent, served]}
        self.moved = threading.Condition()
        self._draining, self._closed, self._next_check = False, False, 0.0
        line.on_envelope, line.on_message = self._note_references, self._on_message
        line.chores, line.on_failure = self._chores, self._fail

    def start(self) -> None:
        """Begin to serve: once those who are called can find this agent."""
        self._line.start()

    # ---- calling

    def worker(self, to: Any) -> int:
        """The rank that `to` means: a name, a rank or a `WorkerInfo`."""
        return self.names.find(to)

    def rpc_sync(self, to: Any, func: Any, args: Any, kwargs: Any, timeout: float) -> Any:
        return self.rpc_async(to, func, args, kwargs, timeout).wait()

    def rpc_async(self, to: Any, func: Any, args: Any, kwargs: Any, timeout: float) -> RpcFuture:
        return self._call(self.worker(to), func, args, kwargs, timeout, None)

    def remote(self, to: Any, func: Any, args: Any, kwargs: Any, timeout: float) -> RRef:
        owner = self.worker(to)
        handle = self.references.expect(owner)
        handle._made = self._call(owner, func, args, kwargs, timeout, handle.name)
        return handle

    def _call(
        self, to: int, func: Any, args: Any, kwargs: Any, timeout: float, name: Name | None
    ) -> RpcFuture:
        args, kwargs = arguments(func, args, kwargs)
        try:
            packed = self._packed(to, [func, args, kwargs], "call")
        except TypeError as error:
            raise in_words(error, func, args) from None
        what = called(func, args)
        subject = [what, None if name is None else [list(name), call_site()]]
        return self._start(to, CALL, what, timeout, packed, subject)

    def _start(
        self, to: int, kind: int, what: str, timeout: float, packed: Packed, subject: Any
    ) -> RpcFuture:
        """Send a request; the future of its answer."""
        if self._closed:
            raise RuntimeError(
                f"RPC has been shut down on worker {self.names[self.rank]!r}: {what} cannot be "
                f"called on {self.names[to]!r}, and references from before are gone"
            )
        patience = patience_of(timeout, self.patience)
        future = RpcFuture(self.pool, None if to == self.rank else self._line.shift)
        begun = time.monotonic()
        deadline = begun + patience if patience > 0 else None
        nbytes = len(packed.body) + sum(array.nbytes for array in packed.arrays)
        with waiting():
            if not self._room[to].enter(nbytes, patience if patience > 0 else None):
                raise self._too_late(to, what, patience)
        number = next(self._ids)
        future._give_up = partial(self._end, number, CancelledError(), True)
        self._calls[number] = Call(future, to, what, nbytes, begun, deadline, patience)
        self.sent += 1
        try:
            soon = self._room[to].calls > 1  # the first one is waited for while others are made
            self._send(to, [kind, number, subject], packed, soon=soon)
        except BaseException as error:
            self._end(number, self._in_our_words(to, what, error))
        if to in self._lost or self.failed is not None:
            self._end(number, self.failed or self._loss(to, what))
        return future

    def _reply(self, to: int, number: int, well: bool, packed: Packed) -> None:
        self._send(to, [REPLY, number, well], packed, soon=self._line.shift.goes_on())

    def _send(self, to: int, head: list[Any], packed: Packed, *, soon: bool) -> None:
        body, arrays, references = packed
        self.references.give(references, to)
        given = [list(reference.name) for reference in references]
        beside = len(body) > _INLINE
        buffers = [as_buffer(body), *arrays] if beside else arrays
        envelope = [*head, given, None if beside else body]
        if to != self.rank:
            self._line.send(to, envelope, buffers, steady=head[0] != REPLY, soon=soon)
            return
        copies = [buffer.copy() for buffer in buffers]
        self._note_references(to, envelope)
        self._on_message(to, envelope, copies)

    def _end(self, number: int, outcome: Any, tell: bool = False) -> None:
        """Complete a call, unless it is complete, with an error or what reads its answer."""
        call = self._calls.pop(number, None)
        if call is None:
            return
        self._room[call.worker].leave(call.nbytes)
        if tell and call.worker != self.rank and call.worker not in self._lost:
            self._post(call.worker, [CANCEL, number, None, [], b""])
        elif tell and call.worker == self.rank:
            self.server.cancel((self.rank, number))
        if isinstance(outcome, BaseException):
            call.future.set_exception(outcome)
        else:
            call.future.arrive(outcome)
        self._line.shift.served(call.future)
        self._note_span(call)

    def _note_span(self, call: Call) -> None:
        tape = self._world.tape
        if tape is not None:
            now, worker = time.monotonic(), self.names[call.worker]
            tape.add(call.what, "rpc", "rpc calls", call.begun, now, worker=worker)

    def _post(self, to: int, envelope: list[Any]) -> None:
        """Send a message of our own; whoever is gone needs it no more."""
        try:
            self._line.send(to, envelope, steady=True)
        except PeerLost:
            _log.debug("worker %s is gone: not told", self.names[to])

    def _post_books(self, to: int, letter: list[Any]) -> None:
        self._post(to, [BOOKS, 0, letter, [], b""])

    def _loss(self, worker: int, what: str) -> PeerLost:
        loss = self._lost.get(worker) or self._line.lost.get(worker) or PeerLost(worker)
        return loss.at(f"call of {what}: worker {self.names[worker]!r}")

    def _in_our_words(self, worker: int, what: str, error: BaseException) -> BaseException:
        return self._loss(worker, what) if isinstance(error, PeerLost) else error

    def _too_late(self, worker: int, what: str, patience: float) -> RpcTimeout:
        return RpcTimeout(
            f"RPC ran for more than set timeout ({round(patience * 1000)} ms) and will now be "
            f"marked with an error: {what} on worker {self.names[worker]!r} has not answered",
            worker=self.names[worker],
            timeout=patience,
        )

    # ---- what arrives (I/O thread)

    def _note_references(self, sender: int, envelope: list[Any]) -> None:
        """Write down the references in a message before anything that comes after it is heard."""
        kind, _, subject, given, _ = envelope
        if kind == CALL and subject[1] is not None:
            name, site = subject[1]
            self.references.create(Name(*name), sender, site)
        envelope[3] = self.references.take(given, sender)

    def _on_message(self, sender: int, envelope: list[Any], buffers: list[Any]) -> None:
        kind, number, subject, held, body = envelope
        if kind == REPLY:
            call = self._calls.get(number)
            if call is not None:  # else: it has timed out, or was given up
                read = partial(self._read_answer, call.what, subject, body, buffers, held)
                self._end(number, read)
        elif kind == CALL:
            self.server.call((sender, number), subject, held, body, buffers)
        elif kind == FETCH:
            self.server.fetch((sender, number), Name(*subject))
        elif kind == CANCEL:
            self.server.cancel((sender, number))
        elif kind == BOOKS:
            self.references.hear(sender, *subject)
        elif kind == DRAIN:
            with self.moved:
                self.drains[number, sender] = list(subject)
                self.moved.notify_all()
        else:
            raise ValueError(f"a message of unknown kind {kind}")

    def _read_answer(self, what: str, well: Any, body: Any, buffers: Any, held: Any) -> Any:
        """The value of an answer, or its error; `held` keeps the references in it until then."""
        try:
            value = self._unpacked(body, buffers)
        except Exception as error:
            error.add_note(f"while reading the answer to {what}")
            raise
        if not well:
            raise failures.told(value)
        return value

    def _packed(self, to: int, value: Any, what: str) -> Packed:
        return pack(value, what, code=self.names.accepts(to), reference=RRef)

    def _unpacked(self, body: Any, buffers: list[Any]) -> Any:
        if body is None:
            body, *buffers = buffers
        return unpack(body, buffers, self.references.handle, code=self.names.accepts(self.rank))

    # ---- references

    def local_value(self, handle: RRef) -> Any:
        """As `RRef.local_value`."""
        cell = self.references.values.get(handle.name)
        if cell is None:
            raise RuntimeError(f"the value of {handle!r} is gone")
        return cell.wait()

    def fetch(self, handle: RRef, timeout: float) -> Any:
        """As `RRef.to_here`."""
        if handle.is_owner():
            patience = patience_of(timeout, self.patience)
            try:
                return self.references.values[handle.name].wait(patience if patience > 0 else None)
            except TimeoutError:
                raise self._too_late(self.rank, "to_here", patience) from None
        owner = handle.name.owner
        nothing = Packed(b"", [], [])
        return self._start(owner, FETCH, "to_here", timeout, nothing, list(handle.name)).wait()

    # ---- now and then (I/O thread)

    def _chores(self) -> None:
        now = time.monotonic()
        for worker, loss in list(self._line.lost.items()):
            if worker not in self._lost:
                self._lose(worker, loss)
        for number, call in self._calls.copy().items():
            if call.deadline is not None and now >= call.deadline:
                self._end(number, self._too_late(call.worker, call.what, call.timeout), True)
        self.references.collect()
        if now >= self._next_check:
            self._next_check = now + _CHECK
            everybody = self.names.ranks() if self._draining else []
            waited_for = {call.worker for call in self._calls.copy().values()}.union(everybody)
            for worker in waited_for - {self.rank} - self._lost.keys():
                self._line.check(worker)

    def _lose(self, worker: int, loss: PeerLost) -> None:
        self._lost[worker] = loss
        self.references.lose(worker)
        self.server.forget(worker)
        for number, call in self._calls.copy().items():
            if call.worker == worker:
                self._end(number, self._loss(worker, call.what))
        with self.moved:
            self.moved.notify_all()

    def _fail(self, error: BaseException) -> None:
        self.failed = error
        for number in self._calls.copy():
            self._end(number, error)

    # ---- the end

    def idle(self) -> bool:
        """Whether this worker waits for nobody, runs nothing and has let go of what was dropped."""
        return not self._calls and not self.server.under_way and self.references.settled()

    def owes(self) -> list[str]:
        """What this worker waits for or still runs, in words."""
        waits = [
            f"waits for {c.what} on {self.names[c.worker]!r}" for c in self._calls.copy().values()
        ]
        under_way = self.server.under_way.copy().items()
        return waits + [f"runs {what} for {self.names[s]!r}" for (s, _), what in under_way]

    def tell_drain(self, turn: int) -> list[int]:
        """Tell all others how much this worker has sent and served, and told of references.

        While a value that is let go of drops references to others, the last of these goes on.
        """
        counts, self._draining = [self.sent, self.server.served, self.references.told], True
        for worker in self.names.ranks():
            if worker != self.rank and worker not in self._lost:
                self._post(worker, [DRAIN, turn, counts, [], b""])
        return counts

    @property
    def lost(self) -> dict[int, PeerLost]:
        """The workers that are gone."""
        return self._lost

    def debug_info(self) -> dict[str, Any]:
        """References and calls alive here: what `get_debug_info` returns."""
        return {
            **self.references.info(),
            "calls_waiting": len(self._calls),
            "calls_served": len(self.server.under_way),
        }

    def counts(self) -> dict[str, int]:
        """How many references, calls and threads there are, under torch's names."""
        return {
            **self.references.counts(),
            "agent.client_active_calls": len(self._calls),
            "agent.server_active_calls": len(self.server.under_way),
            "agent.thread_pool_size": self.pool.size,
            "agent.num_idle_threads": max(0, self.pool.size - self.pool.busy),
        }

    def close(self) -> None:
        """Leave: calls that wait fail, threads end."""
        self._closed = True
        self._line.close()
        self._fail(PeerLost(self.rank, where="rpc", orderly=True))
        late = self.pool.close(2.0)
        if late:
            _log.warning("functions called by others still run at the end of rpc: %d", len(late))
