"""GELU and SiLU: fused, and worked through in blocks that stay in cache.

gelu(x) = x Phi(x), exactly (with erf) or approximately (with tanh, here written as the equal
sigmoid: one exp is faster than NumPy's tanh). silu(x) = x sigmoid(x).
Source: Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from dtrain.autograd.grad_mode import is_grad_enabled
from dtrain.autograd.op import define
from dtrain.ops.elementwise import sigmoid
from dtrain.ops.special import BLOCK, blocks, erf, erf_array, erf_single

_LINEAR = 2 * math.sqrt(2 / math.pi)
_CUBIC = 0.044715 * _LINEAR


def _sample() -> list[Any]:
    return [((np.linspace(-3, 3, 12).reshape(3, 4),), {})]


def _scratch(x: np.ndarray) -> np.ndarray:
    return np.empty(min(BLOCK, x.size), x.dtype)


# --- the tanh approximation: x sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3)) -------------------------


def _tanh_forward(x: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """y, and where gradients are recorded dy/dx = s + y (1 - s) (a + 3 b x^2), s the sigmoid.

    The slope is cheap here, where all it needs is in cache: backward is one product.
    """
    y = np.empty(x.shape, x.dtype)
    slope = np.empty(x.shape, x.dtype) if is_grad_enabled() else None
    room = np.empty((2, min(BLOCK, x.size)), x.dtype)
    one, linear, minus_cubic, thrice = np.array([1, _LINEAR, -_CUBIC, 3 * _CUBIC], x.dtype)
    with np.errstate(over="ignore"):  # exp becomes inf, its reciprocal 0: the right limit
        for xi, yi, di in blocks(x, y, y if slope is None else slope):
            s, t = room[:, : xi.size]
            np.square(xi, out=t)
            np.multiply(t, minus_cubic, out=s)
            s -= linear
            s *= xi
            np.exp(s, out=s)
            s += one
            np.reciprocal(s, out=s)
            np.multiply(xi, s, out=yi)
            if slope is not None:
                t *= thrice
                t += linear
                np.subtract(one, s, out=di)
                t *= di
                t *= yi
                np.add(s, t, out=di)
    return y, slope


_gelu_tanh = define(
    "gelu_tanh", _tanh_forward, vjp=lambda n, g: (g * n.slope,), aux="slope", inputs="x",
    sample=_sample, composite=lambda x: x * sigmoid(x * (x * x * _CUBIC + _LINEAR)),
)  # fmt: skip


# --- exact: x (1 + erf(x / sqrt 2)) / 2 ----------------------------------------------------------


def _exact_forward(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if x.dtype != np.float32:
        phi = (erf_array(x * x.dtype.type(math.sqrt(0.5))) + 1) / 2
        return x * phi, phi
    y, phi = np.empty(x.shape, x.dtype), np.empty(x.shape, x.dtype)
    scratch = _scratch(x)
    for xi, yi, pi in blocks(x, y, phi):
        np.multiply(xi, math.sqrt(0.5), out=yi)
        erf_single(yi, pi, scratch[: xi.size])
        pi += 1
        pi *= 0.5
        np.multiply(xi, pi, out=yi)
    return y, phi


def _exact_vjp(n: Any, g: np.ndarray) -> tuple[np.ndarray]:
    # dy/dx = Phi(x) + x exp(-x^2 / 2) / sqrt(2 pi)
    dx = np.empty(g.shape, g.dtype)
    for xi, pi, gi, di in blocks(n.x, n.phi, g, dx):
        np.square(xi, out=di)
        di *= -0.5
        np.exp(di, out=di)
        di *= xi
        di *= 1 / math.sqrt(2 * math.pi)
        di += pi
        di *= gi
    return (dx,)


_gelu = define(
    "gelu", _exact_forward, vjp=_exact_vjp, aux="phi", inputs="x", sample=_sample,
    composite=lambda x: x * (erf(x * math.sqrt(0.5)) + 1) * 0.5,
)  # fmt: skip


def gelu(input: Any, *, approximate: str = "none") -> Any:
    """`x * Phi(x)`, Phi the normal distribution function; approximate "none" or "tanh".

    Source: torch.nn.functional.gelu.
    """
    if approximate == "none":
        return _gelu(input)
    if approximate == "tanh":
        return _gelu_tanh(input)
    raise RuntimeError("approximate argument must be either none or tanh.")


# --- SiLU ----------------------------------------------------------------------------------------


def _silu_forward(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    y, gate = np.empty(x.shape, x.dtype), np.empty(x.shape, x.dtype)
    with np.errstate(over="ignore"):
        for xi, yi, si in blocks(x, y, gate):
            np.negative(xi, out=si)
            np.exp(si, out=si)
            si += 1
            np.reciprocal(si, out=si)
            np.multiply(xi, si, out=yi)
    return y, gate


def _silu_vjp(n: Any, g: np.ndarray) -> tuple[np.ndarray]:
    # dy/dx = s (1 + x (1 - s))
    dx = np.empty(g.shape, g.dtype)
    for xi, si, gi, di in blocks(n.x, n.gate, g, dx):
        np.subtract(1, si, out=di)
        di *= xi
        di += 1
        di *= si
        di *= gi
    return (dx,)


silu = define(
    "silu", _silu_forward, vjp=_silu_vjp, aux="gate", inputs="x", sample=_sample,
    composite=lambda x: x * sigmoid(x),
)  # fmt: skip
