"""Parts and joins: narrow, split, unbind (views), and cat, stack and their like (copies).

The gradient of a part is zero outside it; the gradient of a join is cut into parts.
"""

from __future__ import annotations

import builtins
from collections.abc import Sequence
from typing import Any

import numpy as np

from dtrain.autograd.op import define
from dtrain.autograd.promotion import together
from dtrain.autograd.value import Value
from dtrain.ops.index import getitem
from dtrain.ops.shape import axis_of, reshape, unsqueeze


def _rand(*shape: int) -> np.ndarray:
    return np.random.RandomState(0).rand(*shape)


# --- parts -------------------------------------------------------------------------------------


def _slice(dim: int, start: int, length: int) -> tuple[slice, ...]:
    return (slice(None),) * dim + (slice(start, start + length),)


def _narrow_vjp(n: Any, g: Any) -> Any:
    return (_pad_dim(g, dim=n.dim, before=n.start, total=n.shapes[0][n.dim]),)


_narrow = define(
    "narrow", lambda x, *, dim, start, length: x[_slice(dim, start, length)], inputs="x",
    view=True, vjp=_narrow_vjp,
    sample=lambda: [((_rand(3, 5),), {"dim": 1, "start": 1, "length": 3})],
)  # fmt: skip


def _pad_dim_forward(x: np.ndarray, *, dim: int, before: int, total: int) -> np.ndarray:
    out = np.zeros((*x.shape[:dim], total, *x.shape[dim + 1 :]), x.dtype)
    out[_slice(dim, before, x.shape[dim])] = x
    return out


_pad_dim = define(
    "pad_dim", _pad_dim_forward,
    vjp=lambda n, g: (narrow(g, n.dim, n.before, n.shapes[0][n.dim]),),
    sample=lambda: [((_rand(3, 2),), {"dim": 1, "before": 1, "total": 4})],
)  # fmt: skip


def narrow(input: Any, dim: int, start: int, length: int) -> Any:
    """`length` entries from `start` along `dim`, as a view. Source: torch.narrow."""
    axis = axis_of(dim, input.ndim)
    size = input.shape[axis]
    if start < 0:
        start += size
    if length < 0 or start < 0 or start + length > size:
        raise RuntimeError(f"start ({start}) + length ({length}) exceeds dimension size ({size}).")
    return _narrow(input, dim=axis, start=start, length=length)


def select(input: Any, dim: int, index: int) -> Any:
    """The slice at `index` along `dim`, without it, as a view. Source: torch.select."""
    axis = axis_of(dim, input.ndim)
    size = input.shape[axis]
    if not -size <= index < size:
        raise IndexError(
            f"select(): index {index} out of range for tensor of size {list(input.shape)} at "
            f"dimension {axis}"
        )
    return getitem(input, (slice(None),) * axis + (index,))


