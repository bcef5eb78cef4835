"""Scans along a dimension: running sums, products and extrema, and differences.

A scan keeps the shape of its input.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dtrain import dtypes
from dtrain.autograd.node import make
from dtrain.autograd.op import define
from dtrain.autograd.promotion import cast
from dtrain.autograd.value import array_of, need_whole
from dtrain.ops.gather import take_along_dim
from dtrain.ops.join import cat, narrow
from dtrain.ops.order import flip
from dtrain.ops.shape import axis_of, numpy_names


def _sample() -> list[Any]:
    return [((np.random.RandomState(0).rand(3, 4) + 0.5,), {"dim": d}) for d in (0, 1)]


def _accumulate(function: np.ufunc) -> Any:
    def forward(x: np.ndarray, *, dim: int) -> np.ndarray:
        return function.accumulate(x, axis=dim) if x.ndim else x.copy()

    return forward


def _reverse_cumsum(x: Any, dim: int) -> Any:
    return flip(_cumsum(flip(x, (dim,)), dim=dim), (dim,)) if x.ndim else x


_cumsum = define(
    "cumsum", _accumulate(np.add), vjp=lambda n, g: (_reverse_cumsum(g, n.dim),), sample=_sample
)


def _cumprod_vjp(n: Any, g: Any) -> Any:
    # sum over j >= i of g_j y_j / x_i; with zeros the products are formed without the factor x_i
    if not array_of(n.x).ndim:
        return (g,)
    if array_of(n.x).all():
        return (_reverse_cumsum(g * n.y, n.dim) / n.x,)
    size = n.shapes[0][n.dim]
    before = narrow(n.x, n.dim, 0, 1) ** 0
    parts = []
    for i in range(size):
        rest = narrow(n.x, n.dim, i + 1, size - i - 1)
        after = _cumprod(cat([before**0, rest], n.dim), dim=n.dim)
        weighted = narrow(g, n.dim, i, size - i) * after
        parts.append(before * narrow(_cumsum(weighted, dim=n.dim), n.dim, size - i - 1, 1))
        before = before * narrow(n.x, n.dim, i, 1)
    return (cat(parts, n.dim),)


_cumprod = define(
    "cumprod", _accumulate(np.multiply), saves="x y", vjp=_cumprod_vjp,
    sample=lambda: [*_sample(), ((np.array([[0.5, 0.0, 2.0, 1.5]]),), {"dim": 1})],
)  # fmt: skip


def _wide(input: Any, dtype: dtypes.dtype | None) -> Any:
    """Cast as asked; integers become int64."""
    if dtype is None and array_of(input).dtype.kind in "biu":
        dtype = dtypes.int64
    return input if dtype is None else cast(input, dtype=dtype)


@numpy_names
def cumsum(input: Any, dim: int, *, dtype: dtypes.dtype | None = None) -> Any:
    """Running sums along `dim`; integers give int64. Source: torch.cumsum."""
    return _cumsum(_wide(input, dtype), dim=axis_of(dim, input.ndim))


@numpy_names
def cumprod(input: Any, dim: int, *, dtype: dtypes.dtype | None = None) -> Any:
    """Running products along `dim`; integers give int64. Source: torch.cumprod."""
    return _cumprod(_wide(input, dtype), dim=axis_of(dim, input.ndim))


def _running(input: Any, dim: int, function: np.ufunc) -> tuple[Any, Any]:
    """Running extrema and where each stands, the latest among equals as in torch."""
    need_whole("a running extremum", input)
    axis = axis_of(dim, input.ndim)
    x = array_of(input)
    if x.ndim == 0:
        return input.clone(), make(np.zeros((), np.int64))
    best = function.accumulate(x, axis=axis)
    places = np.arange(x.shape[axis]).reshape([-1 if d == axis else 1 for d in range(x.ndim)])
    hits = (x == best) | (np.isnan(x) if x.dtype.kind == "f" else False)
    index = make(np.maximum.accumulate(np.where(hits, places, 0), axis=axis))
    return take_along_dim(input, index, axis), index


def cummax(input: Any, dim: int) -> tuple[Any, Any]:
    """(running maxima, their indices) along `dim`. Source: torch.cummax."""
    return _running(input, dim, np.maximum)


def cummin(input: Any, dim: int) -> tuple[Any, Any]:
    """(running minima, their indices) along `dim`. Source: torch.cummin."""
    return _running(input, dim, np.minimum)


def diff(input: Any, n: int = 1, dim: int = -1) -> Any:
    """Differences of neighbours along `dim`, `n` times. Source: torch.diff."""
    axis = axis_of(dim, input.ndim)
    if input.ndim == 0:
        raise RuntimeError("diff expects input to be at least one-dimensional")
    for _ in range(n):
        rest = input.shape[axis] - 1
        if rest < 0:
            return input
        late, early = narrow(input, axis, 1, rest), narrow(input, axis, 0, rest)
        input = late ^ early if array_of(input).dtype.kind == "b" else late - early
    return input
