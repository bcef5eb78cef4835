"""Reductions over dimensions: sums, means, extrema, variances, scans.

`dim` is None (all), an int or a tuple of ints; `keepdim` keeps reduced dimensions with size 1.
Integer sums are int64, as in torch.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from dtrain import dtypes
from dtrain.autograd.op import define
from dtrain.autograd.promotion import cast
from dtrain.autograd.value import Value
from dtrain.ops import arithmetic, elementwise as ew
from dtrain.ops.compare import where
from dtrain.ops.gather import take_along_dim
from dtrain.ops.join import cat, narrow
from dtrain.ops.order import flip
from dtrain.ops.shape import Dim, axes_of, axis_of, expand, squeeze


def spread(g: Any, axes: tuple[int, ...], keepdim: bool, shape: tuple[int, ...]) -> Any:
    """A reduced gradient back at the shape of the input (a broadcast view)."""
    if not keepdim and axes:
        g = g.reshape(tuple(1 if i in axes else n for i, n in enumerate(shape)))
    return expand(g, shape)


def _samples(**attrs: Any) -> Any:
    def sample() -> list[Any]:
        x = np.random.RandomState(0).permutation(24).reshape(2, 3, 4) / 10.0 + 0.1
        return [
            ((x,), {"dim": (1,), "keepdim": False, **attrs}),
            ((x,), {"dim": (0, 2), "keepdim": True, **attrs}),
            ((x,), {"dim": (0, 1, 2), "keepdim": False, **attrs}),
        ]

    return sample


# --- sums and means ----------------------------------------------------------------------------


def _sum_forward(x: np.ndarray, *, dim: tuple[int, ...], keepdim: bool) -> np.ndarray:
    kind = np.int64 if x.dtype.kind in "biu" else x.dtype
    return np.add.reduce(x, axis=dim, dtype=kind, keepdims=keepdim)


_sum = define(
    "sum", _sum_forward, sample=_samples(),
    vjp=lambda n, g: (spread(g, n.dim, n.keepdim, n.shapes[0]),),
)  # fmt: skip


def sum(
    input: Any, dim: Dim = None, keepdim: bool = False, *, dtype: dtypes.dtype | None = None
) -> Any:
    """The sum over `dim` (all by default), optionally after a cast. Source: torch.sum."""
    if dtype is not None:
        input = cast(input, dtype=dtype)
    return _sum(input, dim=axes_of(dim, input.ndim), keepdim=keepdim)


def count_of(shape: tuple[int, ...], axes: tuple[int, ...]) -> int:
    """How many elements a reduction over `axes` combines."""
    return math.prod(shape[a] for a in axes)


def mean(
    input: Any, dim: Dim = None, keepdim: bool = False, *, dtype: dtypes.dtype | None = None
) -> Any:
    """The mean over `dim`; floating or complex input. Source: torch.mean."""
    if dtype is not None:
        input = cast(input, dtype=dtype)
    if isinstance(input, Value) and input._data.dtype.kind in "biu":
        raise RuntimeError(
            "mean(): could not infer output dtype. Input dtype must be either a floating point or "
            f"complex dtype. Got: {dtypes.from_numpy(input._data.dtype).scalar_type}"
        )
    axes = axes_of(dim, input.ndim)
    count = count_of(input.shape, axes)
    return _sum(input, dim=axes, keepdim=keepdim) / (count if count else math.nan)


def var(
    input: Any, dim: Dim = None, unbiased: bool = True, keepdim: bool = False, *,
    correction: int | None = None,
) -> Any:  # fmt: skip
    """The variance over `dim`, divided by count - correction (1 unless said). Source: torch.var."""
    axes = axes_of(dim, input.ndim)
    centred = input - mean(input, axes, True)
    divisor = count_of(input.shape, axes) - (int(unbiased) if correction is None else correction)
    total = _sum(ew.square(centred), dim=axes, keepdim=keepdim)
    return total / divisor if divisor > 0 else total * math.nan


def std(
    input: Any, dim: Dim = None, unbiased: bool = True, keepdim: bool = False, *,
    correction: int | None = None,
) -> Any:  # fmt: skip
    """The square root of `var`. Source: torch.std."""
    return ew.sqrt(var(input, dim, unbiased, keepdim, correction=correction))


def norm(input: Any, p: Any = 2, dim: Dim = None, keepdim: bool = False) -> Any:
    """The vector p-norm over `dim`; p a number, "fro", inf or -inf. Source: torch.norm."""
    axes = axes_of(dim, input.ndim)
    if p in (2, "fro", None):
        return _norm2(input, dim=axes, keepdim=keepdim)
    if p == math.inf:
        return amax(ew.abs(input), axes, keepdim)
    if p == -math.inf:
        return amin(ew.abs(input), axes, keepdim)
    if p == 1:
        return _sum(ew.abs(input), dim=axes, keepdim=keepdim)
    if p == 0:
        return sum(cast(input != 0, dtype=dtypes.from_numpy(_array(input).dtype)), axes, keepdim)
    return _sum(ew.abs(input) ** p, dim=axes, keepdim=keepdim) ** (1.0 / p)


def _norm2_vjp(n: Any, g: Any) -> Any:
    # d|x|/dx = x / |x|, and 0 at the origin
    y = spread(n.y, n.dim, n.keepdim, n.shapes[0])
    safe = where(y == 0, 1.0, y)
    return (spread(g, n.dim, n.keepdim, n.shapes[0]) * n.x / safe,)


_norm2 = define(
    "norm", lambda x, *, dim, keepdim: np.sqrt(np.add.reduce(x * x, axis=dim, keepdims=keepdim)),
    inputs="x", saves="x y", vjp=_norm2_vjp, sample=_samples(),
)  # fmt: skip


def _prod_vjp(n: Any, g: Any) -> Any:
    # d prod / dx_i = product before i times product after i: right with zeros too
    x, axis, last = n.x, n.dim, n.shapes[0][n.dim] - 1
    if last < 0:
        return (x * 0,)
    one = narrow(x, axis, 0, 1) ** 0
    before = cat([one, narrow(cumprod(x, axis), axis, 0, last)], axis)
    suffix = flip(cumprod(flip(x, (axis,)), axis), (axis,))
    after = cat([narrow(suffix, axis, 1, last), one], axis)
    return (spread(g, (axis,), n.keepdim, n.shapes[0]) * before * after,)


_prod = define(
    "prod", lambda x, *, dim, keepdim: np.multiply.reduce(x, axis=dim, keepdims=keepdim),
    inputs="x", saves="x", vjp=_prod_vjp,
    sample=lambda: [((np.array([[2.0, 0.8, 3.0], [1.0, 4.0, 0.5]]),), {"dim": 1, "keepdim": False})],
)  # fmt: skip


def prod(
    input: Any, dim: int | None = None, keepdim: bool = False, *, dtype: dtypes.dtype | None = None
) -> Any:
    """The product of all elements or along `dim`; integers give int64. Source: torch.prod."""
    if dtype is not None:
        input = cast(input, dtype=dtype)
    elif _array(input).dtype.kind in "biu":
        input = cast(input, dtype=dtypes.int64)
    if dim is None:
        return _prod(input.reshape(-1), dim=0, keepdim=False)
    return _prod(input, dim=axis_of(dim, input.ndim), keepdim=keepdim)


def _array(x: Any) -> np.ndarray:
    return x._data if isinstance(x, Value) else x  # type: ignore[no-any-return]


# --- extrema -----------------------------------------------------------------------------------


def _extremum_vjp(n: Any, g: Any) -> Any:
    # ties share the gradient evenly (torch.amax)
    hit = n.x == spread(n.y, n.dim, n.keepdim, n.shapes[0])
    weight = hit * 1.0 if isinstance(g, Value) else hit.astype(g.dtype)
    share = weight / sum(weight, n.dim, True)
    return (spread(g, n.dim, n.keepdim, n.shapes[0]) * share,)


_amax = define(
    "amax", lambda x, *, dim, keepdim: np.maximum.reduce(x, axis=dim, keepdims=keepdim),
    inputs="x", saves="x y", vjp=_extremum_vjp, sample=_samples(),
)  # fmt: skip
_amin = define(
    "amin", lambda x, *, dim, keepdim: np.minimum.reduce(x, axis=dim, keepdims=keepdim),
    inputs="x", saves="x y", vjp=_extremum_vjp, sample=_samples(),
)  # fmt: skip


def amax(input: Any, dim: Dim = (), keepdim: bool = False) -> Any:
    """The maximum over `dim`; ties share the gradient. Source: torch.amax."""
    return _amax(input, dim=axes_of(dim, input.ndim), keepdim=keepdim)


def amin(input: Any, dim: Dim = (), keepdim: bool = False) -> Any:
    """The minimum over `dim`; ties share the gradient. Source: torch.amin."""
    return _amin(input, dim=axes_of(dim, input.ndim), keepdim=keepdim)


class values_and_indices(NamedTuple):
    """What `max(dim)`, `min(dim)`, `sort` and `topk` return."""

    values: Any
    indices: Any


def argmax(input: Any, dim: int | None = None, keepdim: bool = False) -> Any:
    """The index (int64) of the first maximum along `dim`, or of all. Source: torch.argmax."""
    return _argmax(input, dim=_scan_axis(input, dim), keepdim=keepdim)


def argmin(input: Any, dim: int | None = None, keepdim: bool = False) -> Any:
    """The index (int64) of the first minimum along `dim`, or of all. Source: torch.argmin."""
    return _argmin(input, dim=_scan_axis(input, dim), keepdim=keepdim)


def _scan_axis(input: Any, dim: int | None) -> int | None:
    if dim is None or input.ndim == 0:
        return None
    return axis_of(dim, input.ndim)


_argmax = define(
    "argmax", lambda x, *, dim, keepdim: np.argmax(x, axis=dim, keepdims=keepdim), inputs="x"
)
_argmin = define(
    "argmin", lambda x, *, dim, keepdim: np.argmin(x, axis=dim, keepdims=keepdim), inputs="x"
)


def _extremum(input: Any, args: tuple[Any, ...], keepdim: bool, which: Any) -> Any:
    reduced, argument, pairwise = which
    if not args:
        return reduced(input)
    if isinstance(args[0], Value):
        return pairwise(input, args[0])
    dim = axis_of(args[0], input.ndim)
    keep = args[1] if len(args) > 1 else keepdim
    if input.ndim == 0:
        return values_and_indices(input.reshape(()), argument(input))
    index = argument(input, dim, True)
    values = take_along_dim(input, index, dim)
    if not keep:
        values, index = squeeze(values, dim), squeeze(index, dim)
    return values_and_indices(values, index)


def max(input: Any, *args: Any, dim: int | None = None, keepdim: bool = False,
        other: Any = None) -> Any:  # fmt: skip
    """`max(x)`: the largest element; `max(x, dim)`: (values, indices); `max(x, y)`: elementwise.

    Source: torch.max.
    """
    args = args or tuple(v for v in (other if dim is None else dim,) if v is not None)
    return _extremum(input, args, keepdim, (amax, argmax, arithmetic.maximum))


def min(input: Any, *args: Any, dim: int | None = None, keepdim: bool = False,
        other: Any = None) -> Any:  # fmt: skip
    """`min(x)`: the smallest element; `min(x, dim)`: (values, indices); `min(x, y)`: elementwise.

    Source: torch.min.
    """
    args = args or tuple(v for v in (other if dim is None else dim,) if v is not None)
    return _extremum(input, args, keepdim, (amin, argmin, arithmetic.minimum))


# --- logic -------------------------------------------------------------------------------------

_any = define(
    "any", lambda x, *, dim, keepdim: np.logical_or.reduce(x, axis=dim, keepdims=keepdim),
    inputs="x",
)  # fmt: skip
_all = define(
    "all", lambda x, *, dim, keepdim: np.logical_and.reduce(x, axis=dim, keepdims=keepdim),
    inputs="x",
)  # fmt: skip


def any(input: Any, dim: Dim = None, keepdim: bool = False) -> Any:
    """Whether any element is non-zero, over `dim`. Source: torch.any."""
    return _any(input, dim=axes_of(dim, input.ndim), keepdim=keepdim)


def all(input: Any, dim: Dim = None, keepdim: bool = False) -> Any:
    """Whether all elements are non-zero, over `dim`. Source: torch.all."""
    return _all(input, dim=axes_of(dim, input.ndim), keepdim=keepdim)


def count_nonzero(input: Any, dim: Dim = None) -> Any:
    """How many elements are non-zero, over `dim`. Source: torch.count_nonzero."""
    return sum(input != 0, dim)


# --- scans -------------------------------------------------------------------------------------

_cumsum = define(
    "cumsum", lambda x, *, dim: np.add.accumulate(x, axis=dim), inputs="x",
    vjp=lambda n, g: (flip(_cumsum(flip(g, (n.dim,)), dim=n.dim), (n.dim,)),),
    sample=lambda: [((np.random.RandomState(0).rand(3, 4),), {"dim": 1})],
)  # fmt: skip
_cumprod = define(
    "cumprod", lambda x, *, dim: np.multiply.accumulate(x, axis=dim), inputs="x", saves="x y",
    # sum over j >= i of g_j y_j / x_i; right for non-zero inputs
    vjp=lambda n, g: (
        flip(_cumsum(flip(g * n.y, (n.dim,)), dim=n.dim), (n.dim,)) / n.x,
    ),
    sample=lambda: [((np.random.RandomState(0).rand(3, 4) + 0.5,), {"dim": 0})],
)  # fmt: skip


def cumsum(input: Any, dim: int, *, dtype: dtypes.dtype | None = None) -> Any:
    """Running sums along `dim`; integers give int64. Source: torch.cumsum."""
    if dtype is not None:
        input = cast(input, dtype=dtype)
    elif _array(input).dtype.kind in "biu":
        input = cast(input, dtype=dtypes.int64)
    return _cumsum(input, dim=axis_of(dim, input.ndim))


def cumprod(input: Any, dim: int, *, dtype: dtypes.dtype | None = None) -> Any:
    """Running products along `dim`; its gradient needs non-zero inputs. Source: torch.cumprod."""
    if dtype is not None:
        input = cast(input, dtype=dtype)
    return _cumprod(input, dim=axis_of(dim, input.ndim))


def _logsumexp_forward(x: np.ndarray, *, dim: tuple[int, ...], keepdim: bool) -> np.ndarray:
    top = np.maximum.reduce(x, axis=dim, keepdims=True)
    top = np.where(np.isfinite(top), top, 0).astype(x.dtype)
    total = np.log(np.add.reduce(np.exp(x - top), axis=dim, keepdims=True)) + top
    return total if keepdim else total.squeeze(dim)


def _logsumexp_vjp(n: Any, g: Any) -> Any:
    y = spread(n.y, n.dim, n.keepdim, n.shapes[0])
    return (spread(g, n.dim, n.keepdim, n.shapes[0]) * ew.exp(n.x - y),)


_logsumexp = define(
    "logsumexp", _logsumexp_forward, saves="x y", vjp=_logsumexp_vjp, sample=_samples()
)


def logsumexp(input: Any, dim: Dim, keepdim: bool = False) -> Any:
    """log(sum(exp(x))) over `dim` without overflow. Source: torch.logsumexp."""
    return _logsumexp(input, dim=axes_of(dim, input.ndim), keepdim=keepdim)
