"""When to average a model: `ModelAverager`, and the periodic one.

Rules: `average_parameters` is called after every optimizer step, on all ranks; `step` counts the
calls, and belongs into checkpoints (PostLocalSGDOptimizer puts it there).
Source: torch.distributed.algorithms.model_averaging.averagers.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

from dtrain.distributed.algorithms.model_averaging import utils
from dtrain.distributed.world import resolve


class ModelAverager(ABC):
    """Base of averagers. `process_group` None is the default group."""

    def __init__(self, process_group: Any = None) -> None:
        self.process_group = resolve(process_group)
        self.step = 0

    @abstractmethod
    def average_parameters(self, params: Iterable[Any]) -> None:
        """Count a step and, when it is time, average; `params` as `model.parameters()` or groups.

        Blocks for the other ranks when it averages.
        """


class PeriodicModelAverager(ModelAverager):
    """Local SGD: averages at steps `warmup_steps`, `warmup_steps + period`, ... (from 0).

    Source: Lin et al., Don't Use Large Mini-Batches, Use Local SGD, ICLR 2020.
    """

    def __init__(self, period: int, warmup_steps: int = 0, process_group: Any = None) -> None:
        super().__init__(process_group)
        self.warmup_steps = checked_warmup(warmup_steps)
        if period < 1:
            raise ValueError("Arg ``period`` must be a positive value.")
        if period == 1:
            warn_of_no_period("When period is 1")
        self.period = period

    def average_parameters(self, params: Iterable[Any]) -> None:
        beyond = self.step - self.warmup_steps
        if beyond >= 0 and beyond % self.period == 0:
            utils.average_parameters_or_parameter_groups(params, self.process_group)
        self.step += 1


def checked_warmup(steps: int) -> int:
    """`steps`; ValueError when negative."""
    if steps < 0:
        raise ValueError("Arg ``warmup_steps`` must be a non-negative number.")
    return steps


def warn_of_no_period(when: str) -> None:
    """torch's warning for averaging after every step; said of the caller's caller's line."""
    warnings.warn(
        f"{when}, no need to use model averaging because the communication cost of all-reducing "
        "parameters will be no less than the cost of all-reducing gradients by "
        "DistributedDataParallel in the backward pass. Therefore, only DistributedDataParallel "
        "should be used for this case.",
        stacklevel=3,
    )
