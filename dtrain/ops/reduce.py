"""Reductions over dimensions: sums, means, products, extrema, variances, norms.

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
from dtrain.autograd.value import Value, array_of
from dtrain.ops import arithmetic, elementwise as ew
from dtrain.ops.compare import where
from dtrain.ops.gather import take_along_dim
from dtrain.ops.join import cat, narrow
from dtrain.ops.order import flip
from dtrain.ops.scan import cumprod
from dtrain.ops.shape import Dim, axes_of, axis_of, expand, numel, numpy_names, squeeze


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


_add_up: Any = np.add.reduce  # its stubs do not know a bool variable for keepdims


def total(x: Any, dim: tuple[int, ...], keepdim: bool) -> Any:
    """The sum in the array's dtype, of 16-bit floats added up in float32; of integers int64."""
    if x.dtype.kind in "biu":
        return _add_up(x, axis=dim, dtype=np.int64, keepdims=keepdim)
    if x.dtype.itemsize == 2:
        wide = _add_up(x, axis=dim, dtype=np.float32, keepdims=keepdim)
        return np.asarray(wide).astype(x.dtype)
    return _add_up(x, axis=dim, keepdims=keepdim)


_sum = define(
    "sum", lambda x, *, dim, keepdim: total(x, dim, keepdim), inputs="x", sample=_samples(),
    vjp=lambda n, g: (spread(g, n.dim, n.keepdim, n.shapes[0]),),
)  # fmt: skip


@numpy_names
def sum(
    input: Any, dim: Dim = None, keepdim: bool = False, *, dtype: dtypes.dtype | None = None
) -> Any:
    """The sum over `dim` (all by default), optionally after a cast. Source: torch.sum."""
    if dtype is not None:
        input = cast(input, dtype=dtype)
    return _sum(input, dim=axes_of(dim, input.ndim), keepdim=keepdim)


def nansum(
    input: Any, dim: Dim = None, keepdim: bool = False, *, dtype: dtypes.dtype | None = None
) -> Any:
    """The sum that takes nan for 0. Source: torch.nansum."""
    return sum(where(input != input, 0.0, input), dim, keepdim, dtype=dtype)


def count_of(shape: tuple[int, ...], axes: tuple[int, ...]) -> int:
    """How many elements a reduction over `axes` combines."""
    return math.prod([shape[a] for a in axes])


def _mean_forward(x: Any, *, dim: tuple[int, ...], keepdim: bool) -> Any:
    count = count_of(x.shape, dim) or math.nan
    if x.dtype.itemsize == 2:
        wide = _add_up(x, axis=dim, dtype=np.float32, keepdims=keepdim)
        return np.asarray(wide / count).astype(x.dtype)
    return _add_up(x, axis=dim, keepdims=keepdim) / count


def _mean_vjp(n: Any, g: Any) -> Any:
    count = count_of(n.shapes[0], n.dim) or math.nan
    return (spread(g / count, n.dim, n.keepdim, n.shapes[0]),)


_mean = define("mean", _mean_forward, vjp=_mean_vjp, inputs="x", sample=_samples())


@numpy_names
def mean(
    input: Any, dim: Dim = None, keepdim: bool = False, *, dtype: dtypes.dtype | None = None
) -> Any:
    """The mean over `dim`; floating or complex input. Source: torch.mean."""
    if dtype is not None:
        input = cast(input, dtype=dtype)
    kind = array_of(input).dtype
    if kind.kind in "biu":
        which = "Input" if dtype is None else "Optional"
        raise RuntimeError(
            f"mean(): could not infer output dtype. {which} dtype must be either a floating point "
            f"or complex dtype. Got: {dtypes.from_numpy(kind).scalar_type}"
        )
    return _mean(input, dim=axes_of(dim, input.ndim), keepdim=keepdim)


