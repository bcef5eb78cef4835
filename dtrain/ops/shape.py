"""Views: other shapes, orders of dimensions and broadcasts of the same memory.

Views share memory and version counter with their input, as in torch. Shapes are tuples of ints.
The helpers that resolve dimensions and shapes for all families are here too.
"""

from __future__ import annotations

import builtins
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from dtrain.autograd.op import define, sum_to_shape
from dtrain.autograd.value import PARTS, array_of

F = TypeVar("F", bound=Callable[..., Any])
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
    axes = tuple([axis_of(d, ndim) for d in dim])
    for i, axis in enumerate(axes):
        if axis in axes[:i]:
            raise RuntimeError(f"dim {axis} appears multiple times in the list of dims")
    return axes


def numpy_names(function: F) -> F:
    """Let `function` also take NumPy's `axis` and `keepdims` for `dim` and `keepdim`, as torch."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if "axis" in kwargs:
            kwargs["dim"] = kwargs.pop("axis")
        if "keepdims" in kwargs:
            kwargs["keepdim"] = kwargs.pop("keepdims")
        return function(*args, **kwargs)

    return wrapped  # type: ignore[return-value]


def _rand(*shape: int) -> np.ndarray:
    return np.random.RandomState(0).rand(*shape)


def numel(input: Any) -> int:
    """How many elements a Tensor or array has. Source: torch.numel."""
    if PARTS and input.__class__ in PARTS:
        return input.numel()  # type: ignore[no-any-return]
    return array_of(input).size  # type: ignore[no-any-return]


# --- reshape and friends -----------------------------------------------------------------------


def resolve_shape(shape: Sequence[int], size: int) -> tuple[int, ...]:
    """`shape` with its one -1 worked out; RuntimeError in torch's words when it cannot be."""
    dims = tuple([int(n) for n in shape])
    if dims.count(-1) > 1:
        raise RuntimeError("only one dimension can be inferred")
    if builtins.any(n < -1 for n in dims):
        bad = next(i for i, n in enumerate(dims) if n < -1)
        raise RuntimeError(
            f"invalid shape dimension {dims[bad]} at index {bad} of shape {list(dims)}"
        )
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
    return _reshape(input, shape=resolve_shape(shape, numel(input)))


def view(input: Any, shape: Sequence[int]) -> Any:
    """`reshape` that never copies: RuntimeError where the strides do not allow a view."""
    return _view(input, shape=resolve_shape(shape, numel(input)))


def flatten(input: Any, start_dim: int = 0, end_dim: int = -1) -> Any:
    """Dimensions start_dim..end_dim become one. Source: torch.flatten."""
    if input.ndim == 0:
        return reshape(input, (1,))
    first, last = axis_of(start_dim, input.ndim), axis_of(end_dim, input.ndim)
    if first > last:
        raise RuntimeError("flatten() has invalid args: start_dim cannot come after end_dim")
    shape = tuple(input.shape)
    return reshape(input, (*shape[:first], math.prod(shape[first : last + 1]), *shape[last + 1 :]))


def ravel(input: Any) -> Any:
    """`reshape(-1)`. Source: torch.ravel."""
    return reshape(input, (-1,))


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


_permute: Any = define(
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
    "expand", lambda x, *, shape: x[...] if x.shape == shape else np.broadcast_to(x, shape),
    inputs="x", view=True,
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


def broadcast_shapes(*shapes: Any) -> tuple[int, ...]:
    """The shape that tensors of these shapes broadcast to. Source: torch.broadcast_shapes."""
    try:
        return np.broadcast_shapes(*shapes)
    except ValueError as error:
        raise RuntimeError(
            f"Shape mismatch: objects cannot be broadcast to a single shape: {error}"
        ) from None


def broadcast_tensors(*tensors: Any) -> tuple[Any, ...]:
    """Views of the tensors, all of their common shape. Source: torch.broadcast_tensors."""
    shape = broadcast_shapes(*[t.shape for t in tensors])
    return tuple(expand(t, shape) for t in tensors)


def broadcast_to(input: Any, shape: Sequence[int]) -> Any:
    """`expand`. Source: torch.broadcast_to."""
    return expand(input, shape)
