"""Ops that move or repeat elements without changing them: views, joins, splits.

Views share memory and version counter with their input, as in torch. Shapes are tuples of ints.
"""

from __future__ import annotations

import builtins
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from dtrain.autograd.op import define, sum_to_shape
from dtrain.autograd.promotion import together
from dtrain.autograd.value import Value

Dim = int | tuple[int, ...] | list[int] | None


def axis_of(dim: int, ndim: int) -> int:
    """A dimension counted from the front; IndexError in torch's words when there is none."""
    limit = builtins.max(ndim, 1)
    if not -limit <= dim < limit:
        raise IndexError(
            f"Dimension out of range (expected to be in range of [{-limit}, {limit - 1}], "
            f"but got {dim})"
        )
    return dim % limit


def axes_of(dim: Dim, ndim: int) -> tuple[int, ...]:
    """All dimensions for None or (), else the named ones counted from the front."""
    if dim is None or dim == () or dim == []:
        return tuple(range(ndim))
    if ndim == 0:
        for d in (dim,) if isinstance(dim, int) else dim:
            axis_of(d, 0)
        return ()
    if isinstance(dim, int):
        return (axis_of(dim, ndim),)
    axes = tuple(axis_of(d, ndim) for d in dim)
    if len(set(axes)) != len(axes):
        raise RuntimeError(f"dim {axes[-1]} appears multiple times in the list of dims")
    return axes


def _rand(*shape: int) -> np.ndarray:
    return np.random.RandomState(0).rand(*shape)


# --- reshape and friends -----------------------------------------------------------------------


