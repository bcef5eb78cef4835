"""`profile`: when a timeline is recorded, and who is told when a piece of it is ready.

Owns: the schedule of a profile (`ProfilerAction`, `schedule`) and what happens when it goes from
one action to the next. Rules: 1. A profile records this rank alone and sends nothing. 2. WARMUP is
as NONE: nothing here needs warming up. 3. After a cycle the profile has that cycle's events.
Source: torch.profiler.profiler.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
import warnings
from collections.abc import Callable, Iterable
from enum import Enum
from time import monotonic
from types import TracebackType
from typing import Any, Self

from dtrain.distributed.world import current_world
from dtrain.profiler.averages import Averages, averages_of
from dtrain.tape import MAIN, Event, Tape


class ProfilerActivity(Enum):
    """What torch.profiler can record; here `profile` takes and ignores it."""

    CPU = 0
    XPU = 1
    MTIA = 2
    CUDA = 3
    HPU = 4
    PrivateUse1 = 5


class ProfilerAction(Enum):
    """What a profile does in a step."""

    NONE = 0
    WARMUP = 1
    RECORD = 2
    RECORD_AND_SAVE = 3


_RECORDING = (ProfilerAction.RECORD, ProfilerAction.RECORD_AND_SAVE)
# What a schedule should not do: nobody is given what has been recorded.
_DROPS = (
    (ProfilerAction.WARMUP, ProfilerAction.NONE),
    (ProfilerAction.RECORD, ProfilerAction.NONE),
    (ProfilerAction.RECORD, ProfilerAction.WARMUP),
)


def schedule(
    *,
    wait: int,
    warmup: int,
    active: int,
    repeat: int = 0,
    skip_first: int = 0,
    skip_first_wait: int = 0,
) -> Callable[[int], ProfilerAction]:
    """After `skip_first` steps cycles of `wait`, `warmup` and `active` steps, `repeat` of them.

    0 for `repeat`: without end. `skip_first_wait` other than 0: the first cycle does not wait. The
    last active step of a cycle saves. AssertionError for what is negative, and for no active steps.
    """
    if min(wait, warmup, repeat, skip_first) < 0 or active <= 0:
        raise AssertionError(
            f"Invalid profiler schedule arguments. Got wait={wait} (need >= 0), warmup={warmup} "
            f"(need >= 0), active={active} (need > 0), repeat={repeat} (need >= 0), "
            f"skip_first={skip_first} (need >= 0)."
        )
    length = wait + warmup + active

    def action(step: int) -> ProfilerAction:
        if step < 0:
            raise AssertionError(f"Step must be non-negative. Got {step}.")
        if step < skip_first:
            return ProfilerAction.NONE
        cycle, place = divmod(step - skip_first + (wait if skip_first_wait else 0), length)
        if place < wait or 0 < repeat <= cycle:
            return ProfilerAction.NONE
        if place < wait + warmup:
            return ProfilerAction.WARMUP
        last = place == length - 1
        return ProfilerAction.RECORD_AND_SAVE if last else ProfilerAction.RECORD

    return action


class profile:
    """`with profile() as prof: ...`, then `prof.export_chrome_trace(path)`, on each rank.

    Records this rank alone and sends nothing. Write each rank's to `DIR/rank-N.json`; `merge(DIR)`
    then makes one file of all, with arrows.

    schedule        a function of the step's number (see `schedule`); None: record all the time.
                    `step()` says that the next one begins; steps are shown as ProfilerStep#N.
    on_trace_ready  called with the profile at the end of each cycle, and of the block.
    activities, record_shapes, profile_memory, with_stack, with_flops, with_modules   accepted and
                    ignored: operators are not recorded.
    """

    def __init__(
        self,
        *,
        activities: Iterable[Any] | None = None,
        schedule: Callable[[int], ProfilerAction] | None = None,
        on_trace_ready: Callable[[profile], Any] | None = None,
        record_shapes: bool = False,
        profile_memory: bool = False,
        with_stack: bool = False,
        with_flops: bool = False,
        with_modules: bool = False,
    ) -> None:
        self.on_trace_ready = on_trace_ready
        self.schedule = schedule or (lambda step: ProfilerAction.RECORD)
        self.step_num = 0
        self.current_action = _checked(self.schedule(0))
        self._shows_steps = schedule is not None
        self._shown: record_function | None = None
        self._started = False
        self._tape: Tape | None = None
        self._began_tape = False
        self._first = 0
        self._last: int | None = 0

    def start(self) -> None:
        """Begin with the action of the current step."""
        self._started = True
        self._go(ProfilerAction.NONE, self.current_action)
        self._show_step()

    def step(self) -> None:
        """The next step begins; RuntimeError when the profile has not been started."""
        self._must_be_started()
        action = _checked(self.schedule(self.step_num + 1))
        self._end_step()
        before, self.current_action = self.current_action, action
        self.step_num += 1
        self._go(before, action)
        self._show_step()

    def stop(self) -> None:
        """Stop, and call `on_trace_ready` if it was recording; RuntimeError when not started."""
        self._must_be_started()
        self._end_step()
        self._started = False
        self._go(self.current_action, None)

    def _must_be_started(self) -> None:
        if not self._started:
            raise RuntimeError("the profile has not been started: use `with profile() as prof:`")

    def _show_step(self) -> None:
        if self._shows_steps:
            self._shown = record_function(f"ProfilerStep#{self.step_num}")
            self._shown.__enter__()

    def _end_step(self) -> None:
        if self._shown is not None:
            self._shown.__exit__()
            self._shown = None

    def _go(self, before: ProfilerAction, after: ProfilerAction | None) -> None:
        """From one action to the next; `after` is None at the end of the profile."""
        saves = before is ProfilerAction.RECORD_AND_SAVE
        if before in _RECORDING and (saves or after not in _RECORDING):
            self._stop_recording()
            if (saves or after is None) and self.on_trace_ready is not None:
                self.on_trace_ready(self)
        if (before, after) in _DROPS and after is not None:
            warnings.warn(
                f"Incorrect schedule: {before.name} followed by {after.name}", stacklevel=3
            )
        if after in _RECORDING and (saves or before not in _RECORDING):
            self._start_recording()

    def _start_recording(self) -> None:
        world = current_world()
        self._began_tape = world.tape is None
        if world.tape is None:
            group = world.default
            world.record_on(Tape(*((0, 1) if group is None else (group.rank(), group.size()))))
        self._tape, self._last = world.tape, None
        assert self._tape is not None
        self._first = len(self._tape.events)

    def _stop_recording(self) -> None:
        assert self._tape is not None
        self._last = len(self._tape.events)
        if self._began_tape:
            current_world().record_on(None)

    def events(self) -> list[Event]:
        """What the last cycle has recorded so far; times in seconds of the monotonic clock.

        Empty when nothing has been recorded yet.
        """
        return [] if self._tape is None else self._tape.events[self._first : self._last]

    def key_averages(self) -> Averages:
        """Events of one name put together: `print(prof.key_averages().table())`."""
        return averages_of(self.events())

    def export_chrome_trace(self, path: str | os.PathLike[str]) -> None:
        """Write the last cycle as a file that Perfetto opens, compressed if it ends in .gz.

        The folder must exist. RuntimeError when nothing has been recorded.
        """
        if self._tape is None:
            raise RuntimeError(
                f"nothing has been recorded up to step {self.step_num}: the profile has not been "
                "started, or its schedule has not come to an active step"
            )
        self._tape.write(path, self.events())

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


def _checked(action: Any) -> ProfilerAction:
    if not isinstance(action, ProfilerAction):
        raise TypeError(f"a schedule gives a ProfilerAction for each step, got {action!r}")
    return action


def tensorboard_trace_handler(
    dir_name: str, worker_name: str | None = None, use_gzip: bool = False
) -> Callable[[profile], None]:
    """For `on_trace_ready`: a file for each cycle in `dir_name`, where TensorBoard's plugin looks.

    `worker_name`: unique for each rank, by default HOSTNAME_PID. The folder is made when needed.
    """

    def save(prof: profile) -> None:
        os.makedirs(dir_name, exist_ok=True)
        worker = worker_name or f"{socket.gethostname()}_{os.getpid()}"
        ending = ".pt.trace.json.gz" if use_gzip else ".pt.trace.json"
        prof.export_chrome_trace(os.path.join(dir_name, f"{worker}.{time.time_ns()}{ending}"))

    return save


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
