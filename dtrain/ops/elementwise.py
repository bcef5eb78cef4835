"""Pointwise ops: arithmetic, comparison, logic, exponentials and the like.

Gradient rules may return the broadcast shape; the engine sums it down to the input's.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dtrain import dtypes
from dtrain.autograd.node import make
from dtrain.autograd.op import define
from dtrain.autograd.promotion import ARITHMETIC, FLOATING, cast, together
from dtrain.autograd.value import Value


def _pair(low: float = -1.0, high: float = 1.0) -> Any:
    """Sample inputs of a binary op: equal shapes, a broadcast row, a scalar."""

    def sample() -> list[Any]:
        r = np.random.RandomState(0)
        shapes = [((3, 4), (3, 4)), ((2, 3, 4), (4,)), ((3, 1), (1, 2)), ((), (3,))]
        return [((r.uniform(low, high, a), r.uniform(low, high, b)), {}) for a, b in shapes]

    return sample


def _one(low: float = -1.0, high: float = 1.0) -> Any:
    def sample() -> list[Any]:
        r = np.random.RandomState(0)
        return [((r.uniform(low, high, shape),), {}) for shape in ((3, 4), (), (0, 2))]

    return sample


# --- arithmetic ------------------------------------------------------------------------------


def _subtract(a: Any, b: Any) -> Any:
    if getattr(a, "dtype", None) == np.bool_ and getattr(b, "dtype", None) == np.bool_:
        raise RuntimeError(
            "Subtraction, the `-` operator, with two bool tensors is not supported. Use the "
            "`^` or `logical_xor()` operator instead."
        )
    return np.subtract(a, b)


def _divide(a: Any, b: Any) -> Any:
    if a.dtype.kind in "iub" and getattr(b, "dtype", a.dtype).kind in "iub":
        a = a.astype(dtypes.get_default_dtype().numpy)
        b = np.asarray(b, a.dtype)
    return np.true_divide(a, b)


def _pow_vjp(n: Any, g: Any) -> Any:
    # d(a^b)/da = b a^(b-1), also right at a = 0 for b >= 1; d/db = a^b log a, and 0 at a = 0
    da = g * n.b * n.a ** (n.b - 1) if n.needs[0] else None
    db = g * n.y * log(where(n.a > 0, n.a, 1.0)) if n.needs[1] else None
    return da, db


add = define("add", np.add, promote=ARITHMETIC, vjp=lambda n, g: (g, g), sample=_pair())
sub = define("sub", _subtract, promote=ARITHMETIC, vjp=lambda n, g: (g, -g), sample=_pair())
mul = define(
    "mul", np.multiply, promote=ARITHMETIC, saves="a b", sample=_pair(),
    vjp=lambda n, g: (g * n.b if n.edges[0] is not None else None,
                      g * n.a if n.edges[1] is not None else None),
)  # fmt: skip
div = define(
    "div", _divide, promote=ARITHMETIC, saves="a b", sample=_pair(0.5, 2.0),
    vjp=lambda n, g: (g / n.b, -g * n.a / (n.b * n.b) if n.needs[1] else None),
)  # fmt: skip
power = define(
    "pow", np.power, promote=ARITHMETIC, saves="a b y", sample=_pair(0.5, 2.0), vjp=_pow_vjp
)
floor_divide = define("floor_divide", np.floor_divide, promote=ARITHMETIC)
remainder = define(
    "remainder", np.remainder, promote=ARITHMETIC, saves="a b", sample=_pair(0.5, 2.0),
    vjp=lambda n, g: (g, -g * floor(n.a / n.b) if n.needs[1] else None),
)  # fmt: skip
fmod = define("fmod", np.fmod, promote=ARITHMETIC)
atan2 = define(
    "atan2", np.arctan2, promote=ARITHMETIC, saves="a b", sample=_pair(0.5, 2.0),
    vjp=lambda n, g: (g * n.b / (n.a * n.a + n.b * n.b), -g * n.a / (n.a * n.a + n.b * n.b)),
)  # fmt: skip
neg = define("neg", np.negative, vjp=lambda n, g: (-g,), sample=_one())


def _share_of_maximum(n: Any, g: Any, first: Any) -> Any:
    """Ties share the gradient, half each (torch.maximum)."""
    half = where(n.a == n.b, 0.5, first)
    return g * half, g * (1 - half)


maximum = define(
    "maximum", np.maximum, promote=ARITHMETIC, saves="a b", sample=_pair(),
    vjp=lambda n, g: _share_of_maximum(n, g, where(n.a > n.b, 1.0, 0.0)),
)  # fmt: skip
minimum = define(
    "minimum", np.minimum, promote=ARITHMETIC, saves="a b", sample=_pair(),
    vjp=lambda n, g: _share_of_maximum(n, g, where(n.a < n.b, 1.0, 0.0)),
)  # fmt: skip


# --- functions of one argument ---------------------------------------------------------------

exp = define("exp", np.exp, promote=FLOATING, saves="y", vjp=lambda n, g: (g * n.y,), sample=_one())
expm1 = define(
    "expm1", np.expm1, promote=FLOATING, saves="y", vjp=lambda n, g: (g * (n.y + 1),), sample=_one()
)
log = define(
    "log", np.log, promote=FLOATING, saves="x", vjp=lambda n, g: (g / n.x,), sample=_one(0.5, 2)
)
log2 = define(
    "log2", np.log2, promote=FLOATING, saves="x", sample=_one(0.5, 2),
    vjp=lambda n, g: (g / (n.x * float(np.log(2))),),
)  # fmt: skip
log10 = define(
    "log10", np.log10, promote=FLOATING, saves="x", sample=_one(0.5, 2),
    vjp=lambda n, g: (g / (n.x * float(np.log(10))),),
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
cos = define("cos", np.cos, promote=FLOATING, saves="x", sample=_one(),
             vjp=lambda n, g: (-g * sin(n.x),))  # fmt: skip
tan = define("tan", np.tan, promote=FLOATING, saves="y", sample=_one(),
             vjp=lambda n, g: (g * (1 + n.y * n.y),))  # fmt: skip
atan = define("atan", np.arctan, promote=FLOATING, saves="x", sample=_one(),
              vjp=lambda n, g: (g / (1 + n.x * n.x),))  # fmt: skip
sinh = define("sinh", np.sinh, promote=FLOATING, saves="x", sample=_one(),
              vjp=lambda n, g: (g * cosh(n.x),))  # fmt: skip
cosh = define("cosh", np.cosh, promote=FLOATING, saves="x", sample=_one(),
              vjp=lambda n, g: (g * sinh(n.x),))  # fmt: skip
tanh = define("tanh", np.tanh, promote=FLOATING, saves="y", sample=_one(),
              vjp=lambda n, g: (g * (1 - n.y * n.y),))  # fmt: skip


def _sigmoid(x: np.ndarray) -> np.ndarray:
    # 1/(1+exp(-x)) overflows to inf and then 0 for very negative x, which is the right limit
    return 1 / (1 + np.exp(-x))


sigmoid = define("sigmoid", _sigmoid, promote=FLOATING, saves="y", sample=_one(),
                 vjp=lambda n, g: (g * n.y * (1 - n.y),))  # fmt: skip
reciprocal = define("reciprocal", lambda x: 1 / x, promote=FLOATING, saves="y",
                    sample=_one(0.5, 2), vjp=lambda n, g: (-g * n.y * n.y,))  # fmt: skip
square = define("square", np.square, saves="x", vjp=lambda n, g: (2 * g * n.x,), sample=_one())
abs = define("abs", np.abs, saves="x", vjp=lambda n, g: (g * sign(n.x),), sample=_one())

sign = define("sign", np.sign, vjp=lambda n, g: (g * 0,), sample=_one())
floor = define("floor", np.floor, vjp=lambda n, g: (g * 0,), sample=_one())
ceil = define("ceil", np.ceil, vjp=lambda n, g: (g * 0,), sample=_one())
trunc = define("trunc", np.trunc, vjp=lambda n, g: (g * 0,), sample=_one())
_round = define(
    "round", lambda x, *, decimals: np.round(x, decimals), inputs="x", vjp=lambda n, g: (g * 0,)
)


def round(input: Any, *, decimals: int = 0) -> Any:
    """Nearest, halves to even, to `decimals` digits. The gradient is zero. Source: torch.round."""
    return _round(input, decimals=decimals)


# --- comparison and logic: bool results, never differentiable ---------------------------------

eq = define("eq", np.equal, promote=ARITHMETIC)
ne = define("ne", np.not_equal, promote=ARITHMETIC)
lt = define("lt", np.less, promote=ARITHMETIC)
le = define("le", np.less_equal, promote=ARITHMETIC)
gt = define("gt", np.greater, promote=ARITHMETIC)
ge = define("ge", np.greater_equal, promote=ARITHMETIC)
logical_and = define("logical_and", np.logical_and)
logical_or = define("logical_or", np.logical_or)
logical_xor = define("logical_xor", np.logical_xor)
logical_not = define("logical_not", np.logical_not)
bitwise_and = define("bitwise_and", np.bitwise_and, promote=ARITHMETIC)
bitwise_or = define("bitwise_or", np.bitwise_or, promote=ARITHMETIC)
bitwise_xor = define("bitwise_xor", np.bitwise_xor, promote=ARITHMETIC)
bitwise_not = define("bitwise_not", np.invert)
isnan = define("isnan", np.isnan)
isinf = define("isinf", np.isinf)
isfinite = define("isfinite", np.isfinite)


# --- selection -------------------------------------------------------------------------------


def _where_vjp(n: Any, g: Any) -> Any:
    zero = g * 0 if isinstance(g, Value) else np.zeros((), g.dtype)
    return (
        None,
        _where(n.condition, g, zero) if n.needs[1] else None,
        _where(n.condition, zero, g) if n.needs[2] else None,
    )


def _where_sample() -> list[Any]:
    r = np.random.RandomState(0)
    return [((r.rand(3, 4) > 0.5, r.rand(3, 4), r.rand(4)), {})]


_where = define(
    "where", np.where, inputs="condition a b", saves="condition", broadcasts=True,
    vjp=_where_vjp, sample=_where_sample,
)  # fmt: skip


def where(condition: Any, input: Any = None, other: Any = None) -> Any:
    """`input` where `condition` (bool) holds, else `other`; all three broadcast.

    With the condition alone: a tuple of index tensors. Source: torch.where.
    """
    if input is None and other is None:
        return tuple(make(i) for i in np.nonzero(condition._data))
    if isinstance(condition, Value) or isinstance(input, Value) or isinstance(other, Value):
        input, other = together(input, other)
        if isinstance(condition, Value) and condition._data.dtype != np.bool_:
            raise RuntimeError(
                "where expected condition to be a boolean tensor, but got a tensor with dtype "
                f"{dtypes.from_numpy(condition._data.dtype)}"
            )
    elif not isinstance(other, np.ndarray) or not isinstance(input, np.ndarray):
        known = next((v.dtype for v in (input, other) if isinstance(v, np.ndarray)), np.float64)
        input, other = np.asarray(input, known), np.asarray(other, known)
    return _where(condition, input, other)


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
    if isinstance(input, Value) and input._data.dtype.kind in "iub":
        limits = [v for v in (min, max) if v is not None]
        if any(isinstance(v, float) for v in limits):
            input = cast(input, dtype=dtypes.get_default_dtype())
    return _clamp(input, min=min, max=max)


def _clip(x: np.ndarray, *, min: Any, max: Any) -> np.ndarray:
    kind = x.dtype.type
    return np.clip(x, None if min is None else kind(min), None if max is None else kind(max))


def _clamp_vjp(n: Any, g: Any) -> Any:
    inside = True
    if n.min is not None:
        inside = n.x >= n.min
    if n.max is not None:
        inside = (n.x <= n.max) & inside
    return (g * inside,)


_clamp = define(
    "clamp", _clip, saves="x", vjp=_clamp_vjp,
    sample=lambda: [((np.linspace(-2, 2, 9),), {"min": -0.9, "max": 0.7})],
)  # fmt: skip


def pow(input: Any, exponent: Any) -> Any:
    """`input` to the power `exponent`; numbers and tensors on either side.

    Exponents 2, 0.5 and 1 take the cheaper op. Source: torch.pow.
    """
    if exponent.__class__ in (int, float):
        if exponent == 2:
            return square(input)
        if exponent == 0.5 and input.dtype not in _INTEGERS:
            return sqrt(input)
    return power(input, exponent)


_INTEGERS = frozenset(
    d for d in dtypes.BY_NAME.values() if not (d.is_floating_point or d.is_complex)
)


def lerp(input: Any, end: Any, weight: Any) -> Any:
    """`input + weight * (end - input)`. Source: torch.lerp."""
    return input + weight * (end - input)
