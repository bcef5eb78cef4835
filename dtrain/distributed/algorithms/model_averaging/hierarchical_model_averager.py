"""HierarchicalModelAverager: neighbours average often, everybody seldom.

Rules: at each step at most one level averages, that of the largest period which divides the step;
groups of a level are consecutive ranks, and the last level is the whole group.
Source: torch.distributed.algorithms.model_averaging.hierarchical_model_averager; Wang et al.,
Demystifying Why Local Aggregation Helps, AAAI 2022.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from dtrain.distributed.algorithms.model_averaging import averagers, utils
from dtrain.distributed.subgroups import new_subgroups
from dtrain.distributed.world import ProcessGroup


class HierarchicalModelAverager(averagers.ModelAverager):
    """`period_group_size_dict`: {period: group size}, both growing; the last size is the group's.

    The constructor makes the groups of all levels, so all ranks call it, and wait for each other.
    """

    def __init__(
        self,
        period_group_size_dict: Mapping[int, int] | None = None,
        warmup_steps: int = 0,
        process_group: Any = None,
    ) -> None:
        super().__init__(process_group)
        levels = check_levels(period_group_size_dict, self.process_group.size())
        self.warmup_steps = averagers.checked_warmup(warmup_steps)
        if max(levels) == 1:
            averagers.warn_of_no_period(
                "When the maximum period in arg ``period_group_size_dict`` is 1"
            )
        self.period_process_group_dict: dict[int, ProcessGroup] = {
            period: self._group_of(size) for period, size in levels.items()
        }

    def _group_of(self, size: int) -> Any:
        if size == self.process_group.size():
            return self.process_group
        return new_subgroups(size, group=self.process_group)[0]

    def _find_process_group(self) -> ProcessGroup | None:
        """The group that averages at this step, if any."""
        for period in reversed(self.period_process_group_dict):
            if self.step % period == 0:
                return self.period_process_group_dict[period]
        return None

    def average_parameters(self, params: Iterable[Any]) -> None:
        group = self._find_process_group() if self.step >= self.warmup_steps else None
        if group is not None:
            utils.average_parameters_or_parameter_groups(params, group)
        self.step += 1


def check_levels(given: Mapping[int, int] | None, size: int) -> dict[int, int]:
    """{period: group size} as given; ValueError unless it is a hierarchy over `size` ranks."""
    if not given:
        raise ValueError("Arg ``period_group_size_dict`` must not be empty.")
    periods, sizes = list(given), list(given.values())
    if periods[0] <= 0:
        raise ValueError(
            "The minimum period in arg ``period_group_size_dict`` must be a positive value."
        )
    if periods != sorted(periods) or sizes != sorted(sizes):
        raise ValueError(
            "Periods and group sizes in arg ``period_group_size_dict`` must grow together, got "
            f"{dict(given)}"
        )
    if sizes[-1] != size:
        raise ValueError(
            f"The last value in arg ``period_group_size_dict`` {sizes[-1]} must be equal to the "
            f"size of arg ``process_group`` {size}."
        )
    return dict(given)
