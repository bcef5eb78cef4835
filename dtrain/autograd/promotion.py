"""Bring operands of an op together: Python scalars, foreign arrays, different dtypes.

The fast path of an op handles equal dtypes and scalars that change nothing; everything else comes
here once, is cast by the differentiable `cast` op, and goes back to the op.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from dtrain import dtypes
from dtrain.autograd.node import make
from dtrain.autograd.op import SCALARS, define
from dtrain.autograd.value import Value, has_part
from dtrain.dtypes import Category


def _cast(x: np.ndarray, *, dtype: dtypes.dtype) -> np.ndarray:
    return x.astype(dtype.numpy)


def _uncast(n: Any, g: Any) -> tuple[Any]:
    return (cast(g, dtype=n.source),)


_cast_op = define(
    "cast", lambda x, *, dtype, source: _cast(x, dtype=dtype), inputs="x", vjp=_uncast,
    sample=lambda: [((np.array([1.5, 2.0]),), {"dtype": dtypes.float64, "source": dtypes.float64})],
)  # fmt: skip


def cast(x: Any, *, dtype: dtypes.dtype) -> Any:
    """`x` (Tensor or array) in another dtype; differentiable, the gradient is cast back."""
    source = dtypes.from_numpy((x._data if isinstance(x, Value) else np.asarray(x)).dtype)
    if source is dtype:
        return x
    if not isinstance(x, Value):
        return _cast(np.asarray(x), dtype=dtype)
    if not (dtype.is_floating_point or dtype.is_complex):  # gradients end at the integers
        if has_part(x):
            return _cast_op(x.detach(), dtype=dtype, source=source)  # type: ignore[attr-defined]
        return make(_cast(x._data, dtype=dtype))
    return _cast_op(x, dtype=dtype, source=source)


def operand(value: Any) -> tuple[Any, tuple[dtypes.dtype, Category]]:
    """An operand as a Tensor or scalar, with what it brings into promotion."""
    if isinstance(value, Value):
        data = value._data
        rank = Category.DIMENSIONED if data.ndim else Category.ZERO_DIM
        return value, (dtypes.from_numpy(data.dtype), rank)
    if value.__class__ in SCALARS or isinstance(value, np.generic):
        return value, (dtypes.scalar_dtype(value), Category.SCALAR)
    if isinstance(value, np.ndarray):
        return operand(make(value))
    raise TypeError(f"unsupported operand type: expected a Tensor or a number, got {type(value)}")


def together(*values: Any, dtype: dtypes.dtype | None = None) -> list[Any]:
    """All operands as Tensors of their common dtype (or of `dtype`)."""
    pairs = [operand(v) for v in values]
    common = dtype or dtypes.result_type(*(kind for _, kind in pairs))
    return [
        cast(v, dtype=common) if isinstance(v, Value) else make(np.asarray(v).astype(common.numpy))
        for v, _ in pairs
    ]


class Arithmetic:
    """torch's type promotion: the common dtype of all operands.

    `keeps` holds (dtype kind of an array, class of a Python number) wherever the number leaves the
    array at its dtype, for NumPy as for torch. The op gets such a number as an array, unless
    `numbers_as_arrays` is False: then it may look at it.
    """

    numbers_as_arrays = True

    keeps = frozenset(
        [("f", c) for c in (bool, int, float)]
        + [(kind, c) for kind in "iu" for c in (bool, int)]
        + [("c", c) for c in (bool, int, float, complex)]
        + [("b", bool)]
    )

    def __call__(self, call: Callable[..., Any], a: Any, b: Any) -> Any:
        try:
            a, b = together(a, b)
        except TypeError:
            # Not ours: let the other operand's reflected method, or Python's TypeError, decide.
            return NotImplemented
        return call(a, b)


class Floating:
    """For functions that leave the integers (exp, sqrt ...): integer tensors become floating."""

    def __call__(self, call: Callable[..., Any], a: Any) -> Any:
        return call(cast(a, dtype=dtypes.get_default_dtype()))


class Comparison(Arithmetic):
    """Arithmetic where a number keeps its value though the dtype cannot hold it."""

    numbers_as_arrays = False


ARITHMETIC = Arithmetic()
COMPARISON = Comparison()
FLOATING = Floating()
