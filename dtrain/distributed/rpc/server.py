"""What one worker does for others: runs their calls, sends the values of references.

Owns: `Server`, the calls that are under way here, and their counters. Rules: 1. a call is decoded
and run in the pool, or by an attendant of the line where its function has been short so far. 2. A
call that was cancelled before it began is not run; what was cancelled later is not answered. 3.
Every request is counted as served exactly once, whatever becomes of its answer. 4. A request that
runs nothing and waits for a value that is not there yet is under way as long as somebody waits for
its answer: a batch that is never full does not hold up the end.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from functools import partial
from typing import Any

from dtrain.comm.work import Future
from dtrain.distributed.rpc import failures
from dtrain.distributed.rpc.calls import Statistics
from dtrain.distributed.rpc.functions import Pending, outcome
from dtrain.distributed.rpc.ledger import Name
from dtrain.distributed.rpc.members import Members
from dtrain.distributed.rpc.payload import Packed
from dtrain.distributed.rpc.pool import Pool
from dtrain.distributed.rpc.references import References, gone, shown
from dtrain.distributed.rpc.rref import called
from dtrain.distributed.rpc.shift import Shift
from dtrain.errors import PeerLost
from dtrain.tape import Tape

__all__ = ["Server"]

_log = logging.getLogger("dtrain.rpc")

# Where the result of a call is to be kept, with those who wait for it; None: it is sent back.
Cell = Future[Any] | None

# Which worker asks, and the number it gave to its request.
Request = tuple[int, int]


class Server:
    """Serves the requests that come to worker `rank` among `names`.

    `pack(to, value, what)`, `unpack(body, buffers)` and `reply(to, number, well, packed)` are the
    agent's; `tape()` is where spans are recorded, None while nobody wants them.
    """

    def __init__(
        self,
        names: Members,
        rank: int,
        pool: Pool,
        shift: Shift,
        references: References,
        *,
        pack: Callable[[int, Any, str], Packed],
        unpack: Callable[[Any, list[Any]], Any],
        reply: Callable[[int, int, bool, Packed], None],
        tape: Callable[[], Tape | None],
    ) -> None:
        self.statistics = Statistics()
        self.served = 0
        self.under_way: dict[Request, str] = {}  # and what each of them is
        self._names, self._here = names, names[rank]
        self._pool, self._shift, self._references = pool, shift, references
        self._pack, self._unpack, self._reply, self._tape = pack, unpack, reply, tape
        self._cancelled: set[Request] = set()
        self._waiting: set[Request] = set()  # for a value; whoever takes one out answers for it
        self._gone: set[int] = set()  # workers that wait for no answer any more

    def call(
        self, request: Request, subject: list[Any], held: Any, body: Any, buffers: list[Any]
    ) -> None:
        """Run the function in `body`; `held` keeps the references in it until then."""
        what, made_as = subject
        self.under_way[request] = what
        made = None if made_as is None else self._references.cell(Name(*made_as[0]))
        task = partial(self._run, request, made, held, body, buffers, time.monotonic())
        self._begin(task, brief=self.statistics.brief(what))

    def fetch(self, request: Request, name: Name) -> None:
        """Send the value called `name`, when it is there."""
        self.under_way[request] = f"to_here of {shown(name)}"
        cell = self._references.values.get(name)
        if cell is None:
            self._begin(partial(self._answer, request, None, gone(name)), brief=True)
        elif not self._shift.take_on(partial(self._answer_when_done, request, cell)):
            self._await(request, None, cell)

    def cancel(self, request: Request) -> None:
        """Nobody waits for `request` any more."""
        if request in self.under_way:
            self._cancelled.add(request)
            if self._claimed(request):
                self._serve(request)

    def forget(self, worker: int) -> None:
        """Worker `worker` is gone, and waits for nothing."""
        self._gone.add(worker)
        for request in [each for each in self._waiting.copy() if each[0] == worker]:
            if self._claimed(request):
                self._serve(request)

    def _claimed(self, request: Request) -> bool:
        """Whether this request waited for a value and the caller is now the one to end it."""
        try:
            self._waiting.remove(request)
        except KeyError:
            return False
        return True

    def _await(self, request: Request, made: Cell, value: Future[Any]) -> None:
        """Answer with a value when it is there, if anybody waits for it then; in the pool."""
        self._waiting.add(request)
        nobody_waits = request in self._cancelled or request[0] in self._gone
        if nobody_waits and self._claimed(request):
            self._serve(request)
        value.add_done_callback(partial(self._answer_awaited, request, made))

    def _answer_awaited(self, request: Request, made: Cell, done: Future[Any]) -> None:
        if self._claimed(request):
            self._answer_with(request, made, done)
        elif made is not None:  # others than its maker may wait for it
            _keep(made, _result(done))

    def _serve(self, request: Request) -> None:
        """A request is over."""
        self.under_way.pop(request, None)
        self._cancelled.discard(request)
        self.served += 1

    def _begin(self, task: Callable[[], None], *, brief: bool) -> None:
        if not (brief and self._shift.take_on(task)):
            self._pool.submit(task)

    def _run(
        self, request: Request, made: Cell, held: Any, body: Any, buffers: Any, came: float
    ) -> None:
        if request in self._cancelled:
            self._answer(request, made, CancelledError())
            return
        begun = ended = time.monotonic()
        what = "?"
        try:
            func, args, kwargs = self._unpack(body, buffers)
            what = called(func, args)
            begun = time.monotonic()
            try:
                result = outcome(func, func(*args, **kwargs))
            finally:
                ended = time.monotonic()
            if isinstance(result, Pending):
                self._await(request, made, result.future)
            else:
                self._answer(request, made, result)
        except BaseException as error:
            self._answer(request, made, error)
        nbytes = len(body or b"") + sum(buffer.nbytes for buffer in buffers)
        self.statistics.add(what, nbytes, begun - came, ended - begun)
        tape = self._tape()
        if tape is not None:
            about = {"worker": self._names[request[0]], "queued": begun - came}
            tape.add(what, "rpc", "rpc served", begun, ended, **about)

    def _answer_when_done(self, request: Request, cell: Future[Any]) -> None:
        """At once if the call that makes the value came just before and has been run."""
        if cell.done():
            self._answer_with(request, None, cell)
        else:
            self._await(request, None, cell)

    def _answer_with(self, request: Request, made: Cell, done: Future[Any]) -> None:
        self._answer(request, made, _result(done))

    def _answer(self, request: Request, made: Cell, result: Any) -> None:
        """Send a result (an exception: an error), or put it where it is to be kept."""
        well = not isinstance(result, BaseException)
        if made is not None:
            _keep(made, result)
            result = None if well else result
        try:
            if request not in self._cancelled:
                self._send(request, well, result)
        except PeerLost:
            _log.debug("worker %s is gone: nobody waits", self._names[request[0]])
        finally:
            self._serve(request)

    def _send(self, request: Request, well: bool, result: Any) -> None:
        sender, number = request
        try:
            value = result if well else failures.tell(result, self._here)
            what = f"result of {self.under_way.get(request)}"
            self._reply(sender, number, well, self._pack(sender, value, what))
        except PeerLost:
            raise
        except BaseException as error:  # the result cannot travel, the error can
            told = failures.tell(error, self._here)
            self._reply(sender, number, False, self._pack(sender, told, "error"))


def _result(done: Future[Any]) -> Any:
    """What a future that is done has: a value, or an exception."""
    error = done.exception()
    return done.value() if error is None else error


def _keep(cell: Future[Any], result: Any) -> None:
    """Put a result (an exception: an error) where it is to be kept."""
    if isinstance(result, BaseException):
        cell.set_exception(result)
    else:
        cell.set_result(result)
