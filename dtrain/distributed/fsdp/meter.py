"""When the units of a pass were gathered and reduced, and for which of them this rank stood still.

Owns: `Transfer`, one unit on its way, `Pass`, one measured pass, and `Meter`, which a root and its
units tell what happens. Rules: 1. times are in seconds of the monotonic clock, the one that calls
are recorded by. 2. Measuring is always on: a few clock readings for each unit. 3. Nothing is sent
and nothing is decided here; `reports` puts it into words. 4. While a timeline is recorded, passes
and units are shown on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from time import monotonic
from typing import Literal, NamedTuple

from dtrain.comm.record import CallRecord
from dtrain.comm.work import Work
from dtrain.distributed.world import current_world
from dtrain.tape import MAIN, Tape

Phase = Literal["forward", "backward"]

# Why a rank waits for gradients to be reduced: as many units are on their way as may be, nothing is
# left to compute, or the core that would reduce them is the one that computes.
Cause = Literal["limit", "end", "alone"]


class Issued(NamedTuple):
    """A call on its way: when it was issued, and whether it runs `beside` what computes."""

    work: Work
    at: float
    beside: bool

    def wait(self) -> float:
        """Wait for it; since when it kept this rank from computing."""
        since = monotonic() if self.beside else self.at
        self.work.wait()
        return since

    @property
    def record(self) -> CallRecord:
        """When it ran, and for whom it waited; once it is over."""
        return self.work.what  # type: ignore[return-value]


class Landed(NamedTuple):
    """How a reduction ended: why and since when it was `wanted`, and when the `replicas` had added
    theirs, 0.0 without them.
    """

    cause: Cause
    wanted: float
    replicas: float


@dataclass(frozen=True, slots=True)
class Transfer:
    """One unit, gathered or reduced: `unit` is the path of its module, "" the root's.

    `issued`: when its call was; `begun`, `ended`: when it ran; `wanted`: from when on this rank
    could not go on without it; `ahead`: whether it was issued before it was asked for. `waits`:
    {group rank: seconds for which the call waited for it}.
    """

    unit: str
    kind: Literal["gather", "reduce"]
    phase: Phase
    nbytes: int
    seq: int
    issued: float
    begun: float
    ended: float
    wanted: float
    ahead: bool
    beside: bool
    cause: Cause | None = None
    waits: Mapping[int, float] = field(default_factory=dict)

    @property
    def exposed(self) -> float:
        """Seconds for which this rank stood still for it."""
        return max(0.0, self.ended - max(self.wanted, self.issued))


@dataclass(slots=True)
class Pass:
    """A forward pass and the backward pass after it, to its last gradient (`computed`) and until
    all are reduced (`ended`). `fenced`: seconds until all ranks had made their changes known.
    `shadow`: this rank had no batch, see `Join`.
    """

    number: int
    shadow: bool
    forward: tuple[float, float]
    fenced: float = 0.0
    began: float = 0.0
    computed: float = 0.0
    ended: float = 0.0
    transfers: list[Transfer] = field(default_factory=list)

    @property
    def communication(self) -> float:
        """Seconds in which a unit was under way."""
        return sum(each.ended - each.begun for each in self.transfers)

    @property
    def exposed(self) -> float:
        """Seconds for which this rank stood still, while units were under way or queued."""
        return sum(each.exposed for each in self.transfers)


class Meter:
    """The clock of one root; keeps the `last` pass that had a backward pass."""

    def __init__(self) -> None:
        self.last: Pass | None = None
        self.phase: Phase
        self.begin()

    def begin(self, *, shadow: bool = False) -> None:
        """A forward pass begins. What came of one that had no backward pass is forgotten."""
        number = 0 if self.last is None else self.last.number + 1
        now = monotonic()
        self.phase, self._now = "forward", Pass(number, shadow, (now, now))

    def fenced(self, since: float) -> None:
        """All ranks have met and shown their changes."""
        self._now.fenced += monotonic() - since

    def forward_ended(self) -> None:
        """The root's forward is over."""
        self._now.forward = self._now.forward[0], monotonic()

    def gathered(self, unit: str, nbytes: int, call: Issued, asked: float, wanted: float) -> None:
        """A unit is whole, for which a module `asked` then."""
        record = call.record
        self._now.transfers.append(Transfer(
            unit, "gather", self.phase, nbytes, record.seq, call.at,
            record.begun, record.ended, wanted, call.at < asked, call.beside,
            waits=record.waits or {},
        ))  # fmt: skip

    def reduced(self, unit: str, nbytes: int, call: Issued, landed: Landed) -> None:
        """The gradients of a unit have arrived, over the replicas too."""
        record = call.record
        self._now.transfers.append(Transfer(
            unit, "reduce", "backward", nbytes, record.seq, call.at,
            record.begun, max(record.ended, landed.replicas), landed.wanted, True,
            call.beside, landed.cause, record.waits or {},
        ))  # fmt: skip

    def backward_began(self, at: float) -> None:
        """The first gradient of a backward pass that began then."""
        self._now.began, self.phase = at, "backward"

    def computed(self) -> None:
        """No gradient is still to come."""
        self._now.computed = monotonic()

    def end(self) -> None:
        """All gradients are where they shall be."""
        self.last = done = self._now
        done.ended = monotonic()
        self.begin()
        tape = current_world().tape
        if tape is not None:
            _show(done, tape)


def _show(done: Pass, tape: Tape) -> None:
    """A pass on the timeline: what computes, what it waits for, and the units beside it."""
    step = done.number
    if not done.shadow:
        tape.add("forward", "fsdp", MAIN, *done.forward, step=step)
        tape.add("backward", "fsdp", MAIN, done.began, done.computed, step=step)
    tape.add("wait for gradients", "fsdp", MAIN, done.computed, done.ended, step=step)
    for each in done.transfers:
        tape.add(
            f"{each.kind} {each.unit or 'root'}", "unit", "units", each.begun, each.ended,
            step=step, phase=each.phase, bytes=each.nbytes, seq=each.seq,
            exposed_ms=each.exposed * 1e3,
        )  # fmt: skip
