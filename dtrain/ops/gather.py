"""Along one dimension: gather, scatter and their like; masks that fill and select.

Index tensors are integer; their gradients, where an entry is named twice, add up in order.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dtrain import dtypes
from dtrain.autograd.node import make
from dtrain.autograd.op import define
from dtrain.autograd.promotion import cast
from dtrain.autograd.value import Value, array_of, need_whole
from dtrain.ops.compare import where
from dtrain.ops.index import getitem, place
from dtrain.ops.shape import axis_of, broadcast_to, reshape


def _rand(*shape: int) -> np.ndarray:
    return np.random.RandomState(0).rand(*shape)


# --- gather and scatter --------------------------------------------------------------------------


def take_along_dim(input: Any, indices: Any, dim: int | None = None) -> Any:
    """`out[i][j] = input[i][indices[i][j]]` for dim = 1; sizes broadcast. dim None: as vectors.

    Source: torch.take_along_dim.
    """
    if dim is None:
        input, indices, dim = reshape(input, (-1,)), reshape(indices, (-1,)), 0
    axis = axis_of(dim, input.ndim)
    shape, wanted = list(input.shape), list(indices.shape)
    if shape[:axis] + shape[axis + 1 :] != wanted[:axis] + wanted[axis + 1 :]:
        both = np.broadcast_shapes(_without(shape, axis), _without(wanted, axis))
        input = broadcast_to(input, (*both[:axis], shape[axis], *both[axis:]))
        indices = broadcast_to(indices, (*both[:axis], wanted[axis], *both[axis:]))
    return _gather(input, indices, dim=axis)


def _without(shape: list[int], axis: int) -> tuple[int, ...]:
    return (*shape[:axis], *shape[axis + 1 :])


def _check_gather(x: np.ndarray, index: np.ndarray, dim: int, name: str) -> None:
    if index.dtype.kind not in "iu":
        raise RuntimeError(f"{name}(): Expected dtype int32/int64 for index, got {index.dtype}")
    if index.ndim != x.ndim:
        raise RuntimeError(
            "Index tensor must have the same number of dimensions as input tensor "
            f"(got {index.ndim} and {x.ndim})"
        )
    if index.size and (index.min() < 0 or index.max() >= x.shape[dim]):
        bad = index[(index < 0) | (index >= x.shape[dim])].reshape(-1)[0]
        raise RuntimeError(
            f"index {bad} is out of bounds for dimension {dim} with size {x.shape[dim]}"
        )


def _crop(x: np.ndarray, index: np.ndarray, dim: int) -> np.ndarray:
    """`x` cut to the index's sizes except along dim: gather may use less than all of x."""
    return x[tuple(slice(None) if d == dim else slice(n) for d, n in enumerate(index.shape))]


def _gather_vjp(n: Any, g: Any) -> Any:
    nothing = np.zeros(n.shapes[0], array_of(g).dtype)
    return _scatter_add(nothing, n.index, g, dim=n.dim), None


_gather = define(
    "gather", lambda x, index, *, dim: np.take_along_axis(x, index, dim), inputs="x index",
    saves="index", vjp=_gather_vjp,
    sample=lambda: [((_rand(3, 4), np.array([[0, 1], [2, 2], [3, 0]])), {"dim": 1})],
)  # fmt: skip


def gather(input: Any, dim: int, index: Any) -> Any:
    """`out[i][j] = input[i][index[i][j]]` for dim = 1; `out` has index's shape. Source: torch."""
    if input.ndim == 0:
        return reshape(gather(reshape(input, (1,)), dim, reshape(index, (-1,))), index.shape)
    axis = axis_of(dim, input.ndim)
    x, i = array_of(input), array_of(index)
    _check_gather(x, i, axis, "gather")
    for d, (have, want) in enumerate(zip(x.shape, i.shape, strict=True)):
        if d != axis and want > have:
            raise RuntimeError(
                f"Size does not match at dimension {d} expected index {list(i.shape)} to be no "
                f"larger than self {list(x.shape)} apart from dimension {axis}"
            )
        if d != axis and want < have:
            input = input[tuple(slice(None) if k == axis else slice(n)
                                for k, n in enumerate(i.shape))]  # fmt: skip
    return _gather(input, index, dim=axis)


