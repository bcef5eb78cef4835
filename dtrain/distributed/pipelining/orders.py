"""Schedules as data: for every rank the list of what it computes, in order; and what follows of it.

Pure functions, no tensor and no message. Rules: 1. stage s is on rank s % ranks. 2. An order names
forward and backward passes only: what is sent and received follows, since a stage's input is what
the stage before it computed, and a gradient what the stage behind it did. 3. Each stage takes the
microbatches in the order 0, 1, ..., forward and backward, so that messages need no number.
4. `play` is the judge: it runs an order with a clock, and refuses one that is incomplete or never
ends.
Source: Huang et al., GPipe, 2019 (arXiv 1811.06965); Narayanan et al., PipeDream-Flush and
interleaving, 2021 (arXiv 2104.04473); Lamy-Poirier, Breadth-First Pipeline Parallelism, 2022.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

FORWARD, BACKWARD = "F", "B"


class Action(NamedTuple):
    """One pass of one stage over one microbatch; "1F0" is stage 1, forward, microbatch 0."""

    stage: int
    kind: str
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"


Order = list[list[Action]]


def _forwards(stage: int, microbatches: int) -> list[Action]:
    return [Action(stage, FORWARD, m) for m in range(microbatches)]


def _backwards(stage: int, microbatches: int) -> list[Action]:
    return [Action(stage, BACKWARD, m) for m in range(microbatches)]


def forward_only(ranks: int, stages: int, microbatches: int) -> Order:
    """No gradients: each rank's stages in turn, all microbatches."""
    return [
        [a for s in range(rank, stages, ranks) for a in _forwards(s, microbatches)]
        for rank in range(ranks)
    ]


def looped_bfs(ranks: int, stages: int, microbatches: int) -> Order:
    """All forward, stage after stage of a rank, then all backward the other way: breadth first.

    In flight: all microbatches of all stages of a rank.
    """
    return [
        forward + [a for s in reversed(range(rank, stages, ranks))
                   for a in _backwards(s, microbatches)]
        for rank, forward in enumerate(forward_only(ranks, stages, microbatches))
    ]  # fmt: skip


def gpipe(ranks: int, stages: int, microbatches: int) -> Order:
    """All forward, then all backward. In flight: all microbatches."""
    _one_each(ranks, stages)
    return looped_bfs(ranks, stages, microbatches)


def one_forward_one_backward(ranks: int, stages: int, microbatches: int) -> Order:
    """As few forward as it takes to fill the pipeline, then one backward for each forward.

    In flight on stage s: min(microbatches, stages - s).
    """
    _one_each(ranks, stages)
    return [
        _alternate(_forwards(s, microbatches), _backwards(s, microbatches), stages - s)
        for s in range(stages)
    ]


