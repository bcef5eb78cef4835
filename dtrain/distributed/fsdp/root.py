"""The units of one model: when each is gathered, reduced and given back; and who may write when.

Owns: `Root`, which the hooks of modules tell what happens. Rules:
1. Units are reduced in one order on every rank, whatever order gradients come in: that in which
   rank 0 saw them completed in its first pass, before it the reverse of registration. At the end of
   a pass the rest is reduced, with zeros where nothing came: what is unused needs no telling.
2. [Note: fences] Where ranks of a host read each other's shards in place, changes are fenced.
   Written, then read: the first forward pass after a change of parameters begins with a barrier.
   Read, then written: a unit that has been reduced is read by nobody any more, as each rank shows
   its gradients after its backward pass; else an optimizer's step and load_state_dict `meet` the
   others first. A step inside a hook writes to units that have been reduced.
3. What comes next is gathered beside what computes: the unit that came next in the forward pass
   before, and in backward the one whose forward ended before; or those that the user names. At
   most `LIMIT` units are being reduced at once, and without names as many are whole.
4. What a pass does is recorded: a rank that is out of batches does it again, without computing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any

import numpy as np

from dtrain.autograd import engine
from dtrain.autograd.grad_mode import is_grad_enabled, set_grad_enabled
from dtrain.comm.collectives import Barrier, Broadcast
from dtrain.distributed.fsdp.memory import Pool
from dtrain.distributed.fsdp.meter import Cause, Meter
from dtrain.distributed.fsdp.unit import Flight, State, Unit
from dtrain.errors import DistError
from dtrain.heap import return_freed_memory

if TYPE_CHECKING:
    from dtrain.distributed.fsdp.state import ModuleState

LIMIT = 2

Step = tuple[bool, Callable[[], None]]  # whether it belongs to backward, and what is done
_LARGE = 32 << 20  # bytes: below, giving memory back takes longer than it is worth


class Root:
    """Keeps the schedule of `units`, in the order in which they are registered."""

    def __init__(self, units: Sequence[Unit]) -> None:
        self.units = list(units)
        groups = {id(unit.group): unit.group for unit in units}
        self.groups = list(groups.values())
        pools = {key: Pool(group) for key, group in groups.items()}
        self.meter = Meter()
        for unit in units:
            unit.pool, unit.meter = pools[id(unit.group)], self.meter
            for whole in unit.whole:
                whole._post_accumulate = {0: _Ready(self, unit)}
        self.order = list(reversed(self.units))
        self._seen: list[Unit] = []  # as they were completed in the first pass
        self._settled = False
        self._passes = 0
        self._running = False
        self._pending: dict[int, int] = {}  # {id of a unit: parameters still to come}
        self._next = 0  # in `order`: the first not yet reduced
        self._flights: deque[Flight] = deque()
        self._forwards: list[ModuleState] = []  # as their forwards began in this pass
        self._before: list[ModuleState] = []  # and in the one before
        self._ends: list[ModuleState] = []  # as their forwards ended in this pass
        self._late: list[ModuleState] = []  # to be gathered when gradients are complete
        self.announce: Callable[[], None] | None = None  # what is said before a pass: see joining
        self._steps: list[Step] = []  # of this pass
        self._last: list[Step] = []  # of the last one that had a backward pass
        self._again = False  # whether they are being done again
        if sum(unit.home.array.nbytes for unit in units) >= _LARGE:
            return_freed_memory()  # what the whole parameters took when the model was made

    # ---- fences

    def before_forward(self) -> None:
        """Before anything is read: make the changes of all ranks known."""
        if self._running:  # a pass that an exception cut short, or activations computed again
            if engine.is_running():
                return
            self._abandon()
        self.meter.begin()
        if self.announce is not None:
            self.announce()
        self._fence()

    def _fence(self) -> None:
        if self._passes and not self._settled:
            self._settle()
        if is_grad_enabled():
            self._before, self._forwards, self._steps = self._forwards, [], []
            self._ends = []
        stale = [unit for unit in self.units if unit.stale and not unit.home.moves]
        for unit in stale:
            unit.publish()
        if stale:
            now = monotonic()
            meet(stale)
            self.meter.fenced(now)

    # ---- gathering

    def gather_for_forward(self, state: ModuleState) -> None:
        """Wait for the units of a module whose forward begins, and begin to gather the next."""
        self.record(partial(self.gather_for_forward, state))
        if self.is_in_backward():  # activations computed again
            self._gather(state, [], [])
            return
        place = len(self._forwards)
        known = self._before[place : place + 2]
        following = known[1:] if known[:1] == [state] else []
        if is_grad_enabled():
            self._forwards.append(state)
        self._gather(state, state.forward_prefetch, following)

    def end_forward(self, state: ModuleState) -> None:
        """The forward of a module is over."""
        if is_grad_enabled() and not self.is_in_backward():
            self._ends.append(state)

    def gather_for_backward(self, state: ModuleState) -> None:
        """Wait for the units of a module whose backward begins, and begin to gather the next."""
        self.record(partial(self.gather_for_backward, state), backward=True)
        self.meter.phase = "backward"
        at = max((n for n, each in enumerate(self._ends) if each is state), default=0)
        before = self._ends[max(at - 1, 0) : at]
        self._gather(state, [] if state.prefetches_late else state.backward_prefetch, before)
        self._late = before if state.prefetches_late else []
        for unit in state.units:
            unit.show_whole()  # modules that compute again may find them there

    def _gather(
        self, state: ModuleState, named: list[ModuleState] | None, following: list[ModuleState]
    ) -> None:
        asked = monotonic()
        try:
            for unit in state.units:
                unit.begin(async_op=unit.runs_aside)  # queued before what is only wanted later
            for later in following if named is None else named:
                for unit in later.units:
                    if unit.runs_aside:
                        unit.begin(async_op=True)
            for unit in state.units:
                unit.finish(asked)
        except DistError as error:
            error.add_note(self._where("gathering", state.units))
            raise

    # ---- a backward pass

    def ready(self, unit: Unit) -> None:
        """One more gradient of a unit's parameters is complete."""
        if not self._running:
            self._start(engine.started_at())
            engine.queue_callback(self._finish)
        if unit.state is not State.WHOLE and not unit.home.stays:
            raise RuntimeError(
                f"the gradient of '{unit.name}' was computed when its unit had been given back: "
                "what forward returned must lead to it, as tensors in lists, tuples and dicts. Or "
                "use reshard_after_forward=False."
            )
        self._pending[id(unit)] -= 1
        if not self._pending[id(unit)]:
            self._complete(unit)

    def _complete(self, unit: Unit) -> None:
        self.record(partial(self._complete, unit), backward=True)
        self._pending[id(unit)] = 0
        if all(p._requires_grad for p in unit.whole):  # else what is frozen may be needed still
            unit.leave()
        if not self._settled:
            self._seen.append(unit)
        self._reduce_complete()
        late, self._late = self._late, []
        for later in (each for state in late for each in state.units if each.runs_aside):
            later.begin(async_op=True)

    def _start(self, began: float) -> None:
        self.meter.backward_began(began)
        self._running, self._next = True, 0
        self._seen = []
        self._pending = {id(unit): sum(p._requires_grad for p in unit.whole) for unit in self.units}

    def share_memory(self, other: Root) -> None:
        """Make gradients in what `other` has taken for its own, of the same ranks."""
        pools = {id(unit.group): unit.pool for unit in other.units}
        for unit in self.units:
            unit.pool = pools.get(id(unit.group), unit.pool)

    def _reduce_complete(self) -> None:
        """Reduce every unit whose turn it is and whose gradients are all there."""
        while self._next < len(self.order) and not self._pending[id(self.order[self._next])]:
            self._reduce(self.order[self._next])
            self._next += 1

    def _reduce(self, unit: Unit) -> None:
        if not any(p._requires_grad for p in unit.sharded):
            return
        if not unit.sync:
            unit.keep()
            return
        try:
            while len(self._flights) >= LIMIT:
                self._land("limit")
            self._flights.append(unit.reduce(async_op=unit.runs_aside))
            if not unit.runs_aside:
                self._land("alone")
        except DistError as error:
            error.add_note(self._where("reducing", [unit]))
            raise

    def _land(self, cause: Cause) -> None:
        flight = self._flights.popleft()
        flight.land(cause)
        for sharded in flight.unit.sharded:
            for hook in tuple((sharded._post_accumulate or {}).values()):
                if sharded._grad is not None:
                    hook(sharded)

    def _finish(self) -> None:
        """The end of a pass: reduce the rest, wait for all, give all back."""
        self.meter.computed()
        for unit in self.order[self._next :]:
            self._reduce(unit)
        while self._flights:
            self._land("end")
        self._running = False
        self._passes += 1
        self._last = self._steps
        for unit in self.units:
            unit.leave()
        self.meter.end()

    # ---- a pass without a batch

    def record(self, step: Callable[[], None], *, backward: bool | None = None) -> None:
        """Keep what is being done in a pass that will have a backward pass, or is in it."""
        backward = self.is_in_backward() if backward is None else backward
        if backward or is_grad_enabled():
            self._steps.append((backward, step))

    def shadow(self, *, backward: bool, reduces: bool) -> None:
        """Do what the last pass of this rank did, without computing and with no gradients."""
        if not self._last:
            raise RuntimeError(
                "a rank that has not had one batch cannot join: it does not know what the others "
                "do in a pass. Give every rank at least one."
            )
        steps = self._last
        self.meter.begin(shadow=True)
        with set_grad_enabled(backward):
            self._fence()
            for _, step in (each for each in steps if not each[0]):
                step()
            for unit in self.units:
                unit.reading, unit.sync = True, reduces  # as on ranks that compute
            if backward:
                self._again = True
                self._start(monotonic())
                for _, step in (each for each in steps if each[0]):
                    step()
                self._finish()
                self._again = False

    def is_in_backward(self) -> bool:
        """Whether a backward pass is on, or its steps are done again."""
        return self._again or engine.is_running()

    def _abandon(self) -> None:
        """Forget a pass that an exception cut short."""
        self._running = False
        while self._flights:
            self._flights.popleft().land("end")
        for unit in self.units:
            unit.leave()
            for whole in unit.whole:
                whole._grad = None

    def _settle(self) -> None:
        """Reduce in the order in which rank 0 saw units completed from now on."""
        self._settled = True
        number = {id(unit): place for place, unit in enumerate(self.units)}
        seen = [number[id(unit)] for unit in self._seen]
        late = [place for place in reversed(range(len(self.units))) if place not in seen]
        order = np.array([*seen, *late], np.int64)
        first = self.units[0]
        for group in (first.group, first.replicas):
            if group is not None:
                group.issue(Broadcast(order, 0))
        self.order = [self.units[place] for place in order.tolist()]

    def _where(self, what: str, units: Sequence[Unit]) -> str:
        first, last = units[0].name, units[-1].path_of(-1)
        return (
            f"in fully sharded data parallel on rank {units[0].group.rank()}, {what} unit "
            f"{self.units.index(units[0])} of {len(self.units)} ('{first}' to '{last}'). If ranks "
            "have different numbers of batches, use Join, or give all of them the same number."
        )


def meet(units: Iterable[Unit]) -> None:
    """Wait until all ranks have come here: nobody reads these units any more, whose reading is over
    on this rank, and what was written to them may be read.
    """
    units = list(units)
    for group in {id(unit.group): unit.group for unit in units}.values():
        group.issue(Barrier())
    for unit in units:
        unit.reading = False


class _Ready:
    """The hook of a whole parameter: its gradient of this pass is complete."""

    def __init__(self, root: Root, unit: Unit) -> None:
        self._root, self._unit = root, unit

    def __call__(self, whole: Any) -> None:
        self._root.ready(self._unit)
