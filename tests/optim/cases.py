"""Optimizer runs that are recorded from PyTorch and repeated by the tests.

`run(torch, case, dtype)` is written in the API that both have: it is given PyTorch when recording
and dtrain when testing.
"""

from __future__ import annotations

from typing import Any

import numpy as np

STEPS = 6
SHAPES = ((3, 4), (5,), ())
DTYPES = ("float32", "float64")

# The text of the constructor after `torch.optim.`, with `params` the parameters.
CASES = (
    "SGD(params, lr=0.1)",
    "SGD(params, lr=0.1, weight_decay=0.05)",
    "SGD(params, lr=0.1, momentum=0.9)",
    "SGD(params, lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.05)",
    "SGD(params, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.05)",
    "SGD(params, lr=0.1, momentum=0.9, maximize=True, weight_decay=0.05)",
    "SGD(params, lr=0.1, maximize=True)",
    "Adam(params, lr=0.02)",
    "Adam(params, lr=0.02, betas=(0.7, 0.9), eps=1e-3, weight_decay=0.1)",
    "Adam(params, lr=0.02, amsgrad=True)",
    "Adam(params, lr=0.02, maximize=True, weight_decay=0.1)",
    "Adam(params, lr=0.02, weight_decay=0.1, decoupled_weight_decay=True)",
    "AdamW(params)",
    "AdamW(params, lr=0.02, betas=(0.5, 0.6), eps=1e-3, weight_decay=0.3)",
    "AdamW(params, lr=0.02, amsgrad=True, maximize=True)",
    "AdamW(params, lr=0.02, weight_decay=0)",
    "RMSprop(params)",
    "RMSprop(params, lr=0.02, alpha=0.9, eps=1e-3, weight_decay=0.1, maximize=True)",
    "RMSprop(params, lr=0.02, alpha=0.9, momentum=0.9)",
    "RMSprop(params, lr=0.02, alpha=0.9, momentum=0.9, centered=True)",
    "Adagrad(params)",
    "Adagrad(params, 0.1, 0.2, 0.1, 0.5, eps=1e-3, maximize=True)",
    "Adadelta(params)",
    "Adadelta(params, lr=0.5, rho=0.7, eps=1e-3, weight_decay=0.1, maximize=True)",
    "Adamax(params)",
    "Adamax(params, lr=0.02, betas=(0.7, 0.9), eps=1e-3, weight_decay=0.1, maximize=True)",
    "NAdam(params)",
    "NAdam(params, lr=0.02, betas=(0.7, 0.9), weight_decay=0.1, momentum_decay=0.1)",
    "NAdam(params, weight_decay=0.1, decoupled_weight_decay=True, maximize=True)",
    "RAdam(params)",
    "RAdam(params, lr=0.02, betas=(0.7, 0.9), eps=1e-3, weight_decay=0.1)",
    "RAdam(params, weight_decay=0.1, decoupled_weight_decay=True, maximize=True)",
)


def parameters(torch: Any, dtype: str) -> list[Any]:
    """Leaves of SHAPES with fixed values."""
    random = np.random.default_rng(1)
    return [
        torch.tensor(random.normal(size=shape), dtype=getattr(torch, dtype), requires_grad=True)
        for shape in SHAPES
    ]


def gradients(step: int) -> list[np.ndarray]:
    """The gradients of one step; they grow and shrink, so that a maximum is not the last one."""
    random = np.random.default_rng(100 + step)
    return [random.normal(size=shape) * (3 if step % 3 == 1 else 0.5) for shape in SHAPES]


def run(torch: Any, case: str, dtype: str) -> tuple[Any, list[Any]]:
    """STEPS steps; returns the optimizer and its parameters. The second one has no gradient in
    steps 0 and 3, so that it is younger than the others."""
    params = parameters(torch, dtype)
    optimizer = eval(f"torch.optim.{case}", {"torch": torch, "params": params})
    for step in range(STEPS):
        for index, (param, grad) in enumerate(zip(params, gradients(step), strict=True)):
            skipped = index == 1 and step % 3 == 0
            param.grad = None if skipped else torch.tensor(grad, dtype=param.dtype)
        optimizer.step()
    return optimizer, params