def resolve_shape(shape: Sequence[int], size: int) -> tuple[int, ...]:
    """`shape` with its one -1 worked out; RuntimeError in torch's words when it cannot be."""
    dims = tuple([int(n) for n in shape])
    if dims.count(-1) > 1:
        raise RuntimeError("only one dimension can be inferred")
    if builtins.any(n < -1 for n in dims):
        raise RuntimeError(f"invalid shape dimension {builtins.min(dims)}")
    known = math.prod(n for n in dims if n != -1)
    if -1 in dims:
        if known == 0 or size % known:
            raise RuntimeError(f"shape '{list(dims)}' is invalid for input of size {size}")
        return tuple([size // known if n == -1 else n for n in dims])
    if known != size:
        raise RuntimeError(f"shape '{list(dims)}' is invalid for input of size {size}")
    return dims


def _view_forward(x: np.ndarray, *, shape: tuple[int, ...]) -> np.ndarray:
    try:
        return np.reshape(x, shape, copy=False)
    except ValueError:
        raise RuntimeError(
            "view size is not compatible with input tensor's size and stride (at least one "
            "dimension spans across two contiguous subspaces). Use .reshape(...) instead."
        ) from None


_reshape = define(
    "reshape", lambda x, *, shape: x.reshape(shape), inputs="x", view=True,
    vjp=lambda n, g: (g.reshape(n.shapes[0]),),
    sample=lambda: [((_rand(2, 6),), {"shape": (3, 4)}), ((_rand(4, 3).T,), {"shape": (12,)})],
)  # fmt: skip
_view = define(
    "view", _view_forward, view=True, vjp=lambda n, g: (g.reshape(n.shapes[0]),),
    sample=lambda: [((_rand(2, 6),), {"shape": (3, 4)})],
)  # fmt: skip


def reshape(input: Any, shape: Sequence[int]) -> Any:
    """The elements in row-major order in another shape; a view where possible.

    Source: torch.reshape.
    """
    return _reshape(input, shape=resolve_shape(shape, _size(input)))


def view(input: Any, shape: Sequence[int]) -> Any:
    """`reshape` that never copies: RuntimeError where the strides do not allow a view."""
    return _view(input, shape=resolve_shape(shape, _size(input)))


def _size(x: Any) -> int:
    return x._data.size if isinstance(x, Value) else x.size  # type: ignore[no-any-return]


def flatten(input: Any, start_dim: int = 0, end_dim: int = -1) -> Any:
    """Dimensions start_dim..end_dim become one. Source: torch.flatten."""
    if input.ndim == 0:
        return reshape(input, (1,))
    first, last = axis_of(start_dim, input.ndim), axis_of(end_dim, input.ndim)
    if first > last:
        raise RuntimeError("flatten() has invalid args: start_dim cannot come after end_dim")
    shape = tuple(input.shape)
    return reshape(input, (*shape[:first], math.prod(shape[first : last + 1]), *shape[last + 1 :]))


def unflatten(input: Any, dim: int, sizes: Sequence[int]) -> Any:
    """Dimension `dim` becomes several. Source: torch.unflatten."""
    axis = axis_of(dim, input.ndim)
    shape = tuple(input.shape)
    return reshape(input, (*shape[:axis], *resolve_shape(sizes, shape[axis]), *shape[axis + 1 :]))


def squeeze(input: Any, dim: Dim = None) -> Any:
    """Without the dimensions of size 1 (all, or those named). Source: torch.squeeze."""
    axes = axes_of(dim, input.ndim)
    return reshape(input, [n for i, n in enumerate(input.shape) if not (n == 1 and i in axes)])


def unsqueeze(input: Any, dim: int) -> Any:
    """With a dimension of size 1 inserted before `dim`. Source: torch.unsqueeze."""
    axis = axis_of(dim, input.ndim + 1)
    shape = tuple(input.shape)
    return _reshape(input, shape=(*shape[:axis], 1, *shape[axis:]))


def _inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple([order.index(i) for i in range(len(order))])


_permute = define(
    "permute", lambda x, *, dims: x.transpose(dims), inputs="x", view=True,
    vjp=lambda n, g: (_permute(g, dims=_inverse(n.dims)),),
    sample=lambda: [((_rand(2, 3, 4),), {"dims": (2, 0, 1)})],
)  # fmt: skip


def permute(input: Any, dims: Sequence[int]) -> Any:
    """The dimensions in another order, as a view. Source: torch.permute."""
    order = tuple([axis_of(d, input.ndim) for d in dims])
    if sorted(order) != list(range(input.ndim)):
        raise RuntimeError(
            f"permute: number of dimensions in the tensor input does not match the "
            f"length of the desired ordering of dimensions i.e. input.dim() = {input.ndim} is not "
            f"equal to len(dims) = {len(dims)}"
            if len(order) != input.ndim
            else "permute(): duplicate dims are not allowed."
        )
    return _permute(input, dims=order)


def transpose(input: Any, dim0: int, dim1: int) -> Any:
    """Two dimensions exchanged, as a view. Source: torch.transpose."""
    if input.ndim == 0:
        return reshape(input, ())
    order = list(range(input.ndim))
    a, b = axis_of(dim0, input.ndim), axis_of(dim1, input.ndim)
    order[a], order[b] = b, a
    return _permute(input, dims=tuple(order))


def t(input: Any) -> Any:
    """The transpose of a matrix; vectors and scalars as they are. Source: torch.t."""
    if input.ndim > 2:
        raise RuntimeError(f"t() expects a tensor with <= 2 dimensions, but self is {input.ndim}D")
    return _permute(input, dims=tuple(reversed(range(input.ndim))))


def movedim(input: Any, source: int | Sequence[int], destination: int | Sequence[int]) -> Any:
    """Dimensions moved to other places, the rest in order. Source: torch.movedim."""
    sources = [source] if isinstance(source, int) else list(source)
    targets = [destination] if isinstance(destination, int) else list(destination)
    moved = dict(
        zip([axis_of(d, input.ndim) for d in targets], [axis_of(s, input.ndim) for s in sources],
            strict=True)
    )  # fmt: skip
    rest = iter([d for d in range(input.ndim) if d not in moved.values()])
    return _permute(
        input, dims=tuple(moved[i] if i in moved else next(rest) for i in range(input.ndim))
    )


_expand = define(
    "expand", lambda x, *, shape: np.broadcast_to(x, shape), inputs="x", view=True,
    vjp=lambda n, g: (sum_to_shape(g, n.shapes[0]),),
    sample=lambda: [((_rand(3, 1),), {"shape": (2, 3, 4)})],
)  # fmt: skip


def expand(input: Any, shape: Sequence[int]) -> Any:
    """Size-1 dimensions repeated without copying; -1 keeps a size. Source: torch.Tensor.expand."""
    old = tuple(input.shape)
    lead = len(shape) - len(old)
    if lead < 0:
        raise RuntimeError(
            f"expand: the number of sizes provided ({len(shape)}) must be greater or equal to the "
            f"number of dimensions in the tensor ({len(old)})"
        )
    new = tuple([old[i - lead] if n == -1 and i >= lead else n for i, n in enumerate(shape)])
    for i, n in enumerate(old):
        if n != 1 and new[lead + i] != n:
            raise RuntimeError(
                f"The expanded size of the tensor ({new[lead + i]}) must match the existing size "
                f"({n}) at non-singleton dimension {lead + i}.  Target sizes: {list(new)}.  "
                f"Tensor sizes: {list(old)}"
            )
    return _expand(input, shape=new)


def broadcast_to(input: Any, shape: Sequence[int]) -> Any:
    """`expand`. Source: torch.broadcast_to."""
    return expand(input, shape)


def repeat(input: Any, sizes: Sequence[int]) -> Any:
    """The tensor tiled `sizes` times along each dimension, copied. Source: Tensor.repeat."""
    lead = len(sizes) - input.ndim
    if lead < 0:
        raise RuntimeError(
            "Number of dimensions of repeat dims can not be smaller than number of dimensions of "
            "tensor"
        )
    shape = (1,) * lead + tuple(input.shape)
    split = reshape(input, [n for size in shape for n in (1, size)])
    wide = expand(split, [n for r, size in zip(sizes, shape, strict=True) for n in (r, size)])
    return reshape(wide, [r * size for r, size in zip(sizes, shape, strict=True)])


# --- slices ------------------------------------------------------------------------------------


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


def unbind(input: Any, dim: int = 0) -> tuple[Any, ...]:
    """The slices along `dim`, without it. Source: torch.unbind."""
    return tuple([squeeze(part, dim) for part in split(input, 1, dim)])


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


# --- order -------------------------------------------------------------------------------------

_flip = define(
    "flip", lambda x, *, dims: np.flip(x, dims).copy(), inputs="x",
    vjp=lambda n, g: (_flip(g, dims=n.dims),),
    sample=lambda: [((_rand(2, 3),), {"dims": (1,)})],
)  # fmt: skip
_roll = define(
    "roll", lambda x, *, shifts, dims: np.roll(x, shifts, dims), inputs="x",
    vjp=lambda n, g: (_roll(g, shifts=tuple(-s for s in n.shifts), dims=n.dims),),
    sample=lambda: [((_rand(2, 3),), {"shifts": (1,), "dims": (1,)})],
)  # fmt: skip


def flip(input: Any, dims: Dim) -> Any:
    """A copy with the order along `dims` reversed. Source: torch.flip."""
    return _flip(input, dims=axes_of(dims, input.ndim))


def roll(input: Any, shifts: int | Sequence[int], dims: Dim = None) -> Any:
    """A copy shifted along `dims` (or along the flattened tensor), cyclically. Source: torch.roll."""
    steps = (shifts,) if isinstance(shifts, int) else tuple(shifts)
    if dims is None:
        return reshape(_roll(reshape(input, (-1,)), shifts=steps, dims=(0,)), tuple(input.shape))
    return _roll(input, shifts=steps, dims=axes_of(dims, input.ndim))


_contiguous = define(
    "contiguous", lambda x: np.ascontiguousarray(x), inputs="x", vjp=lambda n, g: (g,)
)
_clone = define("clone", lambda x: x.copy(), inputs="x", vjp=lambda n, g: (g,),
                sample=lambda: [((_rand(2, 3),), {})])  # fmt: skip


def contiguous(input: Any) -> Any:
    """The tensor itself if it is in row-major order, else such a copy."""
    if _contiguous_array(input).flags.c_contiguous:
        return input
    return _contiguous(input)


def _contiguous_array(x: Any) -> np.ndarray:
    return x._data if isinstance(x, Value) else x  # type: ignore[no-any-return]


def clone(input: Any) -> Any:
    """A copy with memory of its own; gradients flow through. Source: torch.clone."""
    return _clone(input)


_tril = define(
    "tril", lambda x, *, diagonal: np.tril(x, diagonal), inputs="x",
    vjp=lambda n, g: (_tril(g, diagonal=n.diagonal),),
    sample=lambda: [((_rand(3, 3),), {"diagonal": 0})],
)  # fmt: skip
_triu = define(
    "triu", lambda x, *, diagonal: np.triu(x, diagonal), inputs="x",
    vjp=lambda n, g: (_triu(g, diagonal=n.diagonal),),
    sample=lambda: [((_rand(3, 3),), {"diagonal": 1})],
)  # fmt: skip


def tril(input: Any, diagonal: int = 0) -> Any:
    """The lower triangle of each matrix, zero elsewhere. Source: torch.tril."""
    return _tril(input, diagonal=diagonal)


def triu(input: Any, diagonal: int = 0) -> Any:
    """The upper triangle of each matrix, zero elsewhere. Source: torch.triu."""
    return _triu(input, diagonal=diagonal)
