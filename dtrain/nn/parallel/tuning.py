"""`bucket_cap_mb="auto"`: sizes of buckets tried while training goes on, and the fastest kept.

Rules: 1. The default sizes are tried first, then halves of the gradients' bytes down to `SMALLEST`;
what arranges the buckets alike is tried once. 2. An arrangement runs for `PASSES` passes that
reduce; the first of them, which touches new memory, is not counted, and of the others the median
time of backward, waiting included, counts, on the slowest rank. 3. One all-reduce of one number
for each arrangement decides, the same on all ranks; nothing else is sent. The default stays
unless another is faster by `GAIN`. After that nothing changes any more. 4. Sums are elementwise:
trying changes no bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

import numpy as np

from dtrain.comm.collectives import AllReduce
from dtrain.comm.reduce import ReduceOp
from dtrain.distributed.world import ProcessGroup
from dtrain.logs import get_logger
from dtrain.nn.parallel.buckets import DEFAULT_CAPS, MIB

PASSES = 5
SMALLEST = MIB // 4
GAIN = 0.1  # medians of four passes on a busy host differ by this much

Members = list[list[int]]


class Tuner:
    """Which of several arrangements of the buckets is tried now, and which was the fastest.

    `members_of(caps)`: the buckets with these sizes; `total`: bytes of all gradients.
    """

    def __init__(self, members_of: Callable[[Sequence[int]], Members], total: int) -> None:
        found: dict[str, tuple[Sequence[int], Members]] = {}
        for caps in [DEFAULT_CAPS, *((cap,) for cap in _halves(total))]:
            members = members_of(caps)
            found.setdefault(str(members), (caps, members))
        self.tried = list(found.values())
        self.now = 0
        self.frozen = len(self.tried) == 1
        self._seconds: list[list[float]] = [[] for _ in self.tried]

    def add(self, seconds: float) -> None:
        """A pass that reduced took so long from its first gradient to its end."""
        if not self.frozen:
            self._seconds[self.now].append(seconds)

    def advance(self, group: ProcessGroup) -> bool:
        """Before a pass: go on to another arrangement when it is time; whether it has.

        Every rank of `group` calls this before the same pass. At the last one it waits for all.
        """
        if self.frozen or len(self._seconds[self.now]) < PASSES:
            return False
        before = self.now
        if self.now + 1 < len(self.tried):
            self.now += 1
        else:
            self._freeze(group)
        return self.now != before

    def _freeze(self, group: ProcessGroup) -> None:
        self.times = np.array([median(seconds[1:]) for seconds in self._seconds])
        group.issue(AllReduce(self.times, ReduceOp.MAX))
        self.now, self.frozen = fastest(self.times), True
        get_logger("dtrain.nn.parallel").info("bucket_cap_mb='auto': %s", self.words())

    def words(self) -> str:
        """What was tried and chosen, or what is being tried."""
        if not self.frozen:
            return f"trying arrangement {self.now + 1} of {len(self.tried)}"
        if len(self.tried) == 1:
            return "all sizes arrange these gradients alike"
        tried = ", ".join(
            f"{len(members)}: {seconds * 1e3:.2f} ms"
            for (_, members), seconds in zip(self.tried, self.times, strict=True)
        )
        chosen = len(self.tried[self.now][1])
        return f"chosen number of buckets {chosen} (backward on the slowest rank with {tried})"


def fastest(times: np.ndarray) -> int:
    """The number of the shortest time; 0 unless that is shorter by `GAIN`."""
    best = int(times.argmin())
    return best if times[best] < (1 - GAIN) * times[0] else 0


def _halves(total: int) -> list[int]:
    """All in one bucket, then half of that, down to `SMALLEST`."""
    sizes = [total + 1]
    while sizes[-1] // 2 >= SMALLEST:
        sizes.append(sizes[-1] // 2)
    return sizes
