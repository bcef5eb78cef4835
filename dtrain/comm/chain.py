"""Sums over several hosts, as a chain: each host adds its ranks to what the hosts before it have.

Owns: `reduce_rows`, the large all_reduce and reduce_scatter of `island_algorithms`. The columns of
what is to be added are divided among as many lanes as every host has ranks to carry them; rank i of
each host carries lane i. A lane goes in rounds, each of as many columns as fit into the memory that
the ranks of a host share. In a round the ranks of a host show their contributions (arrays that all
live in that memory are read where they are); the carrier adds them, in rank order, to the partial
sum of the host before, and sends that on; the last host has the sum, and it flows back: each host
keeps the rows that it wants and sends on those that are wanted further back.

A rank takes the result of a round into its array when all of its host have added that round: nobody
reads there any more, also where input and result are the same memory.

[Note: rounds in flight] Host h does round t of the way up and round t - delay(h) of the way back
at the same time, so that both directions of a link are busy. The delay grows by `_AHEAD` from each
host to the one before it: so many rounds are on the way between two hosts. Who adds round t has got
the sum of round t - delay - 1, so what comes in early is bounded.

Bytes on the link between host h and h+1, for rows x columns elements: up, all of them as they are
accumulated (float16 and bfloat16 in float32); back, the rows that hosts 0..h want: all_reduce has
one row, which all want; reduce_scatter has one row per rank, wanted where the rank is. Messages:
one per lane, round and direction.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dtrain.comm.channel import Channel
from dtrain.comm.parts import slices
from dtrain.comm.reduce import ReduceOp, finish, fold, widened
from dtrain.comm.transports.mailbox import Array, Receive
from dtrain.comm.transports.window import HALF, NOWHERE

__all__ = ["reduce_rows"]

# Rounds in flight between two hosts: one is sent, one is added, one is waited for, one to spare.
_AHEAD = 4


class _Plan:
    """What all ranks of the group derive alike: lanes, rounds, who wants which rows.

    `wanted[h]`: the rows that host h keeps; those of hosts 0..h are the first `wanted[h].stop`.
    """

    def __init__(self, channel: Channel, rows: Array, shared: bool) -> None:
        assert channel.island is not None
        hosts = channel.island.placement.hosts
        self.height, width = rows.shape
        room = HALF // rows.itemsize
        # So many that a round of each has at least two columns.
        self.lanes = slices(width, min(*map(len, hosts), room // (2 * self.height)))
        self.wanted = [slice(0, 1) if shared else slice(h[0], h[-1] + 1) for h in hosts]
        kept = max(w.stop - w.start for w in self.wanted)
        # The half of each rank holds its contributions to a round of all lanes, and the result of
        # a round of its own lane.
        self.step = room // (self.height * len(self.lanes) + kept)
        assert self.step > 0
        self.rounds = -(-(self.lanes[0].stop) // self.step)

    def columns(self, lane: int, t: int) -> slice:
        """The columns of round t; none when another lane is longer."""
        start, stop = self.lanes[lane].start + t * self.step, self.lanes[lane].stop
        return slice(min(start, stop), min(start + self.step, stop))


def reduce_rows(channel: Channel, rows: Array, out: Array, op: ReduceOp, *, shared: bool) -> None:
    """Add `rows`, of shape (height, width), over all ranks.

    `shared`: there is one row, and its sum is left in `out` everywhere; else there is one row per
    rank, and the sum of that one is left in `out`.
    """
    plan = _Plan(channel, rows, shared)
    _Host(channel, plan, rows, out, op, 0 if shared else channel.rank).run()


class _Host:
    """One rank's part among those of its host: what it shows, adds and takes."""

    def __init__(
        self, channel: Channel, plan: _Plan, rows: Array, out: Array, op: ReduceOp, row: int
    ) -> None:
        assert channel.island is not None
        self._channel, self._plan = channel, plan
        self._island, self._window = channel.island, channel.island.window
        self._rows, self._out = rows, out
        self._here = self._island.here
        self._row = row - plan.wanted[self._here].start  # of the result, among those kept here
        self._arrays = self._meet()
        place = self._window.rank
        carries = place < len(plan.lanes)
        self._carrier = _Carrier(channel, plan, op, place, rows.dtype) if carries else None

    def _meet(self) -> list[Array] | None:
        """The arrays of this host's ranks, when all of them live in its memory."""
        self._channel.meet(self._window.place_of(self._rows))
        places = self._window.places()
        if NOWHERE in places:
            return None
        arrays = [self._window.at(r, place, self._rows) for r, place in enumerate(places)]
        return [array.reshape(self._rows.shape) for array in arrays]

    def run(self) -> None:
        plan, channel = self._plan, self._channel
        after = len(plan.wanted) - 1 - self._here
        delay = min(_AHEAD * after, plan.rounds - 1)
        halves: list[Array] = []
        for t in range(plan.rounds + delay + 1):
            back = t - delay
            if self._arrays is None or back > 0:
                halves = [half.view(self._rows.dtype) for half in self._window.next_half()]
                self._show(halves[self._window.rank], t, back - 1)
                channel.phase()
                if back > 0:
                    self._take(halves, back - 1)
            if self._carrier is not None:
                if t < plan.rounds:
                    self._carrier.up(t, self._contributions(halves, self._carrier.lane, t))
                if 0 <= back < plan.rounds:
                    self._carrier.back(back)
        channel.all_have_come()

    def _contributions(self, halves: list[Array], lane: int, t: int) -> list[Array]:
        """What all ranks of this host contribute to round t of `lane`."""
        if self._arrays is not None:
            return [array[:, self._plan.columns(lane, t)] for array in self._arrays]
        return [self._block(half, lane, t) for half in halves]

    def _block(self, half: Array, lane: int, t: int) -> Array:
        """Where a rank shows its contribution to round t of `lane`."""
        plan, cut = self._plan, self._plan.columns(lane, t)
        return _shaped(half, lane * plan.height * plan.step, plan.height, cut.stop - cut.start)

    def _result(self, half: Array, lane: int, t: int) -> Array:
        """Where the carrier of `lane` shows the rows of round t that this host keeps."""
        plan, cut = self._plan, self._plan.columns(lane, t)
        kept = plan.wanted[self._here]
        start = len(plan.lanes) * plan.height * plan.step
        return _shaped(half, start, kept.stop - kept.start, cut.stop - cut.start)

    def _show(self, half: Array, t: int, back: int) -> None:
        """Show what this rank contributes to round t, and the result of round `back`."""
        if self._arrays is None and t < self._plan.rounds:
            for lane in range(len(self._plan.lanes)):
                block = self._block(half, lane, t)
                np.copyto(block, self._rows[:, self._plan.columns(lane, t)])
        if back >= 0 and self._carrier is not None:
            np.copyto(self._result(half, self._carrier.lane, back), self._carrier.keep(back))

    def _take(self, halves: list[Array], back: int) -> None:
        for lane in range(len(self._plan.lanes)):
            result = self._result(halves[lane], lane, back)
            np.copyto(self._out[self._plan.columns(lane, back)], result[self._row])


