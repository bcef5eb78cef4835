"""The reducer: turns "this gradient is complete" into all-reduces that run beside backward.

Rules:
1. Buckets are reduced in index order on every rank, whatever order gradients come in.
2. A bucket is submitted as soon as it is full and all before it are; the group's thread reduces
   it while backward goes on.
3. At the end of the pass the rest is submitted, parameters without a gradient counting as absent,
   and all works are waited for in order. Nobody needs to say beforehand what is unused.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from dtrain.autograd import engine
from dtrain.comm.collectives import AllReduce
from dtrain.comm.reduce import ReduceOp
from dtrain.comm.work import Work
from dtrain.distributed.world import ProcessGroup
from dtrain.nn.parallel.buckets import Bucket, assign


class Reducer:
    """Keeps the gradients of `parameters` equal on all ranks of `group`: their mean.

    `sync` says whether the next backward pass reduces (see DDP.no_sync).
    """

    def __init__(self, parameters: Sequence[Any], group: ProcessGroup, cap: int | None) -> None:
        self.parameters = list(parameters)
        self.group = group
        self.sync = True
        self.buckets = [
            Bucket(i, members, self.parameters, group)
            for i, members in enumerate(assign(self.parameters, cap))
        ]
        self._running = False
        self._next = 0  # the first bucket not yet submitted
        self._works: list[tuple[Work, dict[int, np.ndarray | None]]] = []
        for bucket in self.buckets:
            for place, index in enumerate(bucket.members):
                self.parameters[index].register_post_accumulate_grad_hook(
                    partial(self._ready, bucket, place)
                )

    def prepare(self, sync: bool) -> None:
        """Before a forward pass: say whether the backward to come reduces.

        A pass that an exception cut short leaves nothing behind.
        """
        self.sync = sync
        if self._running:
            self._running = False
            for bucket in self.buckets:
                bucket.flags[...] = 0

    def _ready(self, bucket: Bucket, place: int, parameter: Any) -> None:
        """The hook of every parameter: its gradient of this pass is complete."""
        if not self.sync:
            bucket.keep(place, parameter)
            return
        if not self._running:
            self._start()
        bucket.add(place, parameter)
        if not bucket.pending:
            self._submit_full()

    def _start(self) -> None:
        self._running, self._next, self._works = True, 0, []
        for bucket in self.buckets:
            bucket.start()
        engine.queue_callback(self._finish)

    def _submit_full(self) -> None:
        while self._next < len(self.buckets) and not self.buckets[self._next].pending:
            self._submit(self.buckets[self._next], {})

    def _submit(self, bucket: Bucket, kept: dict[int, np.ndarray | None]) -> None:
        work = self.group.issue(AllReduce(bucket.buffer.array, ReduceOp.AVG), async_op=True)
        self._works.append((work, kept))
        self._next += 1

    def _finish(self) -> None:
        """The end of the pass: submit what is left, wait for all, in order."""
        for bucket in self.buckets[self._next :]:
            self._submit(bucket, bucket.fill_unused(self.parameters))
        self._running = False
        for bucket, (work, kept) in zip(self.buckets, self._works, strict=True):
            work.wait()
            bucket.finish(self.parameters, kept)
        self._works = []