def _along(index: np.ndarray, dim: int) -> tuple[Any, ...]:
    """A full index for `x[...]` that moves only along dim."""
    grid = list(np.ogrid[tuple(slice(n) for n in index.shape)])
    grid[dim] = index
    return tuple(grid)


def _gathered(n: Any, g: Any) -> Any:
    """The gradient of a scattered source: zero where the index was smaller than it."""
    found = gather(g, n.dim, n.index)
    shape = n.shapes[2]
    if not shape:
        return found.sum()
    if tuple(found.shape) == shape:
        return found
    part = tuple([slice(size) for size in found.shape])
    return place(found, index=part, shape=shape, unique=True)


def _scatter_add_forward(
    x: np.ndarray, index: np.ndarray, source: np.ndarray, *, dim: int
) -> np.ndarray:
    out = x.copy(order="C")
    source = _crop(source, index, dim)
    if index.shape[dim] == 1:  # nothing can be named twice
        out[_along(index, dim)] += source
    else:  # NumPy's unbuffered add is fast along one flat axis only
        places = np.ravel_multi_index(_along(index, dim), x.shape)
        np.add.at(out.reshape(-1), places.reshape(-1), source.reshape(-1))
    return out


_scatter_add = define(
    "scatter_add", _scatter_add_forward, inputs="x index source", saves="index",
    vjp=lambda n, g: (g, None, _gathered(n, g) if n.needs[2] else None),
    sample=lambda: [((_rand(3, 4), np.array([[0, 1], [2, 2], [3, 0]]), _rand(3, 2)), {"dim": 1})],
)  # fmt: skip


def scatter_add(input: Any, dim: int, index: Any, src: Any) -> Any:
    """`out = input; out[i][index[i][j]] += src[i][j]` for dim = 1. Source: torch.scatter_add."""
    axis = axis_of(dim, input.ndim)
    x, i = array_of(input), array_of(index)
    _check_gather(x, i, axis, "scatter_add")
    return _scatter_add(input, index, src, dim=axis)


def _scatter_forward(
    x: np.ndarray, index: np.ndarray, source: np.ndarray, *, dim: int
) -> np.ndarray:
    out = x.copy()
    out[_along(index, dim)] = _crop(source, index, dim) if source.ndim else source
    return out


def _scatter_vjp(n: Any, g: Any) -> Any:
    kept = None
    if n.needs[0]:
        keep = np.ones(n.shapes[0], bool)
        keep[_along(array_of(n.index), n.dim)] = False
        kept = where(keep, g, 0.0)
    return kept, None, _gathered(n, g) if n.needs[2] else None


_scatter = define(
    "scatter", _scatter_forward, inputs="x index source", saves="index", vjp=_scatter_vjp,
    sample=lambda: [((_rand(3, 4), np.array([[0, 1], [2, 3], [3, 0]]), _rand(3, 2)), {"dim": 1})],
)  # fmt: skip


def scatter(
    input: Any, dim: int, index: Any, src: Any = None, *, value: Any = None,
    reduce: str | None = None,
) -> Any:  # fmt: skip
    """`out = input; out[i][index[i][j]] = src[i][j]` for dim = 1; src (or `value`) may be a number.

    `reduce="add"` adds instead; "multiply" is not supported. Source: torch.scatter.
    """
    src = value if src is None else src
    if reduce is not None:
        return _scatter_reduced(input, dim, index, src, reduce)
    axis = axis_of(dim, input.ndim)
    x, i = array_of(input), array_of(index)
    _check_gather(x, i, axis, "scatter")
    if not isinstance(src, (Value, np.ndarray)):
        src = np.asarray(src, x.dtype)
    return _scatter(input, index, src, dim=axis)


def _scatter_reduced(input: Any, dim: int, index: Any, src: Any, reduce: str) -> Any:
    if reduce != "add":
        raise NotImplementedError(f"scatter(reduce={reduce!r}): only 'add' is supported")
    if not isinstance(src, (Value, np.ndarray)):
        src = make(np.full(index.shape, src, input._data.dtype))
    return scatter_add(input, dim, index, src)


# --- slices named by a vector of indices ---------------------------------------------------------


def _along_dim(dim: int, ndim: int, index: Any) -> tuple[Any, ...]:
    return (slice(None),) * axis_of(dim, ndim) + (index,)


