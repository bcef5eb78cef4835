"""Comparison, logic and selection: bool tensors, and what is chosen with them.

Comparisons are never differentiable; `where` passes its gradient to what it chose.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dtrain import dtypes
from dtrain.autograd.node import make
from dtrain.autograd.op import define
from dtrain.autograd.promotion import ARITHMETIC, COMPARISON, together
from dtrain.autograd.value import Value, need_whole

eq = define("eq", np.equal, promote=COMPARISON)
ne = define("ne", np.not_equal, promote=COMPARISON)
lt = define("lt", np.less, promote=COMPARISON)
le = define("le", np.less_equal, promote=COMPARISON)
gt = define("gt", np.greater, promote=COMPARISON)
ge = define("ge", np.greater_equal, promote=COMPARISON)
logical_and = define("logical_and", np.logical_and)
logical_or = define("logical_or", np.logical_or)
logical_xor = define("logical_xor", np.logical_xor)
logical_not = define("logical_not", np.logical_not)
bitwise_and = define("bitwise_and", np.bitwise_and, promote=ARITHMETIC)
bitwise_or = define("bitwise_or", np.bitwise_or, promote=ARITHMETIC)
bitwise_xor = define("bitwise_xor", np.bitwise_xor, promote=ARITHMETIC)
bitwise_left_shift = define("bitwise_left_shift", np.left_shift, promote=ARITHMETIC)
bitwise_right_shift = define("bitwise_right_shift", np.right_shift, promote=ARITHMETIC)
bitwise_not = define("bitwise_not", np.invert)
isnan = define("isnan", np.isnan)
isinf = define("isinf", np.isinf)
isfinite = define("isfinite", np.isfinite)
isposinf = define("isposinf", lambda x: x == np.inf)
isneginf = define("isneginf", lambda x: x == -np.inf)
signbit = define("signbit", lambda x: np.signbit(x) if x.dtype.kind != "b" else x & False)


# --- selection -----------------------------------------------------------------------------------


def _where_vjp(n: Any, g: Any) -> Any:
    zero = np.zeros((), g._data.dtype if isinstance(g, Value) else g.dtype)
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
        need_whole("where", condition)
        return tuple(make(i) for i in np.nonzero(condition._data))
    if isinstance(condition, Value) or isinstance(input, Value) or isinstance(other, Value):
        input, other = together(input, other)
        if isinstance(condition, Value) and condition._data.dtype != np.bool_:
            raise RuntimeError(
                "where expected condition to be a boolean tensor, but got a tensor with dtype "
                f"{dtypes.from_numpy(condition._data.dtype).scalar_type}"
            )
    elif not isinstance(other, np.ndarray) or not isinstance(input, np.ndarray):
        known = next((v.dtype for v in (input, other) if isinstance(v, np.ndarray)), np.float64)
        input, other = np.asarray(input, known), np.asarray(other, known)
    return _where(condition, input, other)


# --- whole tensors -------------------------------------------------------------------------------


def isclose(
    input: Any, other: Any, rtol: float = 1e-05, atol: float = 1e-08, equal_nan: bool = False
) -> Any:
    """Where `|input - other| <= atol + rtol * |other|`. Source: torch.isclose."""
    need_whole("isclose", input, other)
    _same_dtype(input, other)
    close = np.isclose(input._data, other._data, rtol=rtol, atol=atol, equal_nan=equal_nan)
    return make(close)


def _same_dtype(input: Any, other: Any) -> None:
    if input._data.dtype != other._data.dtype:
        a, b = (dtypes.from_numpy(v._data.dtype).scalar_type for v in (input, other))
        raise RuntimeError(f"{a} did not match {b}")


def allclose(
    input: Any, other: Any, rtol: float = 1e-05, atol: float = 1e-08, equal_nan: bool = False
) -> bool:
    """Whether `isclose` holds everywhere. Source: torch.allclose."""
    return bool(isclose(input, other, rtol, atol, equal_nan)._data.all())


def equal(input: Any, other: Any) -> bool:
    """Whether shapes and all elements are equal. Source: torch.equal."""
    need_whole("equal", input, other)
    return bool(np.array_equal(input._data, other._data))
