"""A timeline of training, opened in Perfetto: torch.profiler's everyday names.

Owns: `profile`, `record_function` and `merge`. What is recorded: DDP's forward and backward passes
and their buckets, every call of every group, and what `record_function` surrounds. Without a
profile each of these costs one look at an attribute. With DTRAIN_TRACE=DIR the whole run is
recorded (`dtrain.tape`), and nothing needs to be called. Source: torch.profiler.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from time import monotonic
from types import TracebackType
from typing import Any, Self

from dtrain.distributed.world import current_world
from dtrain.tape import MAIN, Event, Tape, merge

__all__ = ["merge", "profile", "record_function"]


class profile:
    """`with profile() as prof: ...`, then `prof.export_chrome_trace(path)`, on each rank.

    Records this rank alone and sends nothing. `on_trace_ready(prof)` is called at the end. Write
    each rank's to `DIR/rank-N.json`; `merge(DIR)` then makes one file of all, with arrows.
    """

    def __init__(self, *, on_trace_ready: Callable[[profile], None] | None = None) -> None:
        self.on_trace_ready = on_trace_ready
        self._tape: Tape | None = None
        self._first = 0
        self._last: int | None = None

    def start(self) -> None:
        """Begin to record; also what groups made from now on do."""
        world = current_world()
        self._began_tape = world.tape is None
        if world.tape is None:
            group = world.default
            world.record_on(Tape(*((0, 1) if group is None else (group.rank(), group.size()))))
        self._tape, self._last = world.tape, None
        assert self._tape is not None
        self._first = len(self._tape.events)

    def stop(self) -> None:
        """Stop recording and call `on_trace_ready`; RuntimeError when it was not started."""
        self._last = len(self._recorded().events)
        if self._began_tape:
            current_world().record_on(None)
        if self.on_trace_ready is not None:
            self.on_trace_ready(self)

    def _recorded(self) -> Tape:
        if self._tape is None:
            raise RuntimeError("the profile has not been started: use `with profile() as prof:`")
        return self._tape

    def events(self) -> list[Event]:
        """What has been recorded so far; times in seconds of the monotonic clock."""
        return self._recorded().events[self._first : self._last]

    def export_chrome_trace(self, path: str | os.PathLike[str]) -> None:
        """Write what was recorded as a file that Perfetto opens; the folder must exist."""
        self._recorded().write(path, self.events())

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


class record_function(contextlib.ContextDecorator):
    """`with record_function("name"):` or a decorator: a span of the program's own."""

    def __init__(self, name: str, args: str | None = None) -> None:
        self.name, self.args = name, args
        self._began: list[float] = []  # a decorated function may call itself

    def __enter__(self) -> Self:
        self._began.append(monotonic())
        return self

    def __exit__(self, *error: Any) -> None:
        began, tape = self._began.pop(), current_world().tape
        if tape is not None:
            args = {} if self.args is None else {"args": self.args}
            tape.add(self.name, "user", MAIN, began, monotonic(), **args)
