"""`x[index]` and `x[index] = value`: slices are views, masks and index tensors copy.

Rules, as in torch: integers, slices and None are applied first, index tensors then to what is
left (NumPy would count an integer among the index arrays); uint8 tensors are masks; repeated
indices add up in gradients, in a fixed order.
"""

from __future__ import annotations

import math
import operator
import re
import warnings
from typing import Any

import numpy as np

from dtrain.autograd.grad_mode import grad_enabled
from dtrain.autograd.op import define
from dtrain.autograd.value import Value, need_whole
from dtrain.ops.compare import where

Index = tuple[Any, ...]
_ALL = slice(None)


def _rand(*shape: int) -> np.ndarray:
    return np.random.RandomState(0).rand(*shape)


# --- what an index means -------------------------------------------------------------------------


def split_index(index: Any) -> tuple[Index, Index]:
    """An index as two: one of ints, slices and None, then one of index arrays; () for nothing."""
    first: list[Any] = []
    then: list[Any] = []
    for part in _parts(index):
        part = _part(part)
        if isinstance(part, np.ndarray):
            then.append(part if part.ndim else part.reshape(1))
            first += [_ALL] * (1 if part.dtype.kind != "b" else part.ndim) if part.ndim else [None]
        else:
            first.append(part)
            if not isinstance(part, int):
                then.append(part if part is Ellipsis else _ALL)
    if not any(isinstance(part, np.ndarray) for part in then):
        return tuple(first), ()
    trivial = all(part is Ellipsis or part == _ALL for part in first)
    return () if trivial else tuple(first), tuple(then)


def _parts(index: Any) -> Any:
    """The parts of an index. As in torch, a list that holds more than numbers is a tuple."""
    if isinstance(index, tuple):
        return index
    if isinstance(index, list) and any(
        part is None
        or part is Ellipsis
        or isinstance(part, (list, tuple, slice, Value, np.ndarray))
        for part in index
    ):
        return index
    return (index,)


def _part(part: Any) -> Any:
    """An int, a slice of ints, None, Ellipsis or an array of integers or bools."""
    if part is None or part is Ellipsis or part.__class__ is int:
        return part
    if isinstance(part, slice):
        if part.step is not None and part.step <= 0:
            raise ValueError("step must be greater than zero")
        return slice(*(v if v is None else operator.index(v) for v in
                       (part.start, part.stop, part.step)))  # fmt: skip
    array = _index_array(part)
    if array.ndim == 0 and array.dtype.kind in "iu":
        return int(array)
    if array.dtype == np.uint8:
        warnings.warn(
            "indexing with dtype torch.uint8 is now deprecated, please use a dtype torch.bool "
            "instead.",
            UserWarning,
            stacklevel=5,
        )
        return array.astype(bool)
    return array


def _index_array(part: Any) -> np.ndarray:
    if isinstance(part, (list, range)):
        need_whole("an index", *part)
        part = [p._data if isinstance(p, Value) else p for p in part]
    elif not isinstance(part, (Value, np.ndarray, np.integer, np.bool_, bool)):
        raise IndexError(
            "only integers, slices (`:`), ellipsis (`...`), None and long or byte Variables are "
            f"valid indices (got {type(part).__name__})"
        )
    need_whole("an index", part)
    array = np.asarray(part._data if isinstance(part, Value) else part)
    if array.size == 0 and array.dtype.kind == "f":
        return array.astype(np.int64)  # x[[]] selects nothing
    if array.dtype.kind not in "iub":
        raise IndexError(
            f"tensors used as indices must be long, int, byte or bool tensors, got {array.dtype}"
        )
    return array


_OUT_OF_BOUNDS = re.compile(r"index (-?\d+) is out of bounds for axis (\d+) with size (\d+)")
_BROADCAST = re.compile(r"could not be broadcast together with shapes (.*)")


def index_error(x: np.ndarray, index: Index, error: IndexError) -> IndexError:
    """NumPy's complaint in torch's words."""
    text = str(error)
    if found := _OUT_OF_BOUNDS.search(text):
        i, axis, size = found.groups()
        return IndexError(f"index {i} is out of bounds for dimension {axis} with size {size}")
    if "too many indices" in text:
        if x.ndim == 0:
            return IndexError(
                "invalid index of a 0-dim tensor. Use `tensor.item()` in Python or "
                "`tensor.item<T>()` in C++ to convert a 0-dim tensor to a number"
            )
        return IndexError(f"too many indices for tensor of dimension {x.ndim}")
    if "boolean index did not match" in text:
        place, mask = next((i, p) for i, p in enumerate(index) if isinstance(p, np.ndarray))
        return IndexError(
            f"The shape of the mask {list(mask.shape)} at index {place} does not match the shape "
            f"of the indexed tensor {list(x.shape)} at index {place}"
        )
    if _BROADCAST.search(text):
        shapes = ", ".join(str(list(p.shape)) for p in index if isinstance(p, np.ndarray))
        return IndexError(
            "shape mismatch: indexing tensors could not be broadcast together with shapes " + shapes
        )
    return error