def _split_forward(x: np.ndarray, *, dim: int, sizes: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    ends = np.cumsum(sizes)
    return tuple([x[_slice(dim, int(e) - n, n)] for n, e in zip(sizes, ends, strict=True)])


def _split_vjp(n: Any, grads: Any) -> Any:
    present = next(g for g in grads if g is not None)
    shape = n.shapes[0]
    parts = [
        _zeros_like(present, (*shape[: n.dim], size, *shape[n.dim + 1 :])) if g is None else g
        for g, size in zip(grads, n.sizes, strict=True)
    ]
    return (cat(parts, n.dim),)


def _zeros_like(g: Any, shape: tuple[int, ...]) -> np.ndarray:
    return np.zeros(shape, g._data.dtype if isinstance(g, Value) else g.dtype)


_split = define(
    "split", _split_forward, vjp=_split_vjp, view=True, outputs=-1,
    sample=lambda: [((_rand(2, 6),), {"dim": 1, "sizes": (1, 3, 2)})],
)  # fmt: skip


def split(input: Any, split_size_or_sections: int | Sequence[int], dim: int = 0) -> tuple[Any, ...]:
    """Views of consecutive parts along `dim`, of one size (the last may be less) or of many.

    Source: torch.split.
    """
    axis = axis_of(dim, input.ndim)
    total = input.shape[axis]
    if isinstance(split_size_or_sections, int):
        step = split_size_or_sections
        if step < 0 or (step == 0 and total):
            raise RuntimeError(
                f"split expects split_size be non-negative, but got split_size={step}"
                if step
                else "split_size can only be 0 if dimension size is 0, but got dimension size of "
                f"{total}"
            )
        sizes = [builtins.min(step, total - i) for i in range(0, total, step or 1)] or [0]
    else:
        sizes = [int(n) for n in split_size_or_sections]
        if builtins.sum(sizes) != total:
            raise RuntimeError(
                f"split_with_sizes expects split_sizes to sum exactly to {total} (input tensor's "
                f"size at dimension {dim}), but got split_sizes={sizes}"
            )
    return _split(input, dim=axis, sizes=tuple(sizes))  # type: ignore[no-any-return]


def chunk(input: Any, chunks: int, dim: int = 0) -> tuple[Any, ...]:
    """At most `chunks` equal parts along `dim`, the last may be smaller. Source: torch.chunk."""
    if chunks <= 0:
        raise RuntimeError(f"chunk expects `chunks` to be greater than 0, got: {chunks}")
    total = input.shape[axis_of(dim, input.ndim)]
    return split(input, builtins.max(1, -(-total // chunks)), dim)


def _unbind_forward(x: np.ndarray, *, dim: int) -> tuple[np.ndarray, ...]:
    lead = (slice(None),) * dim
    places: list[Any] = [(*lead, i, ...) for i in range(x.shape[dim])]
    return tuple([x[place] for place in places])


def _unbind_vjp(n: Any, grads: Any) -> Any:
    present = next(g for g in grads if g is not None)
    zero = _zeros_like(present, tuple(present.shape))
    return (stack([zero if g is None else g for g in grads], n.dim),)


_unbind = define(
    "unbind", _unbind_forward, vjp=_unbind_vjp, view=True, outputs=-1,
    sample=lambda: [((_rand(3, 2),), {"dim": 0}), ((_rand(3),), {"dim": 0})],
)  # fmt: skip


def unbind(input: Any, dim: int = 0) -> tuple[Any, ...]:
    """The slices along `dim`, without it. Source: torch.unbind."""
    if input.ndim == 0:
        raise IndexError("Dimension specified as 0 but tensor has no dimensions")
    return _unbind(input, dim=axis_of(dim, input.ndim))  # type: ignore[no-any-return]


def tensor_split(
    input: Any, indices_or_sections: int | Sequence[int], dim: int = 0
) -> tuple[Any, ...]:
    """Views of parts along `dim`: a number of nearly equal ones, or cut at the given indices.

    Source: torch.tensor_split.
    """
    total = input.shape[axis_of(dim, input.ndim)]
    if isinstance(indices_or_sections, int):
        sections = indices_or_sections
        if sections <= 0:
            raise RuntimeError(f"number of sections must be larger than 0, got {sections}")
        small, longer = divmod(total, sections)
        return split(input, [small + 1] * longer + [small] * (sections - longer), dim)
    cuts = [builtins.min(i, total) for i in indices_or_sections]
    bounds = zip([0, *cuts], [*cuts, total], strict=True)
    return split(input, [builtins.max(0, end - start) for start, end in bounds], dim)


# --- joins -------------------------------------------------------------------------------------


def _cat_forward(*arrays: np.ndarray, dim: int) -> np.ndarray:
    return np.concatenate(arrays, axis=dim)


def _cat_vjp(n: Any, g: Any) -> Any:
    sizes = [shape[n.dim] for shape in n.shapes]
    parts = []
    start = 0
    for size, wanted in zip(sizes, n.needs, strict=True):
        parts.append(narrow(g, n.dim, start, size) if wanted else None)
        start += size
    return tuple(parts)


_cat = define(
    "cat", _cat_forward, inputs="", vjp=_cat_vjp,
    sample=lambda: [((_rand(2, 3), _rand(2, 1)), {"dim": 1})],
)  # fmt: skip


def cat(tensors: Sequence[Any], dim: int = 0) -> Any:
    """The tensors joined along `dim`; their other sizes must agree. Source: torch.cat."""
    tensors = list(tensors)
    if not tensors:
        raise ValueError("torch.cat(): expected a non-empty list of Tensors")
    if builtins.any(isinstance(v, Value) for v in tensors):
        tensors = together(*tensors)
    tensors = [v for v in tensors if v.shape != (0,)] or tensors[:1]  # torch skips empty vectors
    axis = axis_of(dim, tensors[0].ndim)
    first = tuple(tensors[0].shape)
    for i, other in enumerate(tensors[1:], 1):
        _check_joinable(first, tuple(other.shape), axis, i)
    return _cat(*tensors, dim=axis)


def _check_joinable(first: tuple[int, ...], other: tuple[int, ...], dim: int, i: int) -> None:
    if len(first) != len(other):
        raise RuntimeError(
            f"Tensors must have same number of dimensions: got {len(first)} and {len(other)}"
        )
    for axis, (a, b) in enumerate(zip(first, other, strict=True)):
        if axis != dim and a != b:
            raise RuntimeError(
                f"Sizes of tensors must match except in dimension {dim}. Expected size {a} but got "
                f"size {b} for tensor number {i} in the list."
            )


def stack(tensors: Sequence[Any], dim: int = 0) -> Any:
    """The tensors, all of one shape, joined along a new dimension. Source: torch.stack."""
    tensors = list(tensors)
    if not tensors:
        raise RuntimeError("stack expects a non-empty TensorList")
    for i, other in enumerate(tensors[1:], 1):
        if other.shape != tensors[0].shape:
            raise RuntimeError(
                f"stack expects each tensor to be equal size, but got {list(tensors[0].shape)} at "
                f"entry 0 and {list(other.shape)} at entry {i}"
            )
    return cat([unsqueeze(v, dim) for v in tensors], axis_of(dim, tensors[0].ndim + 1))


def _unpacked(tensors: Any) -> list[Any]:
    """Tensors given one by one or as one sequence."""
    one = len(tensors) == 1 and isinstance(tensors[0], (tuple, list))
    return list(tensors[0] if one else tensors)


def at_least(dims: int, *tensors: Any) -> list[Any]:
    """Each tensor with as many dimensions at least; torch's places for the new ones."""
    out = []
    for x in tensors:
        if x.ndim == 0:
            x = reshape(x, (1,))
        if dims > 1 and x.ndim == 1:
            x = unsqueeze(x, 0)
        if dims > 2 and x.ndim == 2:
            x = unsqueeze(x, -1)
        out.append(x)
    return out


def _at_least(dims: int, name: str) -> Any:
    def function(*tensors: Any) -> Any:
        found = at_least(dims, *_unpacked(tensors))
        return found[0] if len(tensors) == 1 and isinstance(tensors[0], Value) else tuple(found)

    function.__name__ = function.__qualname__ = name
    function.__doc__ = f"Tensors with at least {dims} dimension(s). Source: torch.{name}."
    return function


atleast_1d, atleast_2d, atleast_3d = (_at_least(n, f"atleast_{n}d") for n in (1, 2, 3))


def hstack(tensors: Sequence[Any]) -> Any:
    """Joined along dimension 1 (vectors: 0). Source: torch.hstack."""
    tensors = at_least(1, *tensors)
    return cat(tensors, 0 if tensors[0].ndim == 1 else 1)


def vstack(tensors: Sequence[Any]) -> Any:
    """Joined along dimension 0, vectors as rows. Source: torch.vstack."""
    return cat(at_least(2, *tensors), 0)


def dstack(tensors: Sequence[Any]) -> Any:
    """Joined along dimension 2. Source: torch.dstack."""
    return cat(at_least(3, *tensors), 2)


def column_stack(tensors: Sequence[Any]) -> Any:
    """Joined along dimension 1, vectors as columns. Source: torch.column_stack."""
    return cat([reshape(x, (x.numel(), 1)) if x.ndim <= 1 else x for x in tensors], 1)
