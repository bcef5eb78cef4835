"""Ranks with different numbers of inputs: `with Join([model, optimizer]): for batch in loader: ...`

A rank that is through leaves the loop and, at the end of the block, makes the calls of the others
for them (`JoinHook.main_hook`) until all are through.
Rules: 1. Before its calls of an iteration, the first joinable votes: one all-reduce of N flags, in
which every rank says at its own place whether it is still active. It is the only call that `Join`
makes itself; active ranks do not wait for it, unless they are to throw.
2. A joinable whose block has ended, or raised, votes no more.
Source: torch.distributed.algorithms.join.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from dtrain.autograd.node import make
from dtrain.device import device
from dtrain.distributed.collectives import all_reduce
from dtrain.distributed.work import Work
from dtrain.distributed.world import ProcessGroup, resolve

WARN_THRESHOLD = 1000  # iterations that others are ahead; torch's number


class JoinHook:
    """What a joinable does on a rank that has no more inputs; both do nothing by default."""

    def main_hook(self) -> None:
        """Make the calls of one iteration, contributing nothing. Called while a rank is active."""

    def post_hook(self, is_last_joiner: bool) -> None:
        """Called once, when all have joined; True on those whose last iteration was the last."""


class _JoinConfig(NamedTuple):
    """What the block that a joinable is in asks of it."""

    enable: bool
    throw_on_early_termination: bool
    is_first_joinable: bool


_OUTSIDE = _JoinConfig(False, False, False)


class Joinable(ABC):
    """Base of what can be given to `Join`.

    A subclass calls this constructor, and `Join.notify_join_context(self)` before its own calls of
    an iteration.
    """

    @abstractmethod
    def __init__(self) -> None:
        super().__init__()
        self._join_config = _OUTSIDE

    @abstractmethod
    def join_hook(self, **kwargs: Any) -> JoinHook:
        """A hook for one block; `kwargs` are those of `Join`, for all its joinables."""

    @property
    @abstractmethod
    def join_device(self) -> device:
        """Where tensors of its calls are: the one device."""

    @property
    @abstractmethod
    def join_process_group(self) -> Any:
        """The group of its calls, the same for all joinables of a block."""


class Join:
    """A block in which ranks may run out of inputs at different times.

    joinables   whose hooks are called, in this order; every rank gives the same.
    enable      False: the block does nothing; inputs are known to be even.
    throw_on_early_termination   instead of shadowing, raise RuntimeError on all ranks as soon as
                one has ended, naming it. Every iteration then waits for the vote.
    kwargs      for every `join_hook`.

    The end of the block waits until all ranks have come to it; each wait is bounded by the group's
    timeout.
    """

    def __init__(
        self,
        joinables: Sequence[Joinable],
        enable: bool = True,
        throw_on_early_termination: bool = False,
        **kwargs: Any,
    ) -> None:
        if len(joinables) == 0:
            raise ValueError("The join context manager requires at least one joinable")
        self._joinables = list(joinables)
        self._hooks = [joinable.join_hook(**kwargs) for joinable in joinables]
        self._enable, self._throw = enable, throw_on_early_termination
        groups = [resolve(joinable.join_process_group) for joinable in joinables]
        if any(group is not groups[0] for group in groups):
            given = zip(joinables, groups, strict=True)
            raise ValueError(
                "Using join context manager with multiple process groups: "
                + ", ".join(f"{type(j).__name__} has {group}" for j, group in given)
            )
        self._group = groups[0]

    def __enter__(self) -> None:
        for i, joinable in enumerate(self._joinables):
            joinable._join_config = _JoinConfig(self._enable, self._throw, i == 0)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for joinable in self._joinables:
            joinable._join_config = _OUTSIDE
        if self._enable and error is None:
            self._shadow_the_others()

    def _shadow_the_others(self) -> None:
        iterations = 0
        while len(active := self._who_is_active()):
            if self._throw:
                raise RuntimeError(
                    f"Rank {self._own_rank()} exhausted all inputs. Still active: {_names(active)}"
                )
            if iterations == WARN_THRESHOLD:
                self._warn_of_skew()
            for hook in self._hooks:
                hook.main_hook()
            iterations += 1
        for hook in self._hooks:
            hook.post_hook(iterations == 0)

    def _who_is_active(self) -> list[int]:
        """The global ranks that have not joined; waits for each rank's vote."""
        votes = vote(self._group, False)
        votes.wait()
        return ranks_where(votes, True, self._group)

    def _own_rank(self) -> int:
        return self._group.ranks[self._group.rank()]

    def _warn_of_skew(self) -> None:
        warnings.warn(
            f"Detected uneven input skew of greater than {WARN_THRESHOLD}. This means that rank "
            f"{self._own_rank()} has at least {WARN_THRESHOLD} fewer inputs than other "
            "currently-active ranks. This level of skew could lead to performance degradation "
            "during training.",
            stacklevel=4,
        )

    @staticmethod
    def notify_join_context(joinable: Joinable) -> Work | None:
        """Say that this rank begins an iteration; returns the vote under way.

        `result()[0]` of it has a 1 for each group rank that is active. None outside of a block, in
        one that is not enabled, and for all joinables but the first. With
        `throw_on_early_termination` waits, and raises RuntimeError when a rank has ended.
        """
        config = getattr(joinable, "_join_config", None)
        if config is None:
            raise AssertionError(
                f"Check that the {type(joinable)} constructor calls the ``Joinable`` constructor"
            )
        if not config.enable or not config.is_first_joinable:
            return None
        group = resolve(joinable.join_process_group)
        votes = vote(group, True)
        if config.throw_on_early_termination and (ended := ranks_where(votes, False, group)):
            raise RuntimeError(
                "Detected at least one rank that exhausted inputs. Throwing across all ranks. "
                f"Exhausted: {_names(ended)}"
            )
        return votes


def vote(group: ProcessGroup, active: bool) -> Work:
    """Begin the all-reduce in which every rank tells whether it is active."""
    flags = np.zeros(group.size(), np.int64)
    flags[group.rank()] = active
    work = all_reduce(make(flags), group=group, async_op=True)
    assert work is not None
    return work


def ranks_where(votes: Work, active: bool, group: ProcessGroup) -> list[int]:
    """The global ranks whose vote was `active`; waits."""
    flags = votes.result()[0].tolist()
    return [rank for rank, flag in zip(group.ranks, flags, strict=True) if bool(flag) is active]


def _names(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
