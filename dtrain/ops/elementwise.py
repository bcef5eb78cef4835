"""Pointwise functions of one argument: exponentials, trigonometry, rounding and the like.

Integer tensors become floating where torch makes them so. Rules work on arrays and on Tensors.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from dtrain.autograd.node import make
from dtrain.autograd.op import define
from dtrain.autograd.promotion import FLOATING
from dtrain.autograd.value import Value, need_whole
from dtrain.ops.compare import where


def _one(low: float = -1.0, high: float = 1.0) -> Any:
    def sample() -> list[Any]:
        r = np.random.RandomState(0)
        return [((r.uniform(low, high, shape),), {}) for shape in ((3, 4), (), (0, 2))]

    return sample


def zeros_like(g: Any) -> Any:
    """Zeros of the shape and dtype of a gradient, an array or a Tensor as it is."""
    return make(np.zeros_like(g._data)) if isinstance(g, Value) else np.zeros_like(g)


def flat_vjp(n: Any, g: Any) -> Any:
    """The rule of step functions: no slope anywhere."""
    return (zeros_like(g),)


MASK_HINT = "If you are trying to invert a mask, use the `~` or `logical_not()` operator instead."


def _negative(x: np.ndarray) -> Any:
    if x.dtype.kind == "b":
        raise RuntimeError(
            f"Negation, the `-` operator, on a bool tensor is not supported. {MASK_HINT}"
        )
    return np.negative(x)


neg = define("neg", _negative, vjp=lambda n, g: (-g,), inputs="x", sample=_one())
exp = define("exp", np.exp, promote=FLOATING, saves="y", vjp=lambda n, g: (g * n.y,), sample=_one())
expm1 = define(
    "expm1", np.expm1, promote=FLOATING, saves="y", vjp=lambda n, g: (g * (n.y + 1),), sample=_one()
)
log = define(
    "log", np.log, promote=FLOATING, saves="x", vjp=lambda n, g: (g / n.x,), sample=_one(0.5, 2)
)
log2 = define(
    "log2", np.log2, promote=FLOATING, saves="x", sample=_one(0.5, 2),
    vjp=lambda n, g: (g / (n.x * math.log(2)),),
)  # fmt: skip
log10 = define(
    "log10", np.log10, promote=FLOATING, saves="x", sample=_one(0.5, 2),
    vjp=lambda n, g: (g / (n.x * math.log(10)),),
)  # fmt: skip
log1p = define(
    "log1p", np.log1p, promote=FLOATING, saves="x", sample=_one(),
    vjp=lambda n, g: (g / (n.x + 1),),
)  # fmt: skip
sqrt = define(
    "sqrt", np.sqrt, promote=FLOATING, saves="y", sample=_one(0.5, 2),
    vjp=lambda n, g: (g / (2 * n.y),),
)  # fmt: skip
rsqrt = define(
    "rsqrt", lambda x: 1 / np.sqrt(x), promote=FLOATING, saves="y", sample=_one(0.5, 2),
    vjp=lambda n, g: (g * -0.5 * n.y * n.y * n.y,),
)  # fmt: skip
sin = define("sin", np.sin, promote=FLOATING, saves="x", sample=_one(),
             vjp=lambda n, g: (g * cos(n.x),))  # fmt: skip
cos: Any = define("cos", np.cos, promote=FLOATING, saves="x", sample=_one(),
             vjp=lambda n, g: (-g * sin(n.x),))  # fmt: skip
tan = define("tan", np.tan, promote=FLOATING, saves="y", sample=_one(),
             vjp=lambda n, g: (g * (1 + n.y * n.y),))  # fmt: skip
atan = define("atan", np.arctan, promote=FLOATING, saves="x", sample=_one(),
              vjp=lambda n, g: (g / (1 + n.x * n.x),))  # fmt: skip
sinh = define("sinh", np.sinh, promote=FLOATING, saves="x", sample=_one(),
              vjp=lambda n, g: (g * cosh(n.x),))  # fmt: skip
cosh: Any = define("cosh", np.cosh, promote=FLOATING, saves="x", sample=_one(),
              vjp=lambda n, g: (g * sinh(n.x),))  # fmt: skip
tanh = define("tanh", np.tanh, promote=FLOATING, saves="y", sample=_one(),
              vjp=lambda n, g: (g * (1 - n.y * n.y),))  # fmt: skip
asin = define("asin", np.arcsin, promote=FLOATING, saves="x", sample=_one(-0.9, 0.9),
              vjp=lambda n, g: (g * rsqrt(1 - n.x * n.x),))  # fmt: skip
acos = define("acos", np.arccos, promote=FLOATING, saves="x", sample=_one(-0.9, 0.9),
              vjp=lambda n, g: (-g * rsqrt(1 - n.x * n.x),))  # fmt: skip
asinh = define("asinh", np.arcsinh, promote=FLOATING, saves="x", sample=_one(),
               vjp=lambda n, g: (g * rsqrt(n.x * n.x + 1),))  # fmt: skip
acosh = define("acosh", np.arccosh, promote=FLOATING, saves="x", sample=_one(1.5, 3),
               vjp=lambda n, g: (g * rsqrt(n.x * n.x - 1),))  # fmt: skip
atanh = define("atanh", np.arctanh, promote=FLOATING, saves="x", sample=_one(-0.9, 0.9),
               vjp=lambda n, g: (g / (1 - n.x * n.x),))  # fmt: skip
exp2 = define("exp2", np.exp2, promote=FLOATING, saves="y", sample=_one(),
              vjp=lambda n, g: (g * n.y * math.log(2),))  # fmt: skip


def _sigmoid(x: np.ndarray) -> Any:
    # 1/(1+exp(-x)) overflows to inf and then 0 for very negative x, which is the right limit
    return 1 / (1 + np.exp(-x))


sigmoid = define("sigmoid", _sigmoid, promote=FLOATING, saves="y", sample=_one(),
                 vjp=lambda n, g: (g * n.y * (1 - n.y),))  # fmt: skip
reciprocal = define("reciprocal", lambda x: 1 / x, promote=FLOATING, saves="y",
                    sample=_one(0.5, 2), vjp=lambda n, g: (-g * n.y * n.y,))  # fmt: skip
square = define("square", np.square, saves="x", vjp=lambda n, g: (2 * g * n.x,), sample=_one())
abs = define("abs", np.abs, saves="x", vjp=lambda n, g: (g * sign(n.x),), sample=_one())
deg2rad = define("deg2rad", np.deg2rad, promote=FLOATING, sample=_one(),
                 vjp=lambda n, g: (g * (math.pi / 180),))  # fmt: skip
rad2deg = define("rad2deg", np.rad2deg, promote=FLOATING, sample=_one(),
                 vjp=lambda n, g: (g * (180 / math.pi),))  # fmt: skip
frac = define("frac", lambda x: x - np.trunc(x), vjp=lambda n, g: (g,), sample=_one(0.1, 0.9))
logit = define("logit", lambda x: np.log(x / (1 - x)), promote=FLOATING, saves="x",
               sample=_one(0.1, 0.9), vjp=lambda n, g: (g / (n.x * (1 - n.x)),))  # fmt: skip

sign: Any = define("sign", lambda x: x.copy() if x.dtype.kind == "b" else np.sign(x), vjp=flat_vjp,
              sample=_one())  # fmt: skip
floor = define("floor", np.floor, vjp=flat_vjp, sample=_one())
ceil = define("ceil", np.ceil, vjp=flat_vjp, sample=_one())
trunc = define("trunc", np.trunc, vjp=flat_vjp, sample=_one())
_round = define(
    "round", lambda x, *, decimals: np.round(x, decimals), inputs="x", vjp=flat_vjp,
    sample=lambda: [((np.linspace(-2, 2, 9) + 0.1,), {"decimals": 0})],
)  # fmt: skip


def round(input: Any, *, decimals: int = 0) -> Any:
    """Nearest, halves to even, to `decimals` digits. The gradient is zero. Source: torch.round."""
    return _round(input, decimals=decimals)


def positive(input: Any) -> Any:
    """The tensor itself; RuntimeError for bool. Source: torch.positive."""
    if input._data.dtype.kind == "b":
        raise RuntimeError("The `+` operator, on a bool tensor is not supported.")
    return input


def nan_to_num(
    input: Any, nan: float = 0.0, posinf: float | None = None, neginf: float | None = None
) -> Any:
    """nan and the infinities replaced by numbers (0, and the limits of the dtype).

    Source: torch.nan_to_num.
    """
    if input._data.dtype.kind in "biu":
        need_whole("nan_to_num of integers", input)
        return make(input._data.copy())
    limits = np.finfo(input._data.dtype)
    top = float(limits.max) if posinf is None else posinf
    bottom = float(limits.min) if neginf is None else neginf
    out = where(input == math.inf, top, where(input == -math.inf, bottom, input))
    return where(out != out, nan, out)