def _shaped(half: Array, start: int, height: int, width: int) -> Array:
    return half[start : start + height * width].reshape(height, width)


class _Carrier:
    """The link of one lane on one host: what comes from the hosts before and after, and goes on."""

    def __init__(
        self, channel: Channel, plan: _Plan, op: ReduceOp, lane: int, dtype: np.dtype[Any]
    ) -> None:
        assert channel.island is not None
        hosts, here = channel.island.placement.hosts, channel.island.here
        self.lane = lane
        self._channel, self._plan, self._op = channel, plan, op
        self._dtype, self._wide = dtype, widened(dtype)
        self._kept = plan.wanted[here]
        self._before = hosts[here - 1][lane] if here else None
        self._after = hosts[here + 1][lane] if here + 1 < len(hosts) else None
        self._wanted_before = plan.wanted[here - 1].stop if here else 0
        self._partial: dict[int, tuple[Array, Receive]] = {}  # {round: sum of the hosts before}
        self._result: dict[int, tuple[Array, Receive | None]] = {}  # {round: what flows back}
        for t in range(min(_AHEAD + 1, plan.rounds)):
            self._expect(t)

    def _expect(self, t: int) -> None:
        if self._before is not None and t < self._plan.rounds:
            cut = self._plan.columns(self.lane, t)
            room = np.empty((self._plan.height, cut.stop - cut.start), self._wide)
            self._partial[t] = room, self._channel.post(self._before, room)

    def up(self, t: int, contributions: list[Array]) -> None:
        """Add this host's contributions to round t, and send the sum on."""
        total = np.empty(contributions[0].shape, self._wide)
        fold(self._op, self._sum_before(t), contributions, total)
        self._expect(t + _AHEAD + 1)
        if self._after is None:
            result = finish(self._op, total, self._channel.size, self._dtype)
            self._result[t] = result, None
        else:
            result = np.empty((self._kept.stop, total.shape[1]), self._dtype)
            self._result[t] = result, self._channel.post(self._after, result)
            self._channel.send(self._after, total)

    def _sum_before(self, t: int) -> Array | None:
        if self._before is None:
            return None
        room, receive = self._partial.pop(t)
        self._channel.wait(receive)
        return room

    def back(self, t: int) -> None:
        """Have the result of round t, and send on what the hosts before want of it."""
        result, receive = self._result[t]
        if receive is not None:
            self._channel.wait(receive)
        if self._before is not None:
            self._channel.send(self._before, result[: self._wanted_before])

    def keep(self, t: int) -> Array:
        """The rows of round t's result that stay here."""
        return self._result.pop(t)[0][self._kept]
