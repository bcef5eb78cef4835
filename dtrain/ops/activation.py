"""Activations and softmax; GELU and SiLU are in gelu.py.

Rules are written so that a mask multiplies the gradient and never a Python number: a bool array
times a float would be float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dtrain import dtypes
from dtrain.autograd.op import define
from dtrain.autograd.promotion import cast
from dtrain.ops.compare import where
from dtrain.ops.elementwise import exp, sigmoid, tanh
from dtrain.ops.join import narrow
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


# --- piecewise ---------------------------------------------------------------------------------


def _line(**attrs: Any) -> Any:
    """Sample inputs on both sides of every kink, none on one."""
    return lambda: [((np.linspace(-3.05, 3.0, 12).reshape(3, 4),), attrs)]


def _as(x: Any, number: float) -> Any:
    """A number that leaves the dtype of `x` as it is: with a plain one bfloat16 becomes float32."""
    return x.dtype.type(number) if isinstance(x, np.ndarray) else number


_leaky_relu = define(
    "leaky_relu", lambda x, *, slope: np.maximum(x, 0) + np.minimum(x, 0) * _as(x, slope),
    inputs="x",
    saves="x", vjp=lambda n, g: (g * (n.x > 0) + g * (n.x <= 0) * _as(g, n.slope),),
    sample=_line(slope=0.1),
)  # fmt: skip
_elu = define(
    "elu", lambda x, *, alpha: np.maximum(x, 0) + np.expm1(np.minimum(x, 0)) * _as(x, alpha),
    inputs="x",
    saves="x y", vjp=lambda n, g: (g * (n.x > 0) + g * (n.x <= 0) * (n.y + _as(g, n.alpha)),),
    sample=_line(alpha=1.3),
)  # fmt: skip
_hardtanh = define(
    "hardtanh", lambda x, *, low, high: np.minimum(np.maximum(x, _as(x, low)), _as(x, high)),
    inputs="x",
    saves="x", vjp=lambda n, g: (g * ((n.x > n.low) & (n.x < n.high)),),
    sample=_line(low=-1.0, high=2.0),
)  # fmt: skip
_threshold = define(
    "threshold", lambda x, *, threshold, value: np.where(x > threshold, x, x.dtype.type(value)),
    inputs="x", saves="x", vjp=lambda n, g: (g * (n.x > n.threshold),),
    sample=_line(threshold=0.2, value=20.0),
)  # fmt: skip


def leaky_relu(input: Any, negative_slope: float = 0.01) -> Any:
    """x for x > 0, else `negative_slope` x. Source: torch.nn.functional.leaky_relu."""
    return _leaky_relu(input, slope=float(negative_slope))


def elu(input: Any, alpha: float = 1.0) -> Any:
    """x for x > 0, else `alpha` (exp(x) - 1). Source: torch.nn.functional.elu."""
    return _elu(input, alpha=float(alpha))


def hardtanh(input: Any, min_val: float = -1.0, max_val: float = 1.0) -> Any:
    """x limited to [min_val, max_val]; the gradient is 0 at the limits (unlike clamp's).

    Source: torch.nn.functional.hardtanh.
    """
    if min_val > max_val:
        raise ValueError("min_val cannot be greater than max_val")
    return _hardtanh(input, low=min_val, high=max_val)


def threshold(input: Any, threshold: float, value: float) -> Any:
    """x where x > `threshold`, else `value`. Source: torch.nn.functional.threshold."""
    return _threshold(input, threshold=threshold, value=value)


def prelu(input: Any, weight: Any) -> Any:
    """x for x > 0, else `weight` x: one weight, or one for each channel (dimension 1).

    Source: torch.nn.functional.prelu.
    """
    if weight.ndim != 1 and weight.ndim != 0:
        raise RuntimeError(
            f"prelu: Expected `weight` to be a scalar or 1D tensor, but got: ndim = {weight.ndim}"
        )
    count = weight._data.size
    if count != 1:
        channels = input.shape[1] if input.ndim > 1 else 1
        if channels != count:
            raise RuntimeError(
                "Mismatch of parameter numbers and input channel size. Found parameter numbers = "
                f"{count} and channel size = {channels}."
            )
        weight = weight.reshape((count,) + (1,) * (input.ndim - 2))
    return where(input > 0, input, input * weight)


def hardsigmoid(input: Any) -> Any:
    """x / 6 + 1/2 limited to [0, 1]. Source: torch.nn.functional.hardsigmoid."""
    return hardtanh(input + 3, 0.0, 6.0) / 6


def hardswish(input: Any) -> Any:
    """x hardsigmoid(x). Source: torch.nn.functional.hardswish."""
    return input * hardsigmoid(input)


# --- smooth ------------------------------------------------------------------------------------


def _softplus_forward(x: np.ndarray, *, beta: float, threshold: float) -> np.ndarray:
    scaled = x * _as(x, beta)
    # log(1 + exp(s)) without overflow; the identity from `threshold` on
    out = np.log1p(np.exp(-np.abs(scaled))) + np.maximum(scaled, 0)
    return np.where(scaled > threshold, x, out / _as(x, beta))


def _softplus_vjp(n: Any, g: Any) -> Any:
    scaled = n.x * _as(g, n.beta)
    return (where(scaled > n.threshold, g, g * sigmoid(scaled)),)


_softplus = define(
    "softplus", _softplus_forward, saves="x",
    vjp=_softplus_vjp,
    sample=_line(beta=1.5, threshold=4.0),
)  # fmt: skip
_log_sigmoid = define(
    "log_sigmoid", lambda x: np.minimum(x, 0) - np.log1p(np.exp(-np.abs(x))), inputs="x",
    saves="x", vjp=lambda n, g: (g * sigmoid(-n.x),), sample=_line(),
)  # fmt: skip


def softplus(input: Any, beta: float = 1.0, threshold: float = 20.0) -> Any:
    """log(1 + exp(beta x)) / beta, and x where beta x > threshold.

    Source: torch.nn.functional.softplus.
    """
    return _softplus(input, beta=beta, threshold=threshold)


def logsigmoid(input: Any) -> Any:
    """log(sigmoid(x)) without overflow. Source: torch.nn.functional.logsigmoid."""
    return _log_sigmoid(input)


def glu(input: Any, dim: int = -1) -> Any:
    """The first half along `dim` times the sigmoid of the second.

    Source: torch.nn.functional.glu.
    """
    axis = axis_of(dim, input.ndim)
    size = input.shape[axis]
    if size % 2:
        raise RuntimeError(f"Halving dimension must be even, but dimension {axis} is size {size}")
    half = size // 2
    return narrow(input, axis, 0, half) * sigmoid(narrow(input, axis, half, half))


def selu(input: Any) -> Any:
    """`elu` with the scale and alpha for which activations keep mean 0 and variance 1.

    Source: Klambauer et al., "Self-Normalizing Neural Networks", 2017.
    """
    return elu(input, 1.6732632423543772) * 1.0507009873554805


def mish(input: Any) -> Any:
    """x tanh(softplus(x)). Source: torch.nn.functional.mish."""
    return input * tanh(softplus(input))
