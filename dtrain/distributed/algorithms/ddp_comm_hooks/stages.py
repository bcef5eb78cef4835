"""Communication hooks of several calls: generators that yield what they wait for.

Owns: `staged`, which makes a hook of a generator, and `Payload`, what a hook sends. A generator
yields a Work or a Future, is given its value, and returns the tensor that replaces the gradients.

Rules: the first stage runs when the hook is called, beside backward. The later ones run in the
thread that waits for the result, and never in the group's: so all ranks issue their calls in one
order, whatever is complete first where. Whoever waits for one result moves on all that are open in
the group, in the order in which they began, a stage each: while one bucket is computed, the others'
calls are under way.
"""

from __future__ import annotations

import functools
import time
import weakref
from collections.abc import Callable, Generator
from typing import Any, NamedTuple

from dtrain.comm.work import Future
from dtrain.distributed.world import ProcessGroup, resolve

Hook = Callable[[Any, Any], Future[Any]]
Stages = Generator[Any, Any, Any]

_open: weakref.WeakKeyDictionary[ProcessGroup, list[_Chain]] = weakref.WeakKeyDictionary()


class Payload(NamedTuple):
    """Bytes that a rank puts into collectives for one bucket, each kind by itself."""

    all_reduce: int = 0
    all_gather: int = 0
    broadcast: int = 0  # where it is the root

    def sent(self, ranks: int) -> float:
        """Bytes that leave each of `ranks` ranks: slices of what is reduced go out and come back.

        An all-reduce of at most 64 KiB takes one phase, and then sends `ranks - 1` times its bytes.
        """
        copied = self.all_gather + self.broadcast
        return 2 * (ranks - 1) / ranks * self.all_reduce + (ranks - 1) * copied


def sends(payload: Callable[[Any, Any], Payload]) -> Callable[[Any], Any]:
    """Give a hook its `payload(state, bucket)`: what calling it now puts into collectives."""

    def mark(hook: Any) -> Any:
        hook.payload = payload
        return hook

    return mark


def group_of(state: Any) -> ProcessGroup:
    """The group in a hook's state: the state itself, its `process_group`, or (None) the default."""
    return resolve(getattr(state, "process_group", state))


def staged(stages: Callable[..., Stages]) -> Callable[..., Future[Any]]:
    """The hook whose stages a generator function gives; it is called with the same arguments."""

    @functools.wraps(stages)
    def hook(state: Any, bucket: Any, *args: Any, **kwargs: Any) -> Future[Any]:
        return begin(group_of(state), stages(state, bucket, *args, **kwargs))

    return hook


def begin(group: ProcessGroup, stages: Stages) -> Future[Any]:
    """Run the first stage; the future of what the last one returns."""
    line = _open.setdefault(group, [])
    chain = _Chain(stages, line)
    line.append(chain)
    chain.go_on(None)
    return chain.future


def opened(group: ProcessGroup) -> list[_Chain]:
    """All that are open in `group` now, in the order in which they began."""
    return list(_open.get(group, ()))


def move_on(chains: list[_Chain]) -> None:
    """One stage more for each; blocks for what they wait for."""
    for chain in chains:
        chain.advance(None)


class _Chain:
    """One hook under way: its generator, and what that waits for."""

    def __init__(self, stages: Stages, line: list[_Chain]) -> None:
        self.stages = stages
        self.line = line  # all that are open in the group, this one among them
        self.awaited: Any = None
        self.busy = True  # in a stage, or waiting: what it waits for may be another chain
        self.future: Future[Any] = Future(self.drive)

    def drive(self, timeout: float | None) -> None:
        """Complete this one, and move the others on as far. Nothing with timeout 0: `done()`."""
        if timeout == 0:
            return
        if self.busy:
            raise RuntimeError("a communication hook waits for its own result: yield what it needs")
        until = None if timeout is None else time.monotonic() + timeout
        while self in self.line:
            for chain in list(self.line):
                chain.advance(until)

    def advance(self, until: float | None) -> None:
        """Wait, then one stage; TimeoutError, with nothing changed, when `until` has passed."""
        if self.busy or self not in self.line:
            return
        self.busy = True
        try:
            value = self.awaited.wait(_left(until))
        except TimeoutError as error:
            if until is not None and time.monotonic() >= until:
                self.busy = False
                raise
            self.fail(error)
        except BaseException as error:
            self.fail(error)
        else:
            self.go_on(value)

    def go_on(self, value: Any) -> None:
        try:
            self.awaited = self.stages.send(value)
            self.busy = False
        except StopIteration as end:
            self.line.remove(self)
            self.future.set_result(end.value)
        except BaseException as error:
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        self.line.remove(self)
        self.stages.close()
        self.future.set_exception(error)


def _left(until: float | None) -> float | None:
    return None if until is None else max(1e-6, until - time.monotonic())
