"""Who moves the messages of a worker: two attendants, and whoever waits for an answer.

Owns: `Shift`. A hop from one Python thread to another costs about as much as a message between two
processes, so that a caller reads its own answer and an attendant runs a short function itself.
Rules: 1. who holds the baton moves messages, nobody else does. 2. A line may be unattended only
while an attendant ticks: it takes the baton over when nobody has had it for a tick. 3. An attendant
runs functions only while the other one stands by, which spills to the pool what has to wait behind
one that is not short after all. 4. Nothing ticks on an idle line.
"""

from __future__ import annotations

import contextvars
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from dtrain.errors import PeerLost

__all__ = ["Shift"]

# How long a line is unattended at most when a short function turns out to be long, or a caller has
# its answer. An attendant that wakes costs 15 us.
_TICK = 0.001

# After so many ticks without work an attendant sleeps until it is roused.
_TICKS = 20

# How many short functions an attendant takes on at a time.
_TASKS = 32

# How often chores are done.
_LOOK = 0.05


class Shift:
    """`move(until, deadline)` moves messages until `until()`; `chores()` is called now and then.

    `on_failure(error)`: an attendant could not go on.
    """

    def __init__(
        self,
        move: Callable[[Callable[[], bool], float], Any],
        chores: Callable[[], None],
        on_failure: Callable[[BaseException], None],
        name: str,
    ) -> None:
        self._move, self._chores, self._on_failure = move, chores, on_failure
        self._baton = threading.Lock()
        self._turns = 0  # how often the baton was taken
        self._next_chores = 0.0
        self._tasks: deque[Callable[[], None]] = deque()
        self._begun = 0  # how many of them have been begun
        self._runner: int | None = None  # the ident of the attendant that runs them
        # `flush()`: write what waits to be written; `spill(task)`: run it in another thread.
        self.flush: Callable[[], None] = lambda: None
        self.spill: Callable[[Callable[[], None]], None] = lambda task: task()
        self._aside = False
        self._bells: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._ready = [False, False]  # who of the attendants stands by
        self._asleep = [False, False]  # and who of them does not tick
        self._attending: int | None = None  # the ident of the attendant that has the baton
        self.blocked: set[Any] = set()  # the futures for which threads wait without the baton
        self.stopped = False
        self._threads = [
            threading.Thread(
                target=contextvars.copy_context().run,
                args=(self._attend, me),
                name=name,
                daemon=True,
            )
            for me in range(2)
        ]

    def start(self) -> None:
        """Begin to attend."""
        for thread in self._threads:
            thread.start()

    # ---- for callers

    def lend_a_hand(self, done: Callable[[], bool], deadline: float) -> None:
        """Move messages until `done()`, unless somebody does so already or the shift is over."""
        self.flush()
        if self.stopped or not self._baton.acquire(blocking=False):
            return
        self._turns += 1
        try:
            while not done() and not self.stopped and time.monotonic() < deadline:
                self._move(done, min(deadline, self._next_chores))
                self._do_chores()
        except PeerLost:
            if not self.stopped:
                raise
        finally:
            self._baton.release()
            self._rouse()

    def served(self, future: Any) -> None:
        """The answer of `future` is here: its caller, if it is the only one, reads the next one."""
        if self.blocked and future in self.blocked and len(self.blocked) == 1:
            self._aside = threading.get_ident() == self._attending

    # ---- for those who are called while messages move

    def take_on(self, task: Callable[[], None]) -> bool:
        """Run `task`, which is short and does not raise, next in this thread; False: it cannot."""
        if threading.get_ident() != self._attending or not any(self._ready):
            return False
        if len(self._tasks) >= _TASKS:
            return False
        self._tasks.append(task)
        return True

    def goes_on(self) -> bool:
        """Whether this thread is an attendant that will run another task after this one."""
        return threading.get_ident() == self._runner and bool(self._tasks)

    # ---- attendants

    def _attend(self, me: int) -> None:
        try:
            while not self.stopped:
                if self._baton.acquire(blocking=False):
                    self._serve()
                if not self.stopped:
                    self._stand_by(me)
        except BaseException as error:
            if not self.stopped:
                self._on_failure(error)

    def _serve(self) -> None:
        """Move messages, with the baton; what is short is run without it, while the other ticks."""
        held = True
        self._spill()
        try:
            while held and not self.stopped:
                self._turns += 1
                self._attending, self._aside = threading.get_ident(), False
                self._move(self._is_interrupted, self._next_chores)
                self._do_chores()
                aside = self._aside
                if self._tasks:  # first: whom one steps aside for may wait for just that
                    self._let_go()
                    self._run_tasks()
                    held = not aside and self._baton.acquire(blocking=False)
                elif aside:
                    return
        finally:
            if held:
                self._let_go()

    def _run_tasks(self) -> None:
        self._runner = threading.get_ident()
        while (task := self._next_task()) is not None:
            self._begun += 1
            task()
        self._runner = None
        self.flush()

    def _spill(self) -> None:
        """Let others run the tasks that wait behind one which takes long."""
        while (task := self._next_task()) is not None:
            self.spill(task)

    def _next_task(self) -> Callable[[], None] | None:
        try:
            return self._tasks.popleft()
        except IndexError:  # the other attendant was quicker
            return None

    def _is_interrupted(self) -> bool:
        return bool(self._tasks) or self._aside or self.stopped

    def _let_go(self) -> None:
        self._attending = None
        self._baton.release()
        self._rouse()

    def _rouse(self) -> None:
        """Let an attendant tick, as nobody has the baton."""
        if any(self._asleep) and not any(
            ready and not asleep for ready, asleep in zip(self._ready, self._asleep, strict=True)
        ):
            self._bells.put(None)

    def _stand_by(self, me: int) -> None:
        """Return when nobody has had the baton for a tick."""
        self._ready[me], ticks = True, 0
        while not self.stopped:
            turns, begun = self._turns, self._begun
            # Noted before one looks: whoever lets go of the baton looks after that.
            self._asleep[me] = ticks > _TICKS
            self._asleep[me] = self._asleep[me] and self._baton.locked()
            if self._rung(None if self._asleep[me] else _TICK):
                ticks = 0
                continue
            if begun == self._begun:
                self._spill()
            if turns == self._turns and not self._baton.locked():
                break
            else:
                ticks = ticks + 1 if turns == self._turns else 0
        self._ready[me] = self._asleep[me] = False

    def _rung(self, timeout: float | None) -> bool:
        try:
            self._bells.get(timeout=timeout)
        except queue.Empty:
            return False
        return True

    def _do_chores(self) -> None:
        now = time.monotonic()
        if now >= self._next_chores:
            self._next_chores = now + _LOOK
            self._chores()

    # ---- the end

    def stop(self) -> None:
        """No thread begins to move messages any more; wake those that do, then `join`."""
        self.stopped = True
        for _ in self._threads:
            self._bells.put(None)

    def join(self, timeout: float) -> None:
        """Wait for the attendants to end, except for the one that calls this."""
        for thread in self._threads:
            if thread.ident is not None and thread is not threading.current_thread():
                thread.join(timeout)