@numpy_names
def var(
    input: Any, dim: Dim | bool = None, unbiased: bool = True, keepdim: bool = False, *,
    correction: int | None = None,
) -> Any:  # fmt: skip
    """The variance over `dim`, divided by count - correction (1 unless said). Source: torch.var."""
    if isinstance(dim, bool):  # var(unbiased)
        return var(input, None, dim, keepdim, correction=correction)
    if array_of(input).dtype.kind in "biu":
        raise RuntimeError("std and var only support floating point and complex dtypes")
    axes = axes_of(dim, input.ndim)
    centred = input - _mean(input, dim=axes, keepdim=True)
    divisor = count_of(input.shape, axes) - (int(unbiased) if correction is None else correction)
    squares = _sum(ew.square(centred), dim=axes, keepdim=keepdim)
    return squares / divisor if divisor > 0 else squares * math.nan


@numpy_names
def std(
    input: Any, dim: Dim | bool = None, unbiased: bool = True, keepdim: bool = False, *,
    correction: int | None = None,
) -> Any:  # fmt: skip
    """The square root of `var`. Source: torch.std."""
    return ew.sqrt(var(input, dim, unbiased, keepdim, correction=correction))


def var_mean(
    input: Any, dim: Dim | bool = None, unbiased: bool = True, keepdim: bool = False, *,
    correction: int | None = None,
) -> tuple[Any, Any]:  # fmt: skip
    """(variance, mean). Source: torch.var_mean."""
    axes = None if isinstance(dim, bool) else dim
    return var(input, dim, unbiased, keepdim, correction=correction), mean(input, axes, keepdim)


def std_mean(
    input: Any, dim: Dim | bool = None, unbiased: bool = True, keepdim: bool = False, *,
    correction: int | None = None,
) -> tuple[Any, Any]:  # fmt: skip
    """(standard deviation, mean). Source: torch.std_mean."""
    spread, middle = var_mean(input, dim, unbiased, keepdim, correction=correction)
    return ew.sqrt(spread), middle


@numpy_names
def norm(
    input: Any, p: Any = "fro", dim: Dim = None, keepdim: bool = False,
    dtype: dtypes.dtype | None = None,
) -> Any:  # fmt: skip
    """The vector p-norm over `dim`; p a number, "fro" (2), inf or -inf. Source: torch.norm."""
    if dtype is not None:
        input = cast(input, dtype=dtype)
    kind = dtypes.from_numpy(array_of(input).dtype)
    if not (kind.is_floating_point or kind.is_complex):
        raise RuntimeError(
            "linalg.vector_norm: Expected a floating point or complex tensor as input. Got "
            f"{kind.scalar_type}"
        )
    if isinstance(p, str) and p != "fro":
        raise NotImplementedError(f"norm(p={p!r}): known are numbers, inf, -inf and 'fro'")
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
        return sum(cast(input != 0, dtype=kind), axes, keepdim)
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
    sample=lambda: [((np.array([[2.0, 0.8, 3.0], [1.0, 0.0, 0.5]]),), {"dim": 1, "keepdim": keep})
                    for keep in (False, True)],
)  # fmt: skip


@numpy_names
def prod(
    input: Any, dim: int | None = None, keepdim: bool = False, *, dtype: dtypes.dtype | None = None
) -> Any:
    """The product of all elements or along `dim`; integers give int64. Source: torch.prod."""
    if dtype is not None:
        input = cast(input, dtype=dtype)
    elif array_of(input).dtype.kind in "biu":
        input = cast(input, dtype=dtypes.int64)
    if dim is None:
        return _prod(input.reshape(-1), dim=0, keepdim=False)
    return _prod(input, dim=axis_of(dim, input.ndim), keepdim=keepdim)


# --- extrema -----------------------------------------------------------------------------------


def _extremum_vjp(n: Any, g: Any) -> Any:
    # ties share the gradient evenly (torch.amax)
    y = spread(n.y, n.dim, n.keepdim, n.shapes[0])
    hit = n.x == y
    if np.isnan(array_of(n.y)).any():
        hit = hit | ((n.x != n.x) & (y != y))
    ties = spread(sum(hit, n.dim, True), n.dim, True, n.shapes[0])
    return (where(hit, spread(g, n.dim, n.keepdim, n.shapes[0]), 0.0) / cast(ties, dtype=_kind(g)),)


