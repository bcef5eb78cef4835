"""Copies: clone, contiguous, reversed, rolled, tiled, triangles of the same elements.

Each is linear, so that its gradient is the transposed copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dtrain.autograd.node import make
from dtrain.autograd.op import define
from dtrain.autograd.value import array_of, need_whole
from dtrain.ops.index import getitem
from dtrain.ops.shape import Dim, axes_of, axis_of, expand, reshape


def _rand(*shape: int) -> np.ndarray:
    return np.random.RandomState(0).rand(*shape)


def repeat(input: Any, sizes: Sequence[int]) -> Any:
    """The tensor tiled `sizes` times along each dimension, copied. Source: Tensor.repeat."""
    lead = len(sizes) - input.ndim
    if lead < 0:
        raise RuntimeError(
            "Number of dimensions of repeat dims can not be smaller than number of dimensions of "
            "tensor"
        )
    if all(n == 1 for n in sizes):
        return clone(reshape(input, (1,) * lead + tuple(input.shape)))
    shape = (1,) * lead + tuple(input.shape)
    split = reshape(input, [n for size in shape for n in (1, size)])
    wide = expand(split, [n for r, size in zip(sizes, shape, strict=True) for n in (r, size)])
    return reshape(wide, [r * size for r, size in zip(sizes, shape, strict=True)])


def tile(input: Any, dims: Sequence[int]) -> Any:
    """`repeat`, where missing leading counts are 1. Source: torch.tile."""
    return repeat(input, (1,) * (input.ndim - len(dims)) + tuple(dims))


def repeat_interleave(input: Any, repeats: Any, dim: int | None = None) -> Any:
    """Each element (or slice along `dim`) as often as said, next to each other.

    `repeats` is a number or a 1-D integer tensor. Source: torch.repeat_interleave.
    """
    if dim is None:
        input, dim = reshape(input, (-1,)), 0
    axis = axis_of(dim, input.ndim)
    need_whole("repeat_interleave", repeats)
    counts = array_of(repeats)
    size = input.shape[axis]
    if np.size(counts) not in (1, size):
        raise RuntimeError(
            "repeats must have the same size as input along dim, but got repeats.size(0) = "
            f"{np.size(counts)} and input.size({axis}) = {size}"
        )
    places = np.repeat(np.arange(size), counts)
    return getitem(input, (slice(None),) * axis + (places,))


_flip: Any = define(
    "flip", lambda x, *, dims: np.flip(x, dims).copy(), inputs="x",
    vjp=lambda n, g: (_flip(g, dims=n.dims),),
    sample=lambda: [((_rand(2, 3),), {"dims": (1,)})],
)  # fmt: skip
_roll: Any = define(
    "roll", lambda x, *, shifts, dims: np.roll(x, shifts, dims), inputs="x",
    vjp=lambda n, g: (_roll(g, shifts=tuple(-s for s in n.shifts), dims=n.dims),),
    sample=lambda: [((_rand(2, 3),), {"shifts": (1,), "dims": (1,)})],
)  # fmt: skip


def flip(input: Any, dims: Dim) -> Any:
    """A copy with the order along `dims` reversed. Source: torch.flip."""
    return _flip(input, dims=axes_of(dims, input.ndim))


def roll(input: Any, shifts: int | Sequence[int], dims: Dim = None) -> Any:
    """A copy shifted cyclically along `dims` (None: as one vector). Source: torch.roll."""
    steps = (shifts,) if isinstance(shifts, int) else tuple(shifts)
    if dims is None:
        return reshape(_roll(reshape(input, (-1,)), shifts=steps, dims=(0,)), tuple(input.shape))
    return _roll(input, shifts=steps, dims=axes_of(dims, input.ndim))


_contiguous = define(
    "contiguous", lambda x: np.ascontiguousarray(x), inputs="x", vjp=lambda n, g: (g,),
    sample=lambda: [((_rand(2, 3).T,), {})],
)  # fmt: skip
_clone = define("clone", lambda x: x.copy(), inputs="x", vjp=lambda n, g: (g,),
                sample=lambda: [((_rand(2, 3),), {})])  # fmt: skip


def contiguous(input: Any, memory_format: Any = None) -> Any:
    """The tensor itself if it is in row-major order, else such a copy.

    `memory_format` is accepted and ignored: there is only this one.
    """
    return input if array_of(input).flags.c_contiguous else _contiguous(input)


def clone(input: Any, *, memory_format: Any = None) -> Any:
    """A row-major copy with memory of its own; gradients flow through. Source: torch.clone.

    `memory_format` is accepted and ignored.
    """
    return _clone(input)


_tril: Any = define(
    "tril", lambda x, *, diagonal: np.tril(x, diagonal), inputs="x",
    vjp=lambda n, g: (_tril(g, diagonal=n.diagonal),),
    sample=lambda: [((_rand(3, 3),), {"diagonal": 0})],
)  # fmt: skip
_triu: Any = define(
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


def _indices(keep: Any, row: int, col: int, offset: int) -> Any:
    return make(np.stack(np.nonzero(keep(np.ones((row, col), bool), offset))))


def tril_indices(row: int, col: int, offset: int = 0) -> Any:
    """(2, count) indices of the lower triangle of a (row, col) matrix. Source: torch."""
    return _indices(np.tril, row, col, offset)


def triu_indices(row: int, col: int, offset: int = 0) -> Any:
    """(2, count) indices of the upper triangle of a (row, col) matrix. Source: torch."""
    return _indices(np.triu, row, col, offset)


def fliplr(input: Any) -> Any:
    """`flip` of dimension 1. Source: torch.fliplr."""
    return flip(input, (1,))


def flipud(input: Any) -> Any:
    """`flip` of dimension 0. Source: torch.flipud."""
    return flip(input, (0,))
