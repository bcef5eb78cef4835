"""What all ranks of a save or load do together: each its part, or the first one for all.

A rank that fails still takes part in the exchange that follows, so nobody waits for it: all ranks
raise one CheckpointException with the failures of all. Without a process group this rank is all
there is. Cost: one exchange of objects a step (2 small collectives).
"""

from __future__ import annotations

import builtins
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

from dtrain.distributed.checkpoint._plain import decode, encode
from dtrain.distributed.checkpoint.api import CheckpointException, DamagedCheckpoint
from dtrain.distributed.groups import is_initialized
from dtrain.distributed.objects import all_gather_object, broadcast_object_list
from dtrain.distributed.world import ProcessGroup, resolve

T = TypeVar("T")
Failures = dict[int, tuple[BaseException, traceback.StackSummary]]


class Together:
    """The ranks of one save or load. `no_dist`: this rank alone, whatever groups there are."""

    def __init__(self, process_group: Any = None, no_dist: bool = False, first: int = 0) -> None:
        alone = no_dist or not is_initialized()
        self.group: ProcessGroup | None = None if alone else resolve(process_group)
        self.rank = 0 if self.group is None else self.group.rank()
        self.size = 1 if self.group is None else self.group.size()
        self.coordinator = first
        self.is_coordinator = self.rank == first

    def issue(self, call: Any) -> None:
        """Make a call on arrays, which a rank alone need not."""
        if self.group is not None:
            self.group.issue(call)

    def each(self, what: str, work: Callable[[], T]) -> list[T]:
        """The results of `work` on all ranks, in their order; CheckpointException on all ranks."""
        value, told, own = _attempt(work)
        answers: list[Any] = [told] * self.size
        if self.group is not None:
            all_gather_object(answers, told, self.group)
        failures = {r: _heard(form) for r, (ok, form) in enumerate(answers) if not ok}
        if failures:
            self._raise(what, failures, own)
        found: list[Any] = [
            value if r == self.rank else decode(form) for r, (_, form) in enumerate(answers)
        ]
        return found

    def first(self, what: str, work: Callable[[], T]) -> T:
        """The result of `work`, which the coordinator alone does, on all ranks."""
        value, told, own = _attempt(work) if self.is_coordinator else (None, None, None)
        answer: list[Any] = [told]
        if self.group is not None:
            broadcast_object_list(answer, group=self.group, group_src=self.coordinator)
        ok, form = answer[0]
        if not ok:
            self._raise(what, {self.coordinator: _heard(form)}, own)
        return value if self.is_coordinator else decode(form)  # type: ignore[return-value]

    def _raise(self, what: str, failures: Failures, own: BaseException | None) -> None:
        if own is not None:
            failures[self.rank] = (own, _stack(own))
        at = f"rank {self.rank} of {self.size}"
        raise CheckpointException(f"{what} failed (this is {at})", failures) from own


def _attempt(work: Callable[[], T]) -> tuple[T | None, tuple[bool, Any], Exception | None]:
    """The result of `work`, what to tell the others of it, and its error."""
    try:
        value = work()
        return value, (True, encode(value)), None
    except Exception as error:  # told to all ranks, and raised on all of them
        return None, (False, _told(error)), error


def _stack(error: BaseException) -> traceback.StackSummary:
    return traceback.extract_tb(error.__traceback__)


def _told(error: BaseException) -> list[Any]:
    """An error as plain data: class, sentence, frames."""
    frames = [(f.filename, f.lineno or 0, f.name, f.line or "") for f in _stack(error)]
    return [type(error).__name__, str(error), frames]


def _heard(form: list[Any]) -> tuple[BaseException, traceback.StackSummary]:
    """The error of another rank: of its class where that takes one sentence."""
    name, message, frames = form
    cls: Any = DamagedCheckpoint if name == "DamagedCheckpoint" else getattr(builtins, name, None)
    stack = traceback.StackSummary.from_list([tuple(frame) for frame in frames])
    plain = isinstance(cls, type) and issubclass(cls, Exception)
    if not plain or issubclass(cls, (UnicodeError, BaseExceptionGroup)):
        return RuntimeError(f"{name}: {message}"), stack
    return cls(message), stack