def _kind(g: Any) -> dtypes.dtype:
    return dtypes.from_numpy(array_of(g).dtype)


def _check_reducible(x: Any, dim: Any, name: str) -> None:
    """An extremum of nothing has no value; torch's sentences."""
    if numel(x):
        return
    if dim is None:
        raise RuntimeError(
            f"{name}(): Expected reduction dim to be specified for input.numel() == 0. Specify "
            "the reduction dim with the 'dim' argument."
        )
    for axis in (dim,) if isinstance(dim, int) else dim:
        if x.shape[axis] == 0:
            raise IndexError(f"{name}(): Expected reduction dim {axis} to have non-zero size.")


_amax = define(
    "amax", lambda x, *, dim, keepdim: np.maximum.reduce(x, axis=dim, keepdims=keepdim),
    inputs="x", saves="x y", vjp=_extremum_vjp, sample=_samples(),
)  # fmt: skip
_amin = define(
    "amin", lambda x, *, dim, keepdim: np.minimum.reduce(x, axis=dim, keepdims=keepdim),
    inputs="x", saves="x y", vjp=_extremum_vjp, sample=_samples(),
)  # fmt: skip


@numpy_names
def amax(input: Any, dim: Dim = (), keepdim: bool = False) -> Any:
    """The maximum over `dim`; ties share the gradient. Source: torch.amax."""
    axes = axes_of(dim, input.ndim)
    _check_reducible(input, axes, "amax")
    return _amax(input, dim=axes, keepdim=keepdim)


@numpy_names
def amin(input: Any, dim: Dim = (), keepdim: bool = False) -> Any:
    """The minimum over `dim`; ties share the gradient. Source: torch.amin."""
    axes = axes_of(dim, input.ndim)
    _check_reducible(input, axes, "amin")
    return _amin(input, dim=axes, keepdim=keepdim)


class values_and_indices(NamedTuple):
    """What `max(dim)`, `min(dim)`, `sort` and `topk` return."""

    values: Any
    indices: Any


@numpy_names
def argmax(input: Any, dim: int | None = None, keepdim: bool = False) -> Any:
    """The index (int64) of the first maximum along `dim`, or of all. Source: torch.argmax."""
    return _argmax(input, dim=_scan_axis(input, dim, "argmax"), keepdim=keepdim)


@numpy_names
def argmin(input: Any, dim: int | None = None, keepdim: bool = False) -> Any:
    """The index (int64) of the first minimum along `dim`, or of all. Source: torch.argmin."""
    return _argmin(input, dim=_scan_axis(input, dim, "argmin"), keepdim=keepdim)


def _scan_axis(input: Any, dim: int | None, name: str) -> int | None:
    axis = None if dim is None or input.ndim == 0 else axis_of(dim, input.ndim)
    _check_reducible(input, axis, name)
    return axis


_argmax = define(
    "argmax", lambda x, *, dim, keepdim: np.argmax(x, axis=dim, keepdims=keepdim), inputs="x"
)
_argmin = define(
    "argmin", lambda x, *, dim, keepdim: np.argmin(x, axis=dim, keepdims=keepdim), inputs="x"
)


def _extremum(input: Any, args: tuple[Any, ...], keepdim: bool, name: str) -> Any:
    largest = name == "max"
    reduced, argument = (_amax, argmax) if largest else (_amin, argmin)
    if not args:
        _check_reducible(input, None, name)
        return reduced(input, dim=axes_of(None, input.ndim), keepdim=False)
    if isinstance(args[0], Value):
        return (arithmetic.maximum if largest else arithmetic.minimum)(input, args[0])
    dim = axis_of(args[0], input.ndim)
    keep = args[1] if len(args) > 1 else keepdim
    if input.ndim == 0:
        return values_and_indices(input.reshape(()), argument(input))
    _check_reducible(input, dim, name)
    index = argument(input, dim, True)
    values = take_along_dim(input, index, dim)
    if not keep:
        values, index = squeeze(values, dim), squeeze(index, dim)
    return values_and_indices(values, index)


