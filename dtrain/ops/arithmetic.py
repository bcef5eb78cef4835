"""Pointwise functions of two arguments: arithmetic with torch's promotion, powers, limits.

Gradient rules may return the broadcast shape; the engine sums it down to the input's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from dtrain import dtypes
from dtrain.autograd.op import SCALARS, define
from dtrain.autograd.promotion import ARITHMETIC, Arithmetic, cast
from dtrain.autograd.value import Value
from dtrain.ops.compare import where
from dtrain.ops.elementwise import (
    MASK_HINT,
    exp,
    floor,
    log,
    sqrt,
    square,
    trunc,
    zeros_like,
)  # fmt: skip


def _pair(low: float = -1.0, high: float = 1.0) -> Any:
    """Sample inputs of a binary op: equal shapes, a broadcast row, a scalar."""

    def sample() -> list[Any]:
        r = np.random.RandomState(0)
        shapes = [((3, 4), (3, 4)), ((2, 3, 4), (4,)), ((3, 1), (1, 2)), ((), (3,))]
        return [((r.uniform(low, high, a), r.uniform(low, high, b)), {}) for a, b in shapes]

    return sample


# --- sums, differences, products -----------------------------------------------------------------


class _Subtraction(Arithmetic):
    """Arithmetic that refuses bool tensors, which torch does not subtract."""

    def __call__(self, call: Any, a: Any, b: Any) -> Any:
        if any(isinstance(v, Value) and v._data.dtype.kind == "b" for v in (a, b)):
            raise RuntimeError(
                f"Subtraction, the `-` operator, with a bool tensor is not supported. {MASK_HINT}"
            )
        return super().__call__(call, a, b)


def _subtract(a: Any, b: Any) -> Any:
    try:
        return np.subtract(a, b)
    except TypeError:  # NumPy has no subtraction of two bools either
        raise RuntimeError(
            "Subtraction, the `-` operator, with two bool tensors is not supported. Use the "
            "`^` or `logical_xor()` operator instead."
        ) from None


plus = define("add", np.add, promote=ARITHMETIC, vjp=lambda n, g: (g, g), sample=_pair())
minus = define(
    "sub", _subtract, promote=_Subtraction(), vjp=lambda n, g: (g, -g), sample=_pair()
)  # fmt: skip
mul = define(
    "mul", np.multiply, promote=ARITHMETIC, saves="a b", sample=_pair(),
    vjp=lambda n, g: (g * n.b if n.edges[0] is not None else None,
                      g * n.a if n.edges[1] is not None else None),
)  # fmt: skip


def _check_alpha(input: Any, alpha: Any) -> None:
    if alpha.__class__ is float and input._data.dtype.kind in "iu":
        raise RuntimeError(
            "For integral input tensors, argument alpha must not be a floating point number."
        )


def add(input: Any, other: Any, *, alpha: Any = 1) -> Any:
    """`input + alpha * other`. Source: torch.add."""
    if alpha == 1:
        return plus(input, other)
    _check_alpha(input, alpha)
    return plus(input, other * alpha)


def sub(input: Any, other: Any, *, alpha: Any = 1) -> Any:
    """`input - alpha * other`. Source: torch.sub."""
    if alpha == 1:
        return minus(input, other)
    _check_alpha(input, alpha)
    return minus(input, other * alpha)


def rsub(input: Any, other: Any, *, alpha: Any = 1) -> Any:
    """`other - alpha * input`. Source: torch.rsub."""
    return minus(other, input if alpha == 1 else input * alpha)


def addcmul(input: Any, tensor1: Any, tensor2: Any, *, value: Any = 1) -> Any:
    """`input + value * tensor1 * tensor2`. Source: torch.addcmul."""
    return input + (tensor1 if value == 1 else tensor1 * value) * tensor2


def addcdiv(input: Any, tensor1: Any, tensor2: Any, *, value: Any = 1) -> Any:
    """`input + value * tensor1 / tensor2`. Source: torch.addcdiv."""
    return input + (tensor1 if value == 1 else tensor1 * value) / tensor2


def lerp(input: Any, end: Any, weight: Any) -> Any:
    """`input + weight * (end - input)`, from the nearer end. Source: torch.lerp."""
    if weight.__class__ in SCALARS and weight >= 0.5:
        return end - (end - input) * (1 - weight)
    return input + weight * (end - input)


# --- quotients -----------------------------------------------------------------------------------


def _divide(a: Any, b: Any) -> Any:
    array = b if a.__class__ in SCALARS else a
    if array.dtype.kind in "biu":  # both are whole: promotion has seen to it
        return np.true_divide(a, b, dtype=dtypes.get_default_dtype().numpy)
    return np.true_divide(a, b)


def _whole(function: Callable[[Any, Any], Any]) -> Any:
    """A division that refuses integers divided by zero, as torch does."""

    def forward(a: Any, b: Any) -> Any:
        out = function(a, b)
        if out.dtype.kind in "iu" and not np.all(b):
            raise RuntimeError("ZeroDivisionError: integer division by zero")
        return out

    return forward


def _truncated(a: Any, b: Any) -> Any:
    down = np.floor_divide(a, b)
    if down.dtype.kind in "iu":
        return down + ((down < 0) & (down * b != a))
    return np.trunc(np.true_divide(a, b))


def _no_vjp(n: Any, g: Any) -> Any:
    raise RuntimeError(
        "derivative for floor_divide is not implemented: detach its operands, or call "
        "div(..., rounding_mode='floor'), whose gradient is zero"
    )


def _both_flat(n: Any, g: Any) -> Any:
    return zeros_like(g), zeros_like(g)


quotient = define(
    "div", _divide, promote=ARITHMETIC, saves="a b", sample=_pair(0.5, 2.0),
    vjp=lambda n, g: (g / n.b, -g * n.a / (n.b * n.b) if n.needs[1] else None),
)  # fmt: skip
floor_divide = define(
    "floor_divide", _whole(np.floor_divide), promote=ARITHMETIC, vjp=_no_vjp
)  # fmt: skip
_div_floor = define(
    "div_floor", _whole(np.floor_divide), promote=ARITHMETIC, vjp=_both_flat,
    sample=_pair(0.55, 1.9),
)  # fmt: skip
_div_trunc = define(
    "div_trunc", _whole(_truncated), promote=ARITHMETIC, vjp=_both_flat, sample=_pair(0.55, 1.9)
)  # fmt: skip
remainder = define(
    "remainder", _whole(np.remainder), promote=ARITHMETIC, saves="a b", sample=_pair(0.5, 2.0),
    vjp=lambda n, g: (g, -g * floor(n.a / n.b) if n.needs[1] else None),
)  # fmt: skip
fmod = define(
    "fmod", _whole(np.fmod), promote=ARITHMETIC, saves="a b", sample=_pair(0.5, 2.0),
    vjp=lambda n, g: (g, -g * trunc(n.a / n.b) if n.needs[1] else None),
)  # fmt: skip


def div(input: Any, other: Any, *, rounding_mode: str | None = None) -> Any:
    """`input / other`, rounded down ("floor"), towards zero ("trunc") or not (None).

    Source: torch.div.
    """
    if rounding_mode is None:
        return quotient(input, other)
    if rounding_mode == "floor":
        return _div_floor(input, other)
    if rounding_mode == "trunc":
        return _div_trunc(input, other)
    raise RuntimeError(
        "div expected rounding_mode to be one of None, 'trunc', or 'floor' but found "
        f"'{rounding_mode}'"
    )


# What an in-place form of these does: see `ops.inplace.update`.
add.op, sub.op, div.op = plus.op, minus.op, quotient.op  # type: ignore[attr-defined]


# --- powers and the like -------------------------------------------------------------------------


def _power(a: Any, b: Any) -> Any:
    if b.__class__ in SCALARS and b == 3:
        return a * a * a  # many times faster than the general power
    try:
        return np.power(a, b)
    except ValueError:
        raise RuntimeError("Integers to negative integer powers are not allowed.") from None


def _base_slope(a: Any, b: Any) -> Any:
    """d(a^b)/da = b a^(b-1); 0 where b = 0, whatever a is."""
    if b.__class__ in SCALARS:
        return b * a ** (b - 1) if b else zeros_like(a)
    return where(b == 0, 0.0, b * a ** (b - 1))


def _safe_log(a: Any) -> Any:
    """log(a), and 0 for a = 0: the factor of d(a^b)/db = a^b log(a)."""
    if a.__class__ in SCALARS:
        return math.log(a) if a > 0 else math.nan if a else 0.0
    return log(where(a == 0, 1.0, a))


class _Powers(Arithmetic):
    """Arithmetic that leaves an exponent a number: 3 has a faster way, 0 its own slope."""

    numbers_as_arrays = False


power = define(
    "pow", _power, promote=_Powers(), saves="a b y", sample=_pair(0.5, 2.0),
    vjp=lambda n, g: (
        g * _base_slope(n.a, n.b) if n.needs[0] else None,
        g * (n.y * _safe_log(n.a)) if n.needs[1] else None,
    ),
)  # fmt: skip


def pow(input: Any, exponent: Any) -> Any:
    """`input` to the power `exponent`; numbers and tensors on either side. Source: torch.pow."""
    if exponent.__class__ in SCALARS and isinstance(input, Value):
        kind = input._data.dtype.kind
        if exponent == 2 and kind != "b":
            return square(input)
        if exponent == 0.5 and kind not in "biu":
            return sqrt(input)
    return power(input, exponent)


atan2 = define(
    "atan2", np.arctan2, promote=ARITHMETIC, saves="a b", sample=_pair(0.5, 2.0),
    vjp=lambda n, g: (g * n.b / (n.a * n.a + n.b * n.b), -g * n.a / (n.a * n.a + n.b * n.b)),
)  # fmt: skip
hypot = define(
    "hypot", np.hypot, promote=ARITHMETIC, saves="a b y", sample=_pair(0.5, 2.0),
    vjp=lambda n, g: (g * n.a / n.y, g * n.b / n.y),
)  # fmt: skip
logaddexp = define(
    "logaddexp", np.logaddexp, promote=ARITHMETIC, saves="a b y", sample=_pair(),
    vjp=lambda n, g: (g * exp(n.a - n.y), g * exp(n.b - n.y)),
)  # fmt: skip


def xlogy(input: Any, other: Any) -> Any:
    """`input * log(other)`, 0 where input is 0 (unless other is nan). Source: torch.xlogy."""
    harmless = (input == 0) & (other <= 0)
    return where(harmless, 0.0, input * log(where(harmless, 1.0, other)))


# --- limits --------------------------------------------------------------------------------------


def _winner_vjp(n: Any, g: Any, a_loses: Any, b_loses: Any) -> Any:
    """The larger (smaller) one gets the gradient; ties get half each (torch.maximum)."""
    shared = where(n.a == n.b, g * 0.5, g)
    return where(a_loses, 0.0, shared), where(b_loses, 0.0, shared)


maximum = define(
    "maximum", np.maximum, promote=ARITHMETIC, saves="a b", sample=_pair(),
    vjp=lambda n, g: _winner_vjp(n, g, n.a < n.b, n.b < n.a),
)  # fmt: skip
minimum = define(
    "minimum", np.minimum, promote=ARITHMETIC, saves="a b", sample=_pair(),
    vjp=lambda n, g: _winner_vjp(n, g, n.a > n.b, n.b > n.a),
)  # fmt: skip


def clamp(input: Any, min: Any = None, max: Any = None) -> Any:
    """Values limited to [min, max] (numbers or tensors, one may be None).

    The gradient passes where the value was within the limits, both ends included.
    Source: torch.clamp.
    """
    if min is None and max is None:
        raise RuntimeError("torch.clamp: At least one of 'min' or 'max' must not be None")
    if isinstance(min, Value) or isinstance(max, Value):
        low = input if min is None else where(input < min, min, input)
        return low if max is None else where(low > max, max, low)
    if (
        isinstance(input, Value)
        and input._data.dtype.kind in "iub"
        and float
        in (
            min.__class__,
            max.__class__,
        )
    ):
        input = cast(input, dtype=dtypes.get_default_dtype())
    return _clamp(input, min=min, max=max)


def clamp_min(input: Any, min: Any) -> Any:
    """`clamp` from below. Source: torch.clamp_min."""
    return clamp(input, min=min)


def clamp_max(input: Any, max: Any) -> Any:
    """`clamp` from above. Source: torch.clamp_max."""
    return clamp(input, max=max)


def _clip(x: np.ndarray, *, min: Any, max: Any) -> Any:
    kind = x.dtype.type
    low, high = None if min is None else kind(min), None if max is None else kind(max)
    return np.clip(x, low, high).astype(x.dtype, copy=False)  # of bfloat16 NumPy makes float32


def _clamp_vjp(n: Any, g: Any) -> Any:
    inside = n.x == n.x if n.min is None else n.x >= n.min
    if n.max is not None:
        inside = inside & (n.x <= n.max)
    return (where(inside, g, 0.0),)


_clamp = define(
    "clamp", _clip, saves="x", vjp=_clamp_vjp,
    sample=lambda: [((np.linspace(-2, 2, 9),), {"min": -0.9, "max": 0.7}),
                    ((np.linspace(-2, 2, 9),), {"min": None, "max": 0.7})],
)  # fmt: skip
