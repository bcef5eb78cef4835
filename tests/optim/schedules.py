"""Schedules that are recorded from PyTorch and repeated by the tests, in the API both have."""

from __future__ import annotations

import warnings
from typing import Any

STEPS = 14
METRICS = (1.0, 0.9, 0.95, 0.91, 0.93, 0.5, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6, 0.4999, 0.6)

# The text of the constructor after `lr_scheduler.`; `o` is the optimizer below.
SCHEDULES = (
    "LambdaLR(o, lambda epoch: 0.9**epoch)",
    "LambdaLR(o, [lambda epoch: 1 / (1 + epoch), lambda epoch: epoch])",
    "MultiplicativeLR(o, lambda epoch: 0.9)",
    "StepLR(o, step_size=3)",
    "StepLR(o, step_size=4, gamma=0.5)",
    "MultiStepLR(o, [2, 5, 5, 9], gamma=0.5)",
    "ConstantLR(o)",
    "ConstantLR(o, factor=0.25, total_iters=4)",
    "LinearLR(o)",
    "LinearLR(o, start_factor=1.0, end_factor=0.1, total_iters=10)",
    "ExponentialLR(o, gamma=0.8)",
    "PolynomialLR(o, total_iters=10, power=2.0)",
    "CosineAnnealingLR(o, T_max=5)",
    "CosineAnnealingLR(o, T_max=10, eta_min=0.01)",
    "CosineAnnealingWarmRestarts(o, T_0=4)",
    "CosineAnnealingWarmRestarts(o, T_0=2, T_mult=2, eta_min=0.01)",
    "OneCycleLR(o, max_lr=1.0, total_steps=15)",
    "OneCycleLR(o, max_lr=[1.0, 0.1], epochs=3, steps_per_epoch=5, anneal_strategy='linear')",
    "OneCycleLR(o, max_lr=1.0, total_steps=15, three_phase=True, cycle_momentum=False)",
    "ReduceLROnPlateau(o, patience=2, factor=0.5)",
    "ReduceLROnPlateau(o, 'max', 0.5, 1, 0.01, 'abs', cooldown=2, min_lr=0.1)",
    "SequentialLR(o, [lr_scheduler.LinearLR(o, 0.1, total_iters=4),"
    " lr_scheduler.CosineAnnealingLR(o, 8)], milestones=[4])",
    "SequentialLR(o, [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.9),"
    " lr_scheduler.StepLR(o, 2)], milestones=[3, 7])",
    "ChainedScheduler([lr_scheduler.ConstantLR(o, 0.5, 4), lr_scheduler.ExponentialLR(o, 0.9)])",
)


def optimizer(torch: Any) -> Any:
    params = [torch.zeros(1, requires_grad=True) for _ in range(2)]
    return torch.optim.SGD(
        [{"params": params[:1]}, {"params": params[1:], "lr": 0.05}], lr=0.5, momentum=0.9
    )


def build(torch: Any, schedule: str, given: Any) -> Any:
    """The schedule on the optimizer `given`."""
    return eval(f"lr_scheduler.{schedule}", {"lr_scheduler": torch.optim.lr_scheduler, "o": given})


def run(scheduler: Any, start: int = 0, stop: int = STEPS) -> list[list[float]]:
    """The rates, and the momentum of group 0, before each step and after the last."""
    given, seen = scheduler.optimizer, []
    for step in range(start, stop):
        rates = [float(group["lr"]) for group in given.param_groups]
        seen.append([*rates, given.param_groups[0]["momentum"]])
        given.step()
        with warnings.catch_warnings():  # SequentialLR of PyTorch warns of itself
            warnings.filterwarnings("ignore", "The epoch parameter")
            if type(scheduler).__name__ == "ReduceLROnPlateau":
                scheduler.step(METRICS[step])
            else:
                scheduler.step()
    return [*seen, [*scheduler.get_last_lr(), given.param_groups[0]["momentum"]]]