def index_select(input: Any, dim: int, index: Any) -> Any:
    """The entries named by a 1-D index along `dim`, copied. Source: torch.index_select."""
    if index.ndim > 1:
        raise IndexError("index_select(): Index is supposed to be a vector")
    try:
        return getitem(input, _along_dim(dim, input.ndim, reshape(index, (-1,))))
    except IndexError as error:
        if "out of bounds" in str(error):
            raise IndexError(f"index out of range in self: {error}") from None
        raise


def index_add(input: Any, dim: int, index: Any, source: Any, *, alpha: Any = 1) -> Any:
    """`out = input; out[index[i]] += alpha * source[i]` for dim = 0. Source: torch.index_add."""
    shape = [1] * input.ndim
    shape[axis_of(dim, input.ndim)] = index.numel()
    wide = broadcast_to(reshape(index, shape), source.shape)
    return scatter_add(input, dim, wide, source if alpha == 1 else source * alpha)


def index_copy(input: Any, dim: int, index: Any, source: Any) -> Any:
    """`out = input; out[index[i]] = source[i]` for dim = 0. Source: torch.index_copy."""
    out = input.clone()
    out[_along_dim(dim, input.ndim, index)] = source
    return out


def index_fill(input: Any, dim: int, index: Any, value: Any) -> Any:
    """`out = input; out[index[i]] = value` for dim = 0, a number. Source: torch.index_fill."""
    out = input.clone()
    out[_along_dim(dim, input.ndim, index)] = value
    return out


def take(input: Any, index: Any) -> Any:
    """The elements at positions of the flattened tensor. Source: torch.take."""
    return getitem(reshape(input, (-1,)), index)


def nonzero(input: Any, *, as_tuple: bool = False) -> Any:
    """Indices of the non-zero elements: (count, ndim), or one vector per dimension.

    Source: torch.nonzero.
    """
    need_whole("nonzero", input)
    found = np.nonzero(np.atleast_1d(input._data))
    if as_tuple:
        return tuple(make(i) for i in found)
    return make(np.stack(found, 1)[:, : input.ndim])


def argwhere(input: Any) -> Any:
    """`nonzero`. Source: torch.argwhere."""
    return nonzero(input)


# --- masks ---------------------------------------------------------------------------------------


def _check_mask(mask: Any, name: str) -> None:
    mask = array_of(mask)
    if mask.dtype != np.bool_:
        raise RuntimeError(
            f"{name} only supports boolean masks, but got mask with dtype "
            f"{dtypes.from_numpy(mask.dtype).name}"
        )


def _masked_fill_forward(x: np.ndarray, mask: np.ndarray, *, value: Any) -> np.ndarray:
    return np.where(mask, x.dtype.type(value), x)


_masked_fill: Any = define(
    "masked_fill", _masked_fill_forward, inputs="x mask", saves="mask", broadcasts=True,
    vjp=lambda n, g: (_masked_fill(g, n.mask, value=0), None),
    sample=lambda: [((_rand(3, 4), _rand(3, 4) > 0.5), {"value": 2.0})],
)  # fmt: skip


def masked_fill(input: Any, mask: Any, value: Any) -> Any:
    """`value` (a number or a 0-d tensor) where `mask` is true; the mask broadcasts.

    Source: torch.masked_fill.
    """
    _check_mask(mask, "masked_fill")
    if isinstance(value, Value):
        if value._data.ndim:
            raise RuntimeError(
                "masked_fill only supports a 0-dimensional value tensor, but got tensor with "
                f"{value._data.ndim} dimension(s)."
            )
        if value._requires_grad:
            return where(mask, cast(value, dtype=dtypes.from_numpy(input._data.dtype)), input)
        value = value.item()  # type: ignore[attr-defined]
    return _masked_fill(input, mask, value=value)


def masked_select(input: Any, mask: Any) -> Any:
    """The elements where `mask` is true, as a vector; both broadcast. Source: torch."""
    _check_mask(mask, "masked_select")
    if input.shape != mask.shape:
        shape = np.broadcast_shapes(input.shape, mask.shape)
        input, mask = broadcast_to(input, shape), broadcast_to(mask, shape)
    return getitem(input, array_of(mask))
