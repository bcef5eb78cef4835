"""Indexing: slices (views), masks and index tensors (copies), gather and scatter, embedding.

Index tensors are integer or bool. Repeated indices add up in gradients, in a fixed order.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dtrain.autograd.op import define
from dtrain.autograd.value import Value
from dtrain.ops.shape import axis_of


def _rand(*shape: int) -> np.ndarray:
    return np.random.RandomState(0).rand(*shape)


# --- x[index] ----------------------------------------------------------------------------------


def plain_index(index: Any) -> tuple[Any, bool]:
    """An index as NumPy takes it, and whether it selects a view (ints, slices, None, ...)."""
    parts = index if isinstance(index, tuple) else (index,)
    out = []
    basic = True
    for part in parts:
        if isinstance(part, Value):
            part = part._data
            if part.ndim == 0 and part.dtype.kind in "iu":
                part = int(part)
        elif isinstance(part, list):
            part = np.asarray([p._data if isinstance(p, Value) else p for p in part])
        if isinstance(part, np.ndarray) or part.__class__ is bool:
            basic = False
            if isinstance(part, np.ndarray) and part.size == 0 and part.dtype.kind == "f":
                part = part.astype(np.int64)  # x[[]] selects nothing
            if isinstance(part, np.ndarray) and part.dtype.kind not in "iub":
                raise IndexError(
                    "tensors used as indices must be long, int, byte or bool tensors, "
                    f"got {part.dtype}"
                )
        elif isinstance(part, slice):
            if part.step is not None and part.step <= 0:
                raise ValueError("step must be greater than zero")
        out.append(part)
    return tuple(out), basic


def _take(x: np.ndarray, index: Any) -> np.ndarray:
    try:
        return x[index]
    except IndexError as error:
        raise index_error(x, index, error) from None


def index_error(x: np.ndarray, index: tuple[Any, ...], error: IndexError) -> IndexError:
    """torch's sentence for a plain index out of range or too many of them."""
    used = sum(1 for i in index if i is not None and i is not Ellipsis)
    if used > x.ndim:
        if x.ndim == 0:
            return IndexError(
                "invalid index of a 0-dim tensor. Use `tensor.item()` in Python or "
                "`tensor.item<T>()` in C++ to convert a 0-dim tensor to a number"
            )
        return IndexError(f"too many indices for tensor of dimension {x.ndim}")
    dim = 0
    for i in index:
        if i is Ellipsis:
            break
        if i is None:
            continue
        if isinstance(i, int) and not -x.shape[dim] <= i < x.shape[dim]:
            return IndexError(
                f"index {i} is out of bounds for dimension {dim} with size {x.shape[dim]}"
            )
        dim += 1
    return error


def _place(g: np.ndarray, *, index: Any, shape: tuple[int, ...], unique: bool) -> np.ndarray:
    out = np.zeros(shape, g.dtype)
    if unique:
        out[index] = g
    else:
        np.add.at(out, index, g)
    return out


_place_op = define(
    "index_place", _place, vjp=lambda n, g: (_select(g, index=n.index, unique=n.unique),),
    sample=lambda: [((_rand(2, 3),), {"index": (np.array([1, 1]),), "shape": (4, 3),
                                      "unique": False})],
)  # fmt: skip


def _index_vjp(n: Any, g: Any) -> Any:
    return (_place_op(g, index=n.index, shape=n.shapes[0], unique=n.unique),)


_slice = define(
    "slice", lambda x, *, index, unique: _take(x, index), inputs="x", view=True, vjp=_index_vjp,
    sample=lambda: [((_rand(3, 4),), {"index": (1, slice(0, 3)), "unique": True})],
)  # fmt: skip
_select = define(
    "index", lambda x, *, index, unique: np.asarray(_take(x, index)), inputs="x", vjp=_index_vjp,
    sample=lambda: [((_rand(3, 4),), {"index": (np.array([0, 2, 2]),), "unique": False})],
)  # fmt: skip


def getitem(input: Any, index: Any) -> Any:
    """`input[index]`: a view for ints and slices, a copy for index tensors and masks."""
    plain, basic = plain_index(index)
    if basic:
        return _slice(input, index=plain, unique=True)
    masks = all(not isinstance(p, np.ndarray) or p.dtype.kind == "b" for p in plain)
    return _select(input, index=plain, unique=masks)


def _put_forward(x: np.ndarray, value: np.ndarray, *, index: Any) -> np.ndarray:
    out = x.copy()
    out[index] = value
    return out


def _put_vjp(n: Any, g: Any) -> Any:
    from_value = None
    if n.needs[1]:
        from_value = getitem(g, n.index)
    kept = None
    if n.needs[0]:
        keep = np.ones(n.shapes[0], bool)
        keep[n.index] = False
        kept = g * keep
    return kept, from_value


