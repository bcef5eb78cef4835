"""The base of learning rate schedules, and how a rate is read and set.

A schedule states `chained(lr, base)`, the next rate from the present one, so that schedules on one
optimizer multiply, and where there is one `closed(base)`, the rate at `last_epoch` by itself.
Attribute names are torch's: state_dicts can be exchanged with PyTorch. Rates are floats; a group
whose lr is a tensor has it filled.
"""

from __future__ import annotations

import warnings
from typing import Any

from dtrain.optim.optimizer import Group, Optimizer, number
from dtrain.tensor import Tensor

EPOCH_DEPRECATION = (
    "The epoch parameter in `scheduler.step()` was not necessary and is being deprecated where "
    "possible. Please use `scheduler.step()` to step the scheduler. If epoch is different from "
    "None, the closed form is used instead of the chainable form, where available."
)


class LRScheduler:
    """Base of the schedules; constructing one makes its initial step.

    A subclass gives `chained` and perhaps `closed`, or overrides `get_lr`. With `last_epoch` >= 0
    the groups must hold "initial_lr" (KeyError), as a loaded optimizer's do.
    """

    _get_lr_called_within_step = False
    _is_initial = False

    def __init__(self, optimizer: Optimizer, last_epoch: int = -1) -> None:
        self.optimizer = require_optimizer(optimizer)
        for index, group in enumerate(optimizer.param_groups):
            if last_epoch == -1:
                group.setdefault("initial_lr", number(group["lr"]))
            elif "initial_lr" not in group:
                raise KeyError(
                    f"param 'initial_lr' is not specified in param_groups[{index}] when resuming "
                    "scheduler with last_epoch >= 0: load the optimizer's state first, or leave "
                    "last_epoch out for a fresh run"
                )
        self.base_lrs = [number(group["initial_lr"]) for group in optimizer.param_groups]
        self.last_epoch = last_epoch
        self._initial_step()

    def _initial_step(self) -> None:
        self._step_count = 0
        self._is_initial = True
        try:
            self.step()
        finally:
            self._is_initial = False

    def chained(self, lr: float, base: float) -> float:
        """The rate of a group at `last_epoch`, from its present one and its initial one."""
        raise NotImplementedError(f"{type(self).__name__} defines neither chained nor get_lr")

    def get_lr(self) -> list[float]:
        """The rate of each group at `last_epoch`; users want `get_last_lr`."""
        self._warn_outside_step()
        return [
            self.chained(lr, base)
            for lr, base in zip(rates_of(self.optimizer), self.base_lrs, strict=True)
        ]

    def get_last_lr(self) -> list[float]:
        """The rates that the last step set, one for each group."""
        return self._last_lr

    def step(self, epoch: int | None = None) -> None:
        """Go to the next epoch (or, deprecated, to the one given) and set the rates.

        Warns when it is called before the optimizer's first step, as that skips the first rate.
        """
        if self._step_count == 1 and not self.optimizer._opt_called:
            warnings.warn(
                "Detected call of `lr_scheduler.step()` before `optimizer.step()`. You should call "
                "them in the opposite order: `optimizer.step()` before `lr_scheduler.step()`.  "
                "Failure to do this will result in skipping the first value of the learning rate "
                "schedule.",
                stacklevel=2,
            )
        self._step_count += 1
        if epoch is not None:
            warnings.warn(EPOCH_DEPRECATION, stacklevel=2)
        self._update_lr(epoch)

    def _update_lr(self, epoch: int | None = None) -> None:
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
        if epoch is not None and hasattr(self, "closed"):
            self._set_rates([self.closed(base) for base in self.base_lrs])
        else:
            self._set_rates(self._get_lr_within_step())

    def _get_lr_within_step(self) -> list[float]:
        self._get_lr_called_within_step = True
        try:
            return self.get_lr()
        finally:
            self._get_lr_called_within_step = False

    def _set_rates(self, rates: list[float]) -> None:
        for group, lr in zip(self.optimizer.param_groups, rates, strict=True):
            set_rate(group, lr)
        self._last_lr = rates_of(self.optimizer)

    def _warn_outside_step(self) -> None:
        if not self._get_lr_called_within_step:
            warnings.warn(
                "To get the last learning rate computed by the scheduler, please use "
                "`get_last_lr()`.",
                stacklevel=3,
            )

    def state_dict(self) -> dict[str, Any]:
        """Everything but the optimizer."""
        return {key: value for key, value in self.__dict__.items() if key != "optimizer"}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a `state_dict()`; the optimizer's own is loaded apart, after this."""
        self.__dict__.update(state_dict)


def require_optimizer(optimizer: Any) -> Optimizer:
    """`optimizer` itself; TypeError when it is none."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"{type(optimizer).__name__} is not an Optimizer")
    return optimizer


def rates_of(optimizer: Optimizer) -> list[float]:
    """The present rate of each group."""
    return [number(group["lr"]) for group in optimizer.param_groups]


def set_rate(group: Group, lr: float) -> None:
    """Give the group a rate; a tensor keeps its identity."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr


def one_per_group(name: str, optimizer: Optimizer, value: Any) -> list[Any]:
    """A list with a value for each group. ValueError when another number of them was given."""
    groups = optimizer.param_groups
    if not isinstance(value, (list, tuple)):
        return [value] * len(groups)
    if len(value) != len(groups):
        raise ValueError(
            f"{name} must have the same length as optimizer.param_groups. {name} has {len(value)} "
            f"values, param_groups has {len(groups)}."
        )
    return list(value)
