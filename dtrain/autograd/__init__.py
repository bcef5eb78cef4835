"""Automatic differentiation: `backward`, `grad`, custom `Function`s, grad modes.

op.py states what an operation is, node.py what a graph is made of, engine.py walks it, function.py
holds users' own operations, gradcheck.py compares with finite differences. Source: torch.autograd.
"""

from __future__ import annotations

import importlib
from typing import Any

from dtrain.autograd.function import Function as Function
from dtrain.autograd.grad_mode import (
    enable_grad as enable_grad,
    inference_mode as inference_mode,
    no_grad as no_grad,
    set_grad_enabled as set_grad_enabled,
)
from dtrain.autograd.gradcheck import (
    GradcheckError as GradcheckError,
    gradcheck as gradcheck,  # the function, like torch, under the name of its module
    gradgradcheck as gradgradcheck,
)
from dtrain.autograd.gradients import backward as backward, grad as grad


def __getattr__(name: str) -> Any:
    if name == "Variable":
        return importlib.import_module("dtrain.legacy").Variable
    if name in ("functional", "graph"):
        return importlib.import_module(f"dtrain.autograd.{name}")
    raise AttributeError(f"module 'dtrain.autograd' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), "Variable", "functional", "graph"})