index_put = define(
    "index_put", _put_forward, inputs="x value", vjp=_put_vjp, broadcasts=True,
    sample=lambda: [((_rand(3, 4), _rand(4)), {"index": (slice(0, 2),)})],
)  # fmt: skip


# --- along one dimension -----------------------------------------------------------------------


def take_along_dim(input: Any, indices: Any, dim: int) -> Any:
    """`out[i][j] = input[i][indices[i][j]]` for dim = 1; sizes broadcast. Source: torch."""
    return _gather(input, indices, dim=axis_of(dim, input.ndim))


def _check_gather(x: np.ndarray, index: np.ndarray, dim: int, name: str) -> None:
    if index.dtype.kind not in "iu":
        raise RuntimeError(f"{name}(): Expected dtype int32/int64 for index, got {index.dtype}")
    if index.ndim != x.ndim:
        raise RuntimeError(
            "Index tensor must have the same number of dimensions as input tensor, "
            f"got {index.ndim} and {x.ndim}"
        )
    if index.size and (index.min() < 0 or index.max() >= x.shape[dim]):
        bad = index[(index < 0) | (index >= x.shape[dim])].reshape(-1)[0]
        raise RuntimeError(
            f"index {bad} is out of bounds for dimension {dim} with size {x.shape[dim]}"
        )


def _crop(x: np.ndarray, index: np.ndarray, dim: int) -> np.ndarray:
    """`x` cut to the index's sizes except along dim: gather may use less than all of x."""
    return x[tuple(slice(None) if d == dim else slice(n) for d, n in enumerate(index.shape))]


_gather = define(
    "gather", lambda x, index, *, dim: np.take_along_axis(x, index, dim), inputs="x index",
    saves="index",
    vjp=lambda n, g: (_scatter_add(np.zeros(n.shapes[0], _dtype(g)), n.index, g, dim=n.dim), None),
    sample=lambda: [((_rand(3, 4), np.array([[0, 1], [2, 2], [3, 0]])), {"dim": 1})],
)  # fmt: skip


def _dtype(g: Any) -> Any:
    return g._data.dtype if isinstance(g, Value) else g.dtype


def gather(input: Any, dim: int, index: Any) -> Any:
    """`out[i][j] = input[i][index[i][j]]` for dim = 1; `out` has index's shape. Source: torch."""
    axis = axis_of(dim, input.ndim)
    x, i = _arrays(input, index)
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


def _arrays(*values: Any) -> list[np.ndarray]:
    return [v._data if isinstance(v, Value) else v for v in values]


def _along(index: np.ndarray, dim: int) -> tuple[Any, ...]:
    """A full index for `x[...]` that moves only along dim."""
    grid = list(np.ogrid[tuple(slice(n) for n in index.shape)])
    grid[dim] = index
    return tuple(grid)


def _scatter_add_forward(
    x: np.ndarray, index: np.ndarray, source: np.ndarray, *, dim: int
) -> np.ndarray:
    out = x.copy()
    np.add.at(out, _along(index, dim), _crop(source, index, dim))
    return out


_scatter_add = define(
    "scatter_add", _scatter_add_forward, inputs="x index source", saves="index",
    vjp=lambda n, g: (g, None, gather(g, n.dim, n.index) if n.needs[2] else None),
    sample=lambda: [((_rand(3, 4), np.array([[0, 1], [2, 2], [3, 0]]), _rand(3, 2)), {"dim": 1})],
)  # fmt: skip


def scatter_add(input: Any, dim: int, index: Any, src: Any) -> Any:
    """`out = input; out[i][index[i][j]] += src[i][j]` for dim = 1. Source: torch.scatter_add."""
    axis = axis_of(dim, input.ndim)
    x, i = _arrays(input, index)
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
        index = n.index._data if isinstance(n.index, Value) else n.index
        keep[_along(index, n.dim)] = False
        kept = g * keep
    return kept, None, gather(g, n.dim, n.index) if n.needs[2] else None


_scatter = define(
    "scatter", _scatter_forward, inputs="x index source", saves="index", vjp=_scatter_vjp,
    sample=lambda: [((_rand(3, 4), np.array([[0, 1], [2, 3], [3, 0]]), _rand(3, 2)), {"dim": 1})],
)  # fmt: skip


def scatter(input: Any, dim: int, index: Any, src: Any) -> Any:
    """`out = input; out[i][index[i][j]] = src[i][j]` for dim = 1; src may be a number.

    Source: torch.scatter.
    """
    axis = axis_of(dim, input.ndim)
    x, i = _arrays(input, index)
    _check_gather(x, i, axis, "scatter")
    if not isinstance(src, (Value, np.ndarray)):
        src = np.asarray(src, x.dtype)
    return _scatter(input, index, src, dim=axis)


def index_select(input: Any, dim: int, index: Any) -> Any:
    """The entries named by a 1-D index along `dim`, copied. Source: torch.index_select."""
    axis = axis_of(dim, input.ndim)
    return getitem(input, (slice(None),) * axis + (index,))