def interleaved(ranks: int, stages: int, microbatches: int) -> Order:
    """1F1B where each rank has several stages and takes them in turn, `ranks` microbatches each.

    ValueError unless the microbatches are a multiple of the rounds, max(1, microbatches // ranks),
    as in torch. In flight on a rank: see `in_flight_interleaved`.
    """
    local = _several_each(ranks, stages)
    rounds = max(1, microbatches // ranks)
    if microbatches % rounds:
        raise ValueError(
            "Interleaved 1F1B requires the number of microbatches to be a multiple of the number "
            f"of rounds ({rounds}), but got {microbatches}."
        )
    width = microbatches // rounds

    def passes(kind: str, places: Sequence[int]) -> Iterator[Action]:
        """Round after round, in each the stages in turn, of each `width` microbatches."""
        for begin in range(0, microbatches, width):
            for stage in places:
                for m in range(begin, begin + width):
                    yield Action(stage, kind, m)

    order = []
    for rank in range(ranks):
        places = range(rank, stages, ranks)
        ahead = (local - 1) * width + 2 * (ranks - 1 - rank) + 1
        order.append(_alternate(
            list(passes(FORWARD, places)), list(passes(BACKWARD, places[::-1])), ahead
        ))  # fmt: skip
    return order


def in_flight_interleaved(rank: int, ranks: int, stages: int, microbatches: int) -> int:
    """How many (stage, microbatch) of a rank wait for their backward at most."""
    local = stages // ranks
    width = microbatches // max(1, microbatches // ranks)
    return min(local * microbatches, (local - 1) * width + 2 * (ranks - 1 - rank) + 1)


def _alternate(forward: list[Action], backward: list[Action], ahead: int) -> list[Action]:
    """`ahead` forward passes, then one backward and one forward in turn, then the rest."""
    ahead = min(ahead, len(forward))
    pairs = zip(backward, forward[ahead:], strict=False)
    steady = [action for pair in pairs for action in pair]
    return forward[:ahead] + steady + backward[len(forward) - ahead :]


def _one_each(ranks: int, stages: int) -> None:
    if ranks != stages:
        raise ValueError(
            f"this schedule has one stage on each rank, but there are {stages} stages on {ranks} "
            "ranks: give every rank of the group one, or use ScheduleInterleaved1F1B"
        )


def _several_each(ranks: int, stages: int) -> int:
    """How many stages each rank has."""
    if stages % ranks:
        raise ValueError(
            f"every rank has equally many stages: {stages} stages do not go on {ranks} ranks"
        )
    return stages // ranks


# --- judging an order ---


class Played(NamedTuple):
    """An order run with a clock, which starts at 0.

    began       when each action began.
    in_flight   for each rank, how many microbatches of its stages waited for backward at most.
    length      when the last action ended.
    bubble      the part of all ranks' time in which they computed nothing.
    """

    began: dict[Action, float]
    in_flight: list[int]
    length: float
    bubble: float


def needs(action: Action, stages: int) -> list[Action]:
    """What must have been computed before, here or elsewhere."""
    stage, kind, microbatch = action
    if kind == FORWARD:
        return [] if stage == 0 else [Action(stage - 1, FORWARD, microbatch)]
    behind = [] if stage == stages - 1 else [Action(stage + 1, BACKWARD, microbatch)]
    return [Action(stage, FORWARD, microbatch), *behind]


def play(
    order: Order, stages: int, microbatches: int,
    takes: Callable[[Action], float] = lambda action: 1.0,
) -> Played:  # fmt: skip
    """Run `order`, where an action lasts `takes(action)` and messages take no time.

    ValueError for an order that is not one: an action missing, twice or on the wrong rank,
    microbatches out of turn, or passes that wait for each other.
    """
    _check_complete(order, stages, microbatches)
    ended: dict[Action, float] = {}
    began: dict[Action, float] = {}
    free = [0.0] * len(order)
    at = [0] * len(order)
    while any(i < len(actions) for i, actions in zip(at, order, strict=True)):
        stuck = True
        for rank, actions in enumerate(order):
            while at[rank] < len(actions):
                action = actions[at[rank]]
                before = needs(action, stages)
                if not all(b in ended for b in before):
                    break
                began[action] = max([free[rank], *(ended[b] for b in before)])
                free[rank] = ended[action] = began[action] + takes(action)
                at[rank] += 1
                stuck = False
        if stuck:
            waiting = [str(a[i]) for a, i in zip(order, at, strict=True) if i < len(a)]
            raise ValueError(f"the order never ends: {', '.join(waiting)} wait for each other")
    length = max(free, default=0.0)
    busy = sum(takes(action) for action in ended)
    bubble = 1 - busy / (length * len(order)) if length else 0.0
    return Played(began, [_peak(actions) for actions in order], length, bubble)


def _check_complete(order: Order, stages: int, microbatches: int) -> None:
    found = Counter(action for actions in order for action in actions)
    kinds = FORWARD if all(a.kind == FORWARD for a in found) else FORWARD + BACKWARD
    wanted = {Action(s, k, m) for s in range(stages) for k in kinds for m in range(microbatches)}
    wrong = sorted(wanted ^ set(found)) + [a for a, times in found.items() if times > 1]
    if wrong:
        raise ValueError(f"missing, not wanted or twice: {', '.join(map(str, wrong))}")
    for rank, actions in enumerate(order):
        following: Counter[tuple[int, str]] = Counter()
        for stage, kind, microbatch in actions:
            if stage % len(order) != rank:
                raise ValueError(f"stage {stage} is on rank {rank}, not {stage % len(order)}")
            if microbatch != following[stage, kind]:
                raise ValueError(f"{stage}{kind}{microbatch} is out of turn")
            following[stage, kind] += 1


def _peak(actions: Sequence[Action]) -> int:
    peak = now = 0
    for action in actions:
        now += 1 if action.kind == FORWARD else -1
        peak = max(peak, now)
    return peak