@numpy_names
def max(input: Any, *args: Any, dim: int | None = None, keepdim: bool = False,
        other: Any = None) -> Any:  # fmt: skip
    """`max(x)`: the largest element; `max(x, dim)`: (values, indices); `max(x, y)`: elementwise.

    Source: torch.max.
    """
    args = args or tuple(v for v in (other if dim is None else dim,) if v is not None)
    return _extremum(input, args, keepdim, "max")


@numpy_names
def min(input: Any, *args: Any, dim: int | None = None, keepdim: bool = False,
        other: Any = None) -> Any:  # fmt: skip
    """`min(x)`: the smallest element; `min(x, dim)`: (values, indices); `min(x, y)`: elementwise.

    Source: torch.min.
    """
    args = args or tuple(v for v in (other if dim is None else dim,) if v is not None)
    return _extremum(input, args, keepdim, "min")


def aminmax(input: Any, *, dim: int | None = None, keepdim: bool = False) -> tuple[Any, Any]:
    """(smallest, largest) over `dim` or of all. Source: torch.aminmax."""
    return amin(input, dim, keepdim), amax(input, dim, keepdim)


# --- logic -------------------------------------------------------------------------------------


def _logical(function: np.ufunc) -> Any:
    """A reduction to bool; of uint8, torch's old bool, to uint8."""

    def forward(x: np.ndarray, *, dim: tuple[int, ...], keepdim: bool) -> np.ndarray:
        out = np.asarray(function.reduce(x, axis=dim, keepdims=keepdim))
        return out.astype(np.uint8) if x.dtype == np.uint8 else out

    return forward


_any = define("any", _logical(np.logical_or))
_all = define("all", _logical(np.logical_and))


@numpy_names
def any(input: Any, dim: Dim = None, keepdim: bool = False) -> Any:
    """Whether any element is non-zero, over `dim`. Source: torch.any."""
    return _any(input, dim=axes_of(dim, input.ndim), keepdim=keepdim)


@numpy_names
def all(input: Any, dim: Dim = None, keepdim: bool = False) -> Any:
    """Whether all elements are non-zero, over `dim`. Source: torch.all."""
    return _all(input, dim=axes_of(dim, input.ndim), keepdim=keepdim)


def count_nonzero(input: Any, dim: Dim = None) -> Any:
    """How many elements are non-zero, over `dim`. Source: torch.count_nonzero."""
    return sum(input != 0, dim)


# --- log of a sum of exponentials ----------------------------------------------------------------


def _logsumexp_forward(x: np.ndarray, *, dim: tuple[int, ...], keepdim: bool) -> np.ndarray:
    top = np.maximum.reduce(x, axis=dim, keepdims=True)
    top = np.where(np.isfinite(top), top, x.dtype.type(0))
    total = np.log(np.add.reduce(np.exp(x - top), axis=dim, keepdims=True)) + top
    return total if keepdim else total.squeeze(dim)


def _logsumexp_vjp(n: Any, g: Any) -> Any:
    # softmax(x) . g, and nothing where all is -inf
    y = spread(n.y, n.dim, n.keepdim, n.shapes[0])
    share = where(y == -math.inf, 0.0, ew.exp(n.x - y))
    return (spread(g, n.dim, n.keepdim, n.shapes[0]) * share,)


_logsumexp = define(
    "logsumexp", _logsumexp_forward, saves="x y", vjp=_logsumexp_vjp, sample=_samples()
)


def logsumexp(input: Any, dim: Dim, keepdim: bool = False) -> Any:
    """log(sum(exp(x))) over `dim` without overflow. Source: torch.logsumexp."""
    if array_of(input).dtype.kind in "biu":
        input = cast(input, dtype=dtypes.get_default_dtype())
    return _logsumexp(input, dim=axes_of(dim, input.ndim), keepdim=keepdim)