def masked_fill(input: Any, mask: Any, value: Any) -> Any:
    """`value` (a number) where `mask` is true; the mask broadcasts. Source: torch.masked_fill."""
    from_value = value._data if isinstance(value, Value) else value
    return _masked_fill(input, mask, value=from_value)


def _masked_fill_forward(x: np.ndarray, mask: np.ndarray, *, value: Any) -> np.ndarray:
    if mask.dtype != np.bool_:
        raise RuntimeError(
            f"masked_fill only supports boolean masks, but got mask with dtype {mask.dtype}"
        )
    return np.where(mask, x.dtype.type(value), x)


_masked_fill = define(
    "masked_fill", _masked_fill_forward, inputs="x mask", saves="mask", broadcasts=True,
    vjp=lambda n, g: (_masked_fill(g, n.mask, value=0), None),
    sample=lambda: [((_rand(3, 4), _rand(3, 4) > 0.5), {"value": 2.0})],
)  # fmt: skip


def masked_select(input: Any, mask: Any) -> Any:
    """The elements where `mask` is true, as a vector. Source: torch.masked_select."""
    return getitem(input, mask)


# --- embedding ---------------------------------------------------------------------------------


def sum_rows(g: np.ndarray, index: np.ndarray, rows: int) -> np.ndarray:
    """`out[index[i]] += g[i]` for rows g, in the order of i for every row of `out`.

    Sorting and one `add.reduceat` is many times faster than `np.add.at` on rows.
    """
    out = np.zeros((rows, g.shape[1]), g.dtype)
    if index.size:
        order = np.argsort(index, kind="stable")
        ordered = index[order]
        starts = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))
        out[ordered[starts]] = np.add.reduceat(g[order], starts, axis=0)
    return out


def _embedding_forward(weight: np.ndarray, index: np.ndarray, *, padding_idx: int | None) -> Any:
    if index.size and (index.min() < 0 or index.max() >= weight.shape[0]):
        bad = index[(index < 0) | (index >= weight.shape[0])].reshape(-1)[0]
        raise IndexError(
            f"index out of range in self: index {bad}, but the embedding has {weight.shape[0]} rows"
        )
    return weight[index]


def _embedding_vjp(n: Any, g: Any) -> Any:
    return _embedding_grad(g, n.index, rows=n.shapes[0][0], padding_idx=n.padding_idx), None


def _embedding_grad_forward(
    g: np.ndarray, index: np.ndarray, *, rows: int, padding_idx: int | None
) -> np.ndarray:
    out = sum_rows(g.reshape(-1, g.shape[-1]), index.reshape(-1), rows)
    if padding_idx is not None:
        out[padding_idx] = 0
    return out


def _embedding_grad_vjp(n: Any, g: Any) -> Any:
    keep = np.ones((n.rows, 1), _dtype(g))
    if n.padding_idx is not None:
        keep[n.padding_idx] = 0
    return _embedding(g * keep, n.index, padding_idx=None), None


_embedding_grad = define(
    "embedding_grad", _embedding_grad_forward, inputs="g index", saves="index",
    vjp=_embedding_grad_vjp,
    sample=lambda: [((_rand(2, 3), np.array([1, 0])), {"rows": 4, "padding_idx": 0})],
)  # fmt: skip
_embedding = define(
    "embedding", _embedding_forward, inputs="weight index", saves="index", vjp=_embedding_vjp,
    sample=lambda: [((_rand(5, 3), np.array([[1, 1], [0, 4]])), {"padding_idx": None})],
)  # fmt: skip


def embedding(input: Any, weight: Any, padding_idx: int | None = None) -> Any:
    """Rows of `weight` (rows, dim) picked by the integer tensor `input`: shape (*input, dim).

    IndexError for an index out of range. `padding_idx`'s row gets no gradient.
    Source: torch.nn.functional.embedding.
    """
    if padding_idx is not None and padding_idx < 0:
        padding_idx += weight.shape[0]
    return _embedding(weight, input, padding_idx=padding_idx)


def one_hot(tensor: Any, num_classes: int = -1) -> Any:
    """int64 one-hot vectors along a new last dimension. Source: torch.nn.functional.one_hot."""
    return _one_hot(tensor, num_classes=num_classes)


def _one_hot_forward(x: np.ndarray, *, num_classes: int) -> np.ndarray:
    if x.dtype != np.int64:
        raise RuntimeError("one_hot is only applicable to index tensor of type LongTensor.")
    classes = int(x.max()) + 1 if num_classes == -1 else num_classes
    if x.size and (x.min() < 0 or x.max() >= classes):
        raise RuntimeError("Class values must be non-negative and smaller than num_classes.")
    return (x[..., None] == np.arange(classes)).astype(np.int64)


_one_hot = define("one_hot", _one_hot_forward)