def take(x: np.ndarray, index: Index) -> np.ndarray:
    """`x[index]` as an array, a view for a plain index, with torch's errors."""
    if not any(part is Ellipsis or isinstance(part, np.ndarray) for part in index):
        index = (*index, ...)  # a full index then gives a 0-d view, not a number
    try:
        return x[index]
    except IndexError as error:
        raise index_error(x, index, error) from None


# --- x[index] ------------------------------------------------------------------------------------


def sum_rows(g: np.ndarray, index: np.ndarray, rows: int) -> np.ndarray:
    """`out[index[i]] += g[i]` for rows g, in a fixed order for every row of `out`.

    Sorting and one `add.reduceat` is many times faster than `np.add.at` on rows.
    """
    out = np.zeros((rows, g.shape[1]), g.dtype)
    if g.shape[1] == 1:
        np.add.at(out[:, 0], index, g[:, 0])
    elif index.size:
        order = np.argsort(index, kind="stable")
        ordered = index[order]
        starts = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))
        out[ordered[starts]] = np.add.reduceat(g[order], starts, axis=0)
    return out


def _flat_rows(index: Index, shape: tuple[int, ...]) -> np.ndarray:
    """Index arrays of the leading dimensions as one index of rows, counted from the front."""
    rows: Any = 0
    for part, size in zip(index, shape, strict=False):
        rows = rows * size + np.where(part < 0, part + size, part)
    return rows  # type: ignore[no-any-return]


def _place(g: np.ndarray, *, index: Index, shape: tuple[int, ...], unique: bool) -> np.ndarray:
    """Zeros of `shape` with `g` added at `index`."""
    if not unique and all(isinstance(p, np.ndarray) and p.dtype.kind != "b" for p in index):
        rows = _flat_rows(index, shape)
        lead = len(index)
        total, width = math.prod(shape[:lead]), math.prod(shape[lead:])
        return sum_rows(g.reshape(rows.size, width), rows.reshape(-1), total).reshape(shape)
    out = np.zeros(shape, g.dtype)
    if unique:
        out[index] = g
    else:
        np.add.at(out, index, g)
    return out


def _index_vjp(n: Any, g: Any) -> Any:
    return (place(g, index=n.index, shape=n.shapes[0], unique=n.unique),)


place = define(
    "index_place", _place, vjp=lambda n, g: (_again(g, n.index, n.unique),),
    sample=lambda: [((_rand(2, 3),), {"index": (np.array([1, -3]),), "shape": (4, 3),
                                      "unique": False})],
)  # fmt: skip
_slice = define(
    "slice", lambda x, *, index, unique: take(x, index), inputs="x", view=True, vjp=_index_vjp,
    sample=lambda: [((_rand(3, 4),), {"index": (1, slice(0, 3)), "unique": True})],
)  # fmt: skip
_select = define(
    "index", lambda x, *, index, unique: take(x, index), inputs="x", vjp=_index_vjp,
    sample=lambda: [
        ((_rand(3, 4),), {"index": (np.array([0, 2, 2]),), "unique": False}),
        ((_rand(3, 4),), {"index": (np.array([0, 2, 2]), np.array([1, 3, 3])), "unique": False}),
        ((_rand(3, 4),), {"index": (slice(None), np.array([0, 2, 2])), "unique": False}),
        ((_rand(3, 4),), {"index": (_rand(3, 4) > 0.5,), "unique": True}),
    ],
)  # fmt: skip


def _again(x: Any, index: Index, unique: bool) -> Any:
    arrays = any(isinstance(part, np.ndarray) for part in index)
    return (_select if arrays else _slice)(x, index=index, unique=unique)


def getitem(input: Any, index: Any) -> Any:
    """`input[index]`: a view for ints, slices and None, a copy for index tensors and masks."""
    first, then = split_index(index)
    if first or not then:
        input = _slice(input, index=first, unique=True)
    if not then:
        return input
    if isinstance(input, Value) and input._requires_grad and grad_enabled.get():
        # The rule needs the index as it is now: the caller may change the tensor it came from.
        then = tuple(part.copy() if isinstance(part, np.ndarray) else part for part in then)
    masks = all(not isinstance(part, np.ndarray) or part.dtype.kind == "b" for part in then)
    return _select(input, index=then, unique=masks)


# --- x[index] = value ----------------------------------------------------------------------------


def _put_forward(x: np.ndarray, value: np.ndarray, *, index: Index) -> np.ndarray:
    out = x.copy()
    out[index] = value
    return out


def _put_vjp(n: Any, g: Any) -> Any:
    from_value = kept = None
    if n.needs[1]:
        from_value = _again(g, n.index, False)
    if n.needs[0]:
        keep = np.ones(n.shapes[0], bool)
        keep[n.index] = False
        kept = where(keep, g, 0.0)
    return kept, from_value


index_put = define(
    "index_put", _put_forward, inputs="x value", vjp=_put_vjp, broadcasts=True,
    sample=lambda: [((_rand(3, 4), _rand(4)), {"index": (slice(0, 2),)}),
                    ((_rand(3, 4), _rand(2, 4)), {"index": (np.array([0, 2]),)})],
)  # fmt: skip
