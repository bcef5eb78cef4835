"""OneCycleLR: one rise and one fall of the rate over a whole training, momentum the other way.

Source: torch.optim.lr_scheduler.OneCycleLR, where it lives for users; Smith and Topin,
arXiv:1708.07120.
"""

from __future__ import annotations

from itertools import pairwise
from math import cos, pi
from typing import Any

from dtrain.optim.optimizer import Group, Optimizer
from dtrain.optim.schedule import LRScheduler, one_per_group, require_optimizer


class OneCycleLR(LRScheduler):
    """From `max_lr / div_factor` up to `max_lr` in `pct_start` of the steps, then down.

    The end is the start over `final_div_factor`. `three_phase` comes down to the start first, as
    fast as it rose. With `cycle_momentum`, `momentum` (or beta1) goes from `max_momentum` to
    `base_momentum` and back. `step()` is called after each batch; ValueError beyond `total_steps`
    (or `epochs * steps_per_epoch`).
    """

    def __init__(
        self,
        optimizer: Optimizer,
        max_lr: Any,
        total_steps: int | None = None,
        epochs: int | None = None,
        steps_per_epoch: int | None = None,
        pct_start: float = 0.3,
        anneal_strategy: str = "cos",
        cycle_momentum: bool = True,
        base_momentum: Any = 0.85,
        max_momentum: Any = 0.95,
        div_factor: float = 25.0,
        final_div_factor: float = 1e4,
        three_phase: bool = False,
        last_epoch: int = -1,
    ) -> None:
        self.optimizer = require_optimizer(optimizer)
        self.total_steps = _total(total_steps, epochs, steps_per_epoch)
        if not isinstance(pct_start, float) or not 0 <= pct_start <= 1:
            raise ValueError(f"Expected float between 0 and 1 pct_start, but got {pct_start}")
        if anneal_strategy not in ("cos", "linear"):
            raise ValueError(
                f"anneal_strategy must be one of 'cos' or 'linear', instead got {anneal_strategy}"
            )
        self._schedule_phases = _phases(pct_start, self.total_steps, three_phase)
        self._anneal_func_type = anneal_strategy
        self.cycle_momentum = cycle_momentum
        highest = one_per_group("max_lr", optimizer, max_lr)
        if last_epoch == -1:
            for group, high in zip(optimizer.param_groups, highest, strict=True):
                start = high / div_factor
                group.update(initial_lr=start, max_lr=high, min_lr=start / final_div_factor)
        if cycle_momentum:
            self._start_momentum(max_momentum, base_momentum, last_epoch)
        super().__init__(optimizer, last_epoch)

    def _start_momentum(self, max_momentum: Any, base_momentum: Any, last_epoch: int) -> None:
        optimizer = self.optimizer
        if not {"momentum", "betas"} & optimizer.defaults.keys():
            raise ValueError(
                "optimizer must support momentum or beta1 with `cycle_momentum` option enabled"
            )
        self.use_beta1 = "betas" in optimizer.defaults
        highest = one_per_group("max_momentum", optimizer, max_momentum)
        lowest = one_per_group("base_momentum", optimizer, base_momentum)
        if last_epoch == -1:
            for group, high, low in zip(optimizer.param_groups, highest, lowest, strict=True):
                self._set_momentum(group, high)
                group.update(max_momentum=high, base_momentum=low)

    def _set_momentum(self, group: Group, value: float) -> None:
        if self.use_beta1:
            group["betas"] = (value, *group["betas"][1:])
        else:
            group["momentum"] = value

    def get_lr(self) -> list[float]:
        self._warn_outside_step()
        if self.last_epoch > self.total_steps:
            raise ValueError(
                f"Tried to step {self.last_epoch} times. The specified number of total steps is "
                f"{self.total_steps}"
            )
        phase, share = self._place()
        rates = []
        for group in self.optimizer.param_groups:
            rates.append(self._between(group, phase["start_lr"], phase["end_lr"], share))
            if self.cycle_momentum:
                momentum = phase["start_momentum"], phase["end_momentum"]
                self._set_momentum(group, self._between(group, *momentum, share))
        return rates

    def _place(self) -> tuple[dict[str, Any], float]:
        """The phase of `last_epoch`, and the share of it that has passed."""
        start = 0.0
        for phase in self._schedule_phases[:-1]:
            if self.last_epoch <= phase["end_step"]:
                break
            start = phase["end_step"]
        else:
            phase = self._schedule_phases[-1]
        return phase, (self.last_epoch - start) / (phase["end_step"] - start)

    def _between(self, group: Group, start_key: str, end_key: str, share: float) -> float:
        start, end = group[start_key], group[end_key]
        if self._anneal_func_type == "linear":
            return float((end - start) * share + start)
        return float(end + (start - end) / 2.0 * (cos(pi * share) + 1))


def _total(total_steps: Any, epochs: Any, steps_per_epoch: Any) -> int:
    named = {"total_steps": total_steps}
    if total_steps is None:
        named = {"epochs": epochs, "steps_per_epoch": steps_per_epoch}
        if None in named.values():
            raise ValueError("You must define either total_steps OR (epochs AND steps_per_epoch)")
    total = 1
    for name, value in named.items():
        if not isinstance(value, int) or value <= 0:
            raise ValueError(f"Expected positive integer {name}, but got {value}")
        total *= value
    return total


def _phases(pct_start: float, total_steps: int, three_phase: bool) -> list[dict[str, Any]]:
    turn = float(pct_start * total_steps) - 1
    turns = [("initial_lr", "max_momentum", 0.0), ("max_lr", "base_momentum", turn)]
    if three_phase:
        turns.append(("initial_lr", "max_momentum", float(2 * pct_start * total_steps) - 2))
    turns.append(("min_lr", "max_momentum", total_steps - 1))
    return [
        {
            "end_step": end,
            "start_lr": start_lr,
            "end_lr": end_lr,
            "start_momentum": start_momentum,
            "end_momentum": end_momentum,
        }
        for (start_lr, start_momentum, _), (end_lr, end_momentum, end) in pairwise(turns)
    ]
