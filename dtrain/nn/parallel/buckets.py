"""Buckets: which gradients travel together, and the flat array they live in.

Parameters are taken in reverse order of registration, about the order in which backward finishes
them, or in the order in which a backward pass has finished them; a bucket is closed when it reaches
its cap, and holds one dtype. Parameters are never split.
Source: Li et al., PyTorch Distributed, VLDB 2020, section 4.2.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from dtrain.autograd.node import make
from dtrain.distributed.grad_bucket import GradBucket
from dtrain.distributed.world import ProcessGroup
from dtrain.flat import FlatBuffer

MIB = 1 << 20
FIRST_CAP = 1 * MIB  # small, so that the first all-reduce starts early in backward
DEFAULT_CAP = 25 * MIB
DEFAULT_CAPS = (FIRST_CAP, DEFAULT_CAP)
WHOLE = (sys.maxsize,)  # all in one, for each dtype

# The last bucket has nothing to hide behind. Over a network it is a small part of the whole, but
# not below 2 MiB, 1.7 ms of 10 Gbit/s: a call takes 0.2 ms and more there whatever its size.
SHARES, LEAST_CAP = 16, 2 * MIB

# What one rank has in a bucket's tail for the fingerprint of its parameters.
WORDS = 3


def assign(parameters: Sequence[Any], caps: Sequence[int], order: Sequence[int]) -> list[list[int]]:
    """Indices of `parameters` for each bucket, in the order in which buckets are reduced.

    `caps[i]` is the size in bytes at which bucket i is closed, the last one for all that follow;
    `order` that in which parameters are taken.
    """
    buckets: list[list[int]] = []
    numbers: dict[np.dtype[Any], int] = {}  # {dtype: its open bucket}
    sizes: list[int] = []
    for index in order:
        data = parameters[index]._data
        number = numbers.get(data.dtype)
        if number is None:
            number = numbers[data.dtype] = len(buckets)
            buckets.append([])
            sizes.append(0)
        buckets[number].append(index)
        sizes[number] += data.nbytes
        if sizes[number] >= caps[min(number, len(caps) - 1)]:
            del numbers[data.dtype]
    return buckets


def caps_for_messages(total: int) -> tuple[int, int]:
    """Sizes for `total` bytes of gradients that travel in messages.

    The last of 16 buckets is exposed for a sixteenth of the time that all of them take. GPT's 42
    MiB over 1 Gbit/s: 31 ms after backward, with `DEFAULT_CAPS` 220.
    """
    return FIRST_CAP, min(DEFAULT_CAP, max(LEAST_CAP, total // SHARES))


class Bucket:
    """Gradients of some parameters in one flat array, and behind them what else must travel.

    `views[i]` is the gradient of `members[i]`. `flags[i]` says that its parameter was used since
    the last reduction, without one too (no_sync): after the reduction, above 0 means that some rank
    used it. `words[r]` are for the fingerprint of rank r's parameters.
    """

    def __init__(
        self, index: int, members: Sequence[int], parameters: Sequence[Any], group: ProcessGroup
    ) -> None:
        self.index = index
        self.members = tuple(members)
        arrays = [parameters[i]._data for i in members]
        shapes = [a.shape for a in arrays]
        tails = [(len(shapes),), (group.size(), WORDS)]
        self.buffer = FlatBuffer([*shapes, *tails], arrays[0].dtype, allocate=group.arrays.empty)
        *views, self.flags, self.words = self.buffer.views
        cut = self.buffer.offsets[len(shapes)]
        self.gradients, self.tail = self.buffer.array[:cut], self.buffer.array[cut:]
        self.views = [make(view) for view in views]
        self.tail[...] = 0
        self.start()

    def as_grad_bucket(self, parameters: Sequence[Any], last: bool) -> GradBucket:
        """What a communication hook is given."""
        own = [parameters[i] for i in self.members]
        return GradBucket(self.index, make(self.gradients), self.views, own, last)

    def settle(self, parameters: Sequence[Any]) -> None:
        """Let the gradients of the members live here, with what they have now."""
        for place, member in enumerate(self.members):
            parameter = parameters[member]
            parameter._home = self.views[place]
            if parameter._grad is not None:
                self._adopt(place, parameter)

    def start(self) -> None:
        """Begin a backward pass that reduces: nothing of it is here yet."""
        self.pending = len(self.members)

    def add(self, place: int, parameter: Any) -> None:
        """The gradient of member `place` is complete for this pass."""
        self.keep(place, parameter)
        self.pending -= 1

    def keep(self, place: int, parameter: Any) -> None:
        """Make a gradient live here and count its parameter as used until the next reduction."""
        self._adopt(place, parameter)
        self.flags[place] = 1

    def _adopt(self, place: int, parameter: Any) -> None:
        view = self.views[place]
        if parameter._grad is not view:
            np.copyto(view._data, parameter._grad._data)
            parameter._grad = view

    def fill_unused(self, parameters: Sequence[Any]) -> dict[int, np.ndarray | None]:
        """Contribute nothing for parameters not used here; returns what they had, to be put back.

        A parameter nobody used keeps the gradient it had before. One that others used gets theirs,
        on top of what it had.
        """
        kept: dict[int, np.ndarray | None] = {}
        for place, member in enumerate(self.members):
            parameter, view = parameters[member], self.views[place]
            if parameter._grad is None:  # also when it was used and then set to None
                self.flags[place] = 0
                view._data[...] = 0
                kept[place] = None
            elif self.flags[place] == 0:
                self._adopt(place, parameter)
                kept[place] = view._data.copy()
        return kept

    def finish(self, parameters: Sequence[Any], kept: dict[int, np.ndarray | None]) -> None:
        """After the reduction: gradients are in place; undo it for parameters that nobody used."""
        for place, before in kept.items():
            parameter, view = parameters[self.members[place]], self.views[place]
            if self.flags[place] > 0:
                parameter._grad = view
            elif before is not None:
                view._data[...] = before
        for view in self.views:
            view._bump_version()
        self.tail[...] = 0
