"""When what happened in a pass of DDP: timestamps, a few for each bucket, none for a parameter.

Owns: `Meter`, which the reducer tells what happens; `Step`, one measured pass, and `BucketTimes`.
Rules: 1. all times are in seconds of the monotonic clock, the one that calls are recorded by.
2. Measuring is always on: with one bucket it takes 7 us a step. 3. Nothing is sent and
nothing is decided here; `reports` puts it into words. 4. While a timeline is recorded, passes are
shown on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING

from dtrain.distributed.world import current_world
from dtrain.logs import get_logger
from dtrain.tape import MAIN, Tape

if TYPE_CHECKING:
    from dtrain.nn.parallel.reducer import Flight


@dataclass(frozen=True, slots=True)
class BucketTimes:
    """One bucket in one pass.

    `filled`: when its last gradient came (0.0: one of its parameters got none); `submitted`: when
    its call was issued; `begun`, `done`: when the call ran, with a communication hook until its
    future had been waited for; `landed`: when backward had it. `waits`: {group rank: seconds for
    which the call waited for it}.
    """

    index: int
    nbytes: int
    seq: int
    filled: float
    submitted: float
    begun: float
    done: float
    landed: float
    waits: Mapping[int, float]


@dataclass(frozen=True, slots=True)
class Step:
    """One pass: forward, backward to its last gradient (`computed`), and until all is reduced.

    `previous_end`: when the pass before was over, 0.0 for the first. `forward`: begin and end, of
    the last forward pass before. `unused`: numbers of the parameters without a gradient on this
    rank; `nowhere`: those of them that no rank had one for. `shadow`: this rank had no input.
    """

    number: int
    previous_end: float
    forward: tuple[float, float]
    began: float
    computed: float
    ended: float
    buckets: Sequence[BucketTimes]
    unused: tuple[int, ...]
    nowhere: tuple[int, ...]
    shadow: bool

    @property
    def communication(self) -> float:
        """Seconds in which a bucket was being reduced."""
        return sum(b.done - b.begun for b in self.buckets)

    @property
    def overlap(self) -> float:
        """The part of `communication` that ran beside backward."""
        end = self.computed
        return sum(min(b.done, end) - min(b.begun, end) for b in self.buckets)

    def exposed(self, bucket: BucketTimes) -> float:
        """Seconds for which the end of backward waited for this bucket, after those before it."""
        before = [b.done for b in self.buckets[: bucket.index]]
        return max(0.0, bucket.done - max([self.computed, *before]))


@dataclass(slots=True)
class Totals:
    """Sums over all passes that reduced, in seconds."""

    passes: int = 0
    forward: float = 0.0
    backward: float = 0.0
    communication: float = 0.0
    overlap: float = 0.0
    exposed: float = 0.0
    waits: dict[int, float] = field(default_factory=dict)

    def add(self, step: Step) -> None:
        self.passes += 1
        self.forward += step.forward[1] - step.forward[0]
        self.backward += step.computed - step.began
        self.communication += step.communication
        self.overlap += step.overlap
        self.exposed += step.ended - step.computed
        for bucket in step.buckets:
            for rank, seconds in bucket.waits.items():
                self.waits[rank] = self.waits.get(rank, 0.0) + seconds


class Meter:
    """The clock of one reducer: told what happens, it keeps the last pass and the sums of all.

    `names`: those of the parameters. At level INFO it says which had no gradient here, when that
    changes. `changed`: whether it ever has.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self.last: Step | None = None
        self.totals = Totals()
        self.changed = False
        self._forward = (0.0, 0.0)
        self._began = self._computed = 0.0
        self._shadow = False
        self._filled: list[float] = []
        self._submitted: list[float] = []
        self._landed: list[float] = []

    def forward(self, began: float) -> None:
        """A forward pass that began then is over."""
        self._forward = began, monotonic()
        tape = current_world().tape
        if tape is not None:
            tape.add("forward", "ddp", MAIN, *self._forward)

    def alone(self, began: float) -> None:
        """A backward pass that began then, and does not reduce, is over."""
        tape = current_world().tape
        if tape is not None:
            tape.add("backward without reduction", "ddp", MAIN, began, monotonic())

    def start(self, began: float, buckets: int) -> None:
        """The first gradient of a backward pass that began then."""
        self._began, self._shadow = began, False
        self._filled = [0.0] * buckets
        self._submitted = [0.0] * buckets
        self._landed = [0.0] * buckets

    def start_shadow(self, buckets: int) -> None:
        """A pass of the others, which this rank has no input for."""
        now = monotonic()
        self.start(now, buckets)
        self._forward, self._computed, self._shadow = (now, now), now, True

    def filled(self, index: int) -> None:
        """All gradients of this bucket are there."""
        self._filled[index] = monotonic()

    def submitted(self, index: int) -> None:
        """The call of this bucket is about to be issued."""
        self._submitted[index] = monotonic()

    def computed(self) -> None:
        """No gradient is still to come."""
        self._computed = monotonic()

    def landed(self, index: int) -> None:
        """The gradients of this bucket are what they shall be."""
        self._landed[index] = monotonic()

    def end(self, flights: Sequence[Flight]) -> None:
        """The pass is over; the flags in the buckets still say what was used."""
        last = self.last
        step = Step(
            number=self.totals.passes,
            previous_end=0.0 if last is None else last.ended,
            forward=self._forward,
            began=self._began,
            computed=self._computed,
            ended=monotonic(),
            buckets=[self._times(flight) for flight in flights],
            unused=_unused(flights, anywhere=False),
            nowhere=_unused(flights, anywhere=True),
            shadow=self._shadow,
        )
        self.changed |= last is not None and last.unused != step.unused
        if step.unused != (() if last is None else last.unused):
            self._tell_unused(step)
        self.last = step
        self.totals.add(step)
        tape = current_world().tape
        if tape is not None:
            _show(step, tape)

    def _tell_unused(self, step: Step) -> None:
        names = ", ".join(self._names[number] for number in step.unused) or "none"
        log = get_logger("dtrain.nn.parallel")
        log.info("parameters without a gradient in pass %d: %s", step.number, names)

    def _times(self, flight: Flight) -> BucketTimes:
        bucket, call = flight.bucket, flight.work.what
        index = bucket.index
        landed = self._landed[index]
        hooked = flight.future is not None
        return BucketTimes(
            index=index,
            nbytes=bucket.gradients.nbytes,
            seq=call.seq,  # type: ignore[attr-defined]
            filled=self._filled[index],
            submitted=self._submitted[index],
            begun=self._submitted[index] if hooked else call.begun,  # type: ignore[attr-defined]
            done=landed if hooked else call.ended,  # type: ignore[attr-defined]
            landed=landed,
            waits=call.waits or {},  # type: ignore[attr-defined]
        )


def _unused(flights: Sequence[Flight], anywhere: bool) -> tuple[int, ...]:
    """Numbers of the parameters without a gradient here, or (`anywhere`) on no rank."""
    return tuple(
        flight.bucket.members[place]
        for flight in flights
        for place in flight.kept
        if not anywhere or flight.bucket.flags[place] <= 0
    )


def _show(step: Step, tape: Tape) -> None:
    """A pass on the timeline: backward, what it waits for after it, the buckets beside it."""
    if not step.shadow:
        tape.add("backward", "ddp", MAIN, step.began, step.computed, step=step.number)
    tape.add("wait for gradients", "ddp", MAIN, step.computed, step.ended, step=step.number)
    for bucket in step.buckets:
        exposed = step.exposed(bucket) * 1e3
        tape.add(
            f"bucket {bucket.index} {bucket.nbytes} B", "bucket", "buckets", bucket.submitted,
            bucket.done, step=step.number, bytes=bucket.nbytes, seq=bucket.seq, exposed_ms=exposed,
        )  # fmt: skip
