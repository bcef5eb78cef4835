"""A step of any optimizer for some of its parameters: what runs inside backward.

Owns `step_with`. Rule: afterwards the optimizer and the parameters' `.grad` are as they were, but
for what the step changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dtrain.optim.optimizer import Optimizer


def step_with(optimizer: Optimizer, gradients: Mapping[Any, Any]) -> None:
    """One step of `optimizer` for the parameters in `gradients` alone, {parameter: gradient}."""
    groups = [(group, group["params"]) for group in optimizer.param_groups]
    before = [(parameter, parameter._grad) for parameter in gradients]
    try:
        for group, parameters in groups:
            group["params"] = [p for p in parameters if p in gradients]
        for parameter, gradient in gradients.items():
            parameter._grad = gradient
        optimizer.step()
    finally:
        for group, parameters in groups:
            group["params"] = parameters
        for parameter, gradient in before:
            parameter._grad = gradient
