"""DDP where ranks have different numbers of inputs: what `with model.join():` makes them do.

Rules: 1. In the block every forward pass begins with one small all-reduce, the agreement: who is
active, and which calls the pass will make. Ranks that are through make the same calls, with zeros.
2. Buffers come from the first active rank, and at the end parameters and buffers from the first
rank whose last pass was the last of all.
3. After a pass, a rank that is through has the gradients that the active ranks have.
Source: torch.nn.parallel.distributed, DistributedDataParallel.join.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dtrain.comm.collectives import AllReduce
from dtrain.device import device
from dtrain.distributed.algorithms.join import Join, Joinable, JoinHook, ranks_where, vote
from dtrain.distributed.world import ProcessGroup

if TYPE_CHECKING:
    from dtrain.nn.parallel.distributed import DistributedDataParallel


class Agreement(NamedTuple):
    """What the active ranks are about to do in one pass.

    active    how many there are, the first of which is group rank `source`.
    prepares, copies, reduces, weighs   whether there are the calls of `Reducer.prepare`, a
              broadcast of buffers, reductions in backward, and the sum of the losses' weights.
    """

    active: int
    source: int
    prepares: bool
    copies: bool
    reduces: bool
    weighs: bool


def agree(group: ProcessGroup, calls: tuple[bool, ...] | None) -> Agreement:
    """Tell the others one's `calls` (None: one is through) and hear theirs; waits for all."""
    active, source, done = heard(group, calls, 4)
    return Agreement(active, source, *done)


def heard(
    group: ProcessGroup, calls: tuple[bool, ...] | None, count: int
) -> tuple[int, int, list[bool]]:
    """How many ranks are active, the first of them, and which of `count` calls any of them makes.

    `calls` are this rank's; None: it is through. One small all-reduce.
    """
    words = np.zeros(group.size() + count, np.int64)
    if calls is not None:
        words[group.rank()] = 1
        words[group.size() :] = calls
    group.issue(AllReduce(words))
    flags = words[: group.size()]
    return int(flags.sum()), int(flags.argmax()), (words[group.size() :] > 0).tolist()


class JoiningModel(Joinable):
    """The part of DistributedDataParallel that `Join` needs."""

    _divides_by_all = True  # what the last `join_hook` was told

    def join(
        self: Any,
        divide_by_initial_world_size: bool = True,
        enable: bool = True,
        throw_on_early_termination: bool = False,
        *,
        step: Callable[[], Any] | None = None,
    ) -> Join:
        """A block in which ranks may run out of batches at different times, around the loop.

        divide_by_initial_world_size   False: gradients are divided by the number of ranks that
                    are still active, instead of all.
        enable      False: nothing is done; the inputs are known to be even.
        throw_on_early_termination   RuntimeError on all ranks when one has ended, naming it. To be
                    used if the model itself communicates (SyncBatchNorm).
        step        what a rank that is through calls after each pass that reduced, such as
                    `optimizer.step`: its gradients are those of the active ranks then, so that
                    optimizers stay equal too. Without it the state of its optimizer lags behind
                    (as in PyTorch): only the model is copied at the end. Not in torch.

        A forward pass in the block is followed by one backward pass, or none under no_grad.
        """
        return Join(
            [self],
            enable,
            throw_on_early_termination,
            divide_by_initial_world_size=divide_by_initial_world_size,
            step=step,
        )

    def join_hook(self: Any, **kwargs: Any) -> JoinHook:
        """For `Join`; it knows `divide_by_initial_world_size` and `step`."""
        self._divides_by_all = kwargs.get("divide_by_initial_world_size", True)
        return Shadow(self, kwargs.get("step"))

    @property
    def join_device(self) -> device:
        return device("cpu")

    @property
    def join_process_group(self: Any) -> ProcessGroup:
        return self.process_group  # type: ignore[no-any-return]

    def _begin_pass(self: Any, calls: tuple[bool, ...]) -> int:
        """Before anything of a forward pass: the group rank from which buffers come."""
        self.reducer.divide_by = None
        if not self._join_config.enable:
            return 0
        Join.notify_join_context(self)
        agreement = agree(self.process_group, calls)
        if not self._divides_by_all:
            self.reducer.divide_by = agreement.active
        return agreement.source


class Shadow(JoinHook):
    """Makes the calls of the active ranks' passes on a rank that is through."""

    def __init__(self, model: DistributedDataParallel, step: Callable[[], Any] | None) -> None:
        self.model = model
        self.step = step

    def main_hook(self) -> None:
        model, reducer = self.model, self.model.reducer
        agreement = agree(model.process_group, None)
        reducer.divide_by = None if model._divides_by_all else agreement.active
        if agreement.prepares:
            reducer.prepare_shadow()
        if agreement.copies:
            model._copy_buffers(agreement.source)
        if agreement.reduces:
            reducer.shadow(agreement.weighs)
            if self.step is not None:
                self.step()

    def post_hook(self, is_last_joiner: bool) -> None:
        model = self.model
        last = ranks_where(vote(model.process_group, is_last_joiner), True, model.process_group)
        source = model.process_group.group_rank_of(last[0])
        model._copy_parameters(source)
        model._copy_buffers(source)
        model.reducer.divide_by = None
