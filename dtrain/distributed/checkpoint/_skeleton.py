"""The state of an optimizer before its first step, which is none: what it would be.

Loading in place needs tensors to fill. They are made by a step with gradients of zero, learning
rate and weight decay 0, whose effect on the optimizer is undone; counts are set back. Saved and
loaded, they are as good as no state, for all optimizers here but SGD with both momentum and
dampening, whose first step is special.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from dtrain.autograd.grad_mode import no_grad
from dtrain.autograd.node import make
from dtrain.optim.optimizer import Optimizer
from dtrain.tensor import Tensor

_COUNTS = {"step": 0, "mu_product": 1}  # what a step changes even without a gradient


def completed_state(optimizer: Optimizer) -> dict[Any, dict[str, Any]]:
    """{parameter: state}: the optimizer's own, and new ones for parameters that require gradients
    and have none. Changes nothing.
    """
    held: dict[Any, dict[str, Any]] = dict(optimizer.state)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    lacking = [p for p in parameters if p.requires_grad and not held.get(p)]
    if not lacking:
        return held
    with no_grad(), _undone(optimizer, parameters):
        for parameter in lacking:
            parameter._grad = make(np.zeros_like(parameter._data))
        optimizer.step()
        made = {p: state for p, state in optimizer.state.items() if state}
    for state in made.values():
        for key, first in _COUNTS.items():
            if isinstance(state.get(key), Tensor):
                state[key] = make(np.full_like(state[key]._data, first))
    return held | made


@contextmanager
def _undone(optimizer: Optimizer, parameters: list[Any]) -> Iterator[None]:
    """Inside, the optimizer has no state, gradients, hooks, rates; afterwards all is as before."""
    state, groups = optimizer.state, optimizer.param_groups
    grads = [parameter._grad for parameter in parameters]
    quiet = optimizer._stepping
    still = {"lr": 0.0, "weight_decay": 0.0}
    optimizer.state, optimizer._stepping = defaultdict(dict), True  # its hooks are skipped
    optimizer.param_groups = [
        {**group, **{key: _like(group[key], zero) for key, zero in still.items() if key in group}}
        for group in groups
    ]
    try:
        for parameter in parameters:
            parameter._grad = None
        yield
    finally:
        optimizer.state, optimizer.param_groups = state, groups
        optimizer._stepping = quiet
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter._grad = grad


def _like(old: Any, value: float) -> Any:
    return make(np.full_like(old._data, value)) if isinstance(old, Tensor) else value
