"""Activations and softmax. Those that are fused say their `composite` for higher derivatives."""

from __future__ import annotations

from typing import Any

import numpy as np

from dtrain import dtypes
from dtrain.autograd.op import define
from dtrain.autograd.promotion import cast
from dtrain.ops.elementwise import exp
from dtrain.ops.reduce import sum as _sum
from dtrain.ops.shape import axis_of


def _rand(*shape: int) -> np.ndarray:
    return np.random.RandomState(0).randn(*shape)


relu = define(
    "relu", lambda x: np.maximum(x, 0), saves="y", vjp=lambda n, g: (g * (n.y > 0),),
    sample=lambda: [((_rand(3, 4),), {})],
)  # fmt: skip


def _softmax_forward(x: np.ndarray, *, dim: int) -> np.ndarray:
    out = x - x.max(axis=dim, keepdims=True)
    np.exp(out, out=out)
    out /= out.sum(axis=dim, keepdims=True)
    return out


_softmax = define(
    "softmax", _softmax_forward, saves="y",
    # y * (g - sum(g * y))
    vjp=lambda n, g: (n.y * (g - _sum(g * n.y, n.dim, True)),),
    sample=lambda: [((_rand(3, 4),), {"dim": 1}), ((_rand(3, 4),), {"dim": 0})],
)  # fmt: skip


def _log_softmax_forward(x: np.ndarray, *, dim: int) -> np.ndarray:
    out = x - x.max(axis=dim, keepdims=True)
    out -= np.log(np.exp(out).sum(axis=dim, keepdims=True))
    return out


_log_softmax = define(
    "log_softmax", _log_softmax_forward, saves="y",
    vjp=lambda n, g: (g - exp(n.y) * _sum(g, n.dim, True),),
    sample=lambda: [((_rand(3, 4),), {"dim": 1})],
)  # fmt: skip


def softmax(input: Any, dim: int, *, dtype: dtypes.dtype | None = None) -> Any:
    """exp(x) / sum(exp(x)) along `dim`. Source: torch.nn.functional.softmax."""
    if dtype is not None:
        input = cast(input, dtype=dtype)
    return _softmax(input, dim=axis_of(dim, input.ndim))


def log_softmax(input: Any, dim: int, *, dtype: dtypes.dtype | None = None) -> Any:
    """log(softmax(x)) along `dim`, without overflow. Source: torch.nn.functional.log_softmax."""
    if dtype is not None:
        input = cast(input, dtype=dtype)
    return _log_softmax(input, dim=axis_of(dim, input.ndim))
