"""Matrix products and what is built on them.

`linear` is one op so that a sharded weight can be freed after forward and gathered again before
backward: nothing but the weight itself is kept.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from dtrain import dtypes
from dtrain.autograd.op import define, sum_to_shape
from dtrain.ops.shape import axis_of, permute, reshape, transpose, unsqueeze


def _rand(*shape: int) -> np.ndarray:
    return np.random.RandomState(0).rand(*shape)


def _check_dtypes(a: np.ndarray, b: np.ndarray) -> None:
    if a.dtype is not b.dtype and a.dtype != b.dtype:
        raise RuntimeError(
            "expected m1 and m2 to have the same dtype, but got: "
            f"{_c_name(a.dtype)} != {_c_name(b.dtype)}"
        )


def _c_name(dtype: np.dtype[Any]) -> str:
    known = dtypes.from_numpy(dtype)
    return {dtypes.int64: "long", dtypes.int32: "int"}.get(known, known.scalar_type.lower())


def _product(a: np.ndarray, b: np.ndarray) -> Any:
    """np.matmul; numbers of 16 bits are multiplied and added in 32, and rounded once."""
    if a.dtype.itemsize == 2 and a.dtype.kind not in "iu":
        return np.matmul(a.astype(np.float32), b.astype(np.float32)).astype(a.dtype)
    return np.matmul(a, b)


def _matmul_forward(a: np.ndarray, b: np.ndarray) -> Any:
    _check_dtypes(a, b)
    try:
        if a.ndim > 2 and b.ndim == 2 and a.size:  # NumPy would multiply batch by batch
            flat = _product(a.reshape(-1, a.shape[-1]), b)
            return flat.reshape(*a.shape[:-1], b.shape[1])
        return _product(a, b)
    except ValueError:
        raise _matmul_error(a.shape, b.shape) from None


def _matmul_error(a: tuple[int, ...], b: tuple[int, ...]) -> RuntimeError:
    if not a or not b:
        return RuntimeError(
            f"both arguments to matmul need to be at least 1D, but they are {len(a)}D and {len(b)}D"
        )
    if len(a) == 1 and len(b) == 1:
        return RuntimeError(
            f"inconsistent tensor size, expected tensor [{a[0]}] and src [{b[0]}] to have the same "
            f"number of elements, but got {a[0]} and {b[0]} elements respectively"
        )
    if len(b) == 1:
        return RuntimeError(
            f"size mismatch, got input ({a[-2]}), mat ({a[-2]}x{a[-1]}), vec ({b[0]})"
        )
    if len(b) > 2 and len(a) > 2:
        return _batch_error(a, b)
    rows = int(np.prod(a[:-1])) if len(b) == 2 else a[-2] if len(a) > 1 else 1
    return RuntimeError(
        f"mat1 and mat2 shapes cannot be multiplied ({rows}x{a[-1]} and {b[-2]}x{b[-1]})"
    )


def _batch_error(a: tuple[int, ...], b: tuple[int, ...]) -> RuntimeError:
    for back in range(3, min(len(a), len(b)) + 1):
        if a[-back] != b[-back] and 1 not in (a[-back], b[-back]):
            return RuntimeError(
                f"The size of tensor a ({a[-back]}) must match the size of tensor b ({b[-back]}) "
                f"at non-singleton dimension {max(len(a), len(b)) - back}"
            )
    batch = int(np.prod(np.broadcast_shapes(a[:-2], b[:-2])))
    return RuntimeError(
        "Expected size for first two dimensions of batch2 tensor to be: "
        f"[{batch}, {a[-1]}] but got: [{batch}, {b[-2]}]."
    )


def _flat_rows(x: Any, width: int) -> Any:
    """The rows of all batches; a -1 could not be worked out where `width` is 0."""
    return reshape(x, (math.prod(x.shape[:-1]), width))


def _matmul_vjp(n: Any, g: Any) -> Any:
    a, b = n.a, n.b
    ashape, bshape = n.shapes
    if len(bshape) == 1:
        b, g = unsqueeze(b, 1), unsqueeze(g, -1)
    if len(ashape) == 1:
        a, g = unsqueeze(a, 0), unsqueeze(g, -2)
    da = db = None
    if n.needs[0]:
        da = sum_to_shape(matmul(g, transpose(b, -1, -2)), tuple(a.shape)).reshape(ashape)
    if n.needs[1]:
        if b.ndim == 2:  # one product of tall matrices instead of a sum of many
            a, g = _flat_rows(a, a.shape[-1]), _flat_rows(g, g.shape[-1])
        db = sum_to_shape(matmul(transpose(a, -1, -2), g), tuple(b.shape)).reshape(bshape)
    return da, db


def _matmul_sample() -> list[Any]:
    shapes = [((2, 3), (3, 4)), ((3,), (3,)), ((2, 3), (3,)), ((3,), (3, 4)),
              ((2, 1, 2, 3), (5, 3, 4)), ((2, 2, 3), (3,)), ((3,), (2, 3, 4))]  # fmt: skip
    return [((_rand(*a), _rand(*b)), {}) for a, b in shapes]


_matmul = define(
    "matmul", _matmul_forward, inputs="a b", saves="a b", vjp=_matmul_vjp, sample=_matmul_sample
)


def matmul(input: Any, other: Any) -> Any:
    """Matrix product with torch's rules for vectors and batches. Source: torch.matmul."""
    return _matmul(input, other)


def mm(input: Any, mat2: Any) -> Any:
    """The product of two matrices. Source: torch.mm."""
    if input.ndim != 2 or mat2.ndim != 2:
        which = "self" if input.ndim != 2 else "mat2"
        raise RuntimeError(f"{which} must be a matrix")
    return _matmul(input, mat2)


def bmm(input: Any, mat2: Any) -> Any:
    """The products of two batches (b, n, m) and (b, m, p) of matrices. Source: torch.bmm."""
    if input.ndim != 3 or mat2.ndim != 3 or input.shape[0] != mat2.shape[0]:
        raise RuntimeError(
            "batch1 and batch2 must be 3D tensors of the same batch size, got "
            f"{list(input.shape)} and {list(mat2.shape)}"
        )
    return _matmul(input, mat2)


def dot(input: Any, tensor: Any) -> Any:
    """The inner product of two vectors of one length. Source: torch.dot."""
    if input.ndim != 1 or tensor.ndim != 1:
        raise RuntimeError(f"1D tensors expected, but got {input.ndim}D and {tensor.ndim}D tensors")
    return _matmul(input, tensor)


def mv(input: Any, vec: Any) -> Any:
    """A matrix times a vector. Source: torch.mv."""
    if input.ndim != 2 or vec.ndim != 1:
        raise RuntimeError(f"vector + matrix @ vector expected, got 1, {input.ndim}, {vec.ndim}")
    return _matmul(input, vec)


def outer(input: Any, vec2: Any) -> Any:
    """`out[i][j] = input[i] * vec2[j]`. Source: torch.outer."""
    return unsqueeze(input, 1) * unsqueeze(vec2, 0)


# --- linear ------------------------------------------------------------------------------------


def _linear_forward(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None) -> Any:
    if weight.ndim != 2 or x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise _matmul_error(x.shape, weight.shape[::-1])
    _check_dtypes(x, weight)
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    out = _product(flat, weight.T)
    if bias is not None:
        out += bias
    return out.reshape(*x.shape[:-1], weight.shape[0])


def _linear_vjp(n: Any, g: Any) -> Any:
    rows = _flat_rows(g, n.shapes[1][0])
    dx = dw = db = None
    if n.needs[0]:
        dx = reshape(matmul(rows, n.weight), n.shapes[0])
    if n.needs[1]:
        flat, home = _flat_rows(n.x, n.shapes[1][1]), n.home(1)
        if home is None or home.itemsize == 2:
            dw = matmul(transpose(rows, 0, 1), flat)
        else:
            dw = np.matmul(rows.T, flat, out=home)
    if n.needs[2]:
        db = rows.sum(0)
    return dx, dw, db


_linear = define(
    "linear", _linear_forward, inputs="x weight bias", saves="x weight", vjp=_linear_vjp,
    lands=True,
    sample=lambda: [((_rand(2, 5, 3), _rand(4, 3), _rand(4)), {}),
                    ((_rand(3), _rand(4, 3), None), {})],
)  # fmt: skip


def linear(input: Any, weight: Any, bias: Any = None) -> Any:
    """`input @ weight.T + bias`: (*, in) x (out, in) [+ (out)] -> (*, out).

    Source: torch.nn.functional.linear.
    """
    return _linear(input, weight, bias)


def inner(input: Any, other: Any) -> Any:
    """Products summed over the last dimension of both. Source: torch.inner."""
    if input.ndim == 0 or other.ndim == 0:
        return input * other
    return tensordot(input, other, ([-1], [-1]))


def tensordot(a: Any, b: Any, dims: Any = 2) -> Any:
    """Products summed over dimensions: the last and first `dims`, or two lists. Source: torch."""
    if isinstance(dims, int):
        dims = (list(range(a.ndim - dims, a.ndim)), list(range(dims)))
    first = [axis_of(d, a.ndim) for d in dims[0]]
    second = [axis_of(d, b.ndim) for d in dims[1]]
    if [a.shape[d] for d in first] != [b.shape[d] for d in second]:
        raise RuntimeError("contracted dimensions need to match, but they have different sizes")
    keep_a = [d for d in range(a.ndim) if d not in first]
    keep_b = [d for d in range(b.ndim) if d not in second]
    summed = math.prod([a.shape[d] for d in first])
    left = reshape(permute(a, keep_a + first), (-1 if summed else 0, summed))
    right = reshape(permute(b, second + keep_b), (summed, -1 if summed else 0))
    return reshape(matmul(left, right), [a.shape[d] for d in keep_a] + [b.shape[d] for d in keep_b])


def addmm(input: Any, mat1: Any, mat2: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    """`beta * input + alpha * (mat1 @ mat2)`. Source: torch.addmm."""
    return _added(input, mm(mat1, mat2), beta, alpha)


def _added(input: Any, product: Any, beta: float, alpha: float) -> Any:
    if beta == 0:  # as in torch, nan in `input` then counts for nothing
        return product if alpha == 1 else product * alpha
    return (input if beta == 1 else input * beta) + (product if alpha == 1 else product * alpha)


def addmv(input: Any, mat: Any, vec: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    """`beta * input + alpha * (mat @ vec)`. Source: torch.addmv."""
    return _added(input, mv(mat, vec), beta, alpha)


def addr(input: Any, vec1: Any, vec2: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    """`beta * input + alpha * outer(vec1, vec2)`. Source: torch.addr."""
    return _added(input, outer(vec1, vec2), beta, alpha)


def baddbmm(input: Any, batch1: Any, batch2: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    """`beta * input + alpha * bmm(batch1, batch2)`. Source: torch.baddbmm."""
    return _added(input, bmm(batch1, batch2), beta, alpha)


# --- diagonals -----------------------------------------------------------------------------------


def _diagonal_forward(x: np.ndarray, *, offset: int, dim1: int, dim2: int) -> np.ndarray:
    out = np.diagonal(x, offset, dim1, dim2)
    out.flags.writeable = x.flags.writeable  # NumPy hands out a view that is read-only
    return out


def _diagonal_vjp(n: Any, g: Any) -> Any:
    return (_embed(g, shape=n.shapes[0], offset=n.offset, dim1=n.dim1, dim2=n.dim2),)


def _embed_forward(
    x: np.ndarray, *, shape: tuple[int, ...], offset: int, dim1: int, dim2: int
) -> np.ndarray:
    out = np.zeros(shape, x.dtype)
    _diagonal_forward(out, offset=offset, dim1=dim1, dim2=dim2)[...] = x
    return out


_diagonal = define(
    "diagonal", _diagonal_forward, view=True, vjp=_diagonal_vjp,
    sample=lambda: [((_rand(2, 3, 4),), {"offset": 1, "dim1": 1, "dim2": 2})],
)  # fmt: skip
_embed = define(
    "diagonal_embed", _embed_forward,
    vjp=lambda n, g: (_diagonal(g, offset=n.offset, dim1=n.dim1, dim2=n.dim2),),
    sample=lambda: [((_rand(2, 3),), {"shape": (2, 3, 4), "offset": 1, "dim1": 1, "dim2": 2})],
)  # fmt: skip


def diagonal(input: Any, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Any:
    """The diagonals of the matrices in (dim1, dim2), as a view, in the last dimension.

    Source: torch.diagonal.
    """
    a, b = axis_of(dim1, input.ndim), axis_of(dim2, input.ndim)
    if a == b:
        raise RuntimeError(f"diagonal dimensions cannot be identical {dim1}, {dim2}")
    return _diagonal(input, offset=offset, dim1=a, dim2=b)


def diag_embed(input: Any, offset: int = 0, dim1: int = -2, dim2: int = -1) -> Any:
    """Matrices with the last dimension on their diagonals, in (dim1, dim2). Source: torch."""
    ndim = input.ndim + 1
    a, b = axis_of(dim1, ndim), axis_of(dim2, ndim)
    size = input.shape[-1] + abs(offset)
    rest = iter(input.shape[:-1])
    shape = tuple([size if d in (a, b) else next(rest) for d in range(ndim)])
    return _embed(input, shape=shape, offset=offset, dim1=a, dim2=b)


def diag(input: Any, diagonal: int = 0) -> Any:
    """A vector's diagonal matrix, or a matrix's diagonal. Source: torch.diag."""
    if input.ndim == 1:
        return diag_embed(input, diagonal)
    if input.ndim != 2:
        raise RuntimeError(f"diag(): Supports 1D or 2D tensors. Got {input.ndim}D")
    return _diagonal(input, offset=diagonal, dim1=0, dim2=1).clone()


def trace(input: Any) -> Any:
    """The sum of a matrix's diagonal. Source: torch.trace."""
    if input.ndim != 2:
        raise RuntimeError("trace: expected a matrix")
    return diagonal(input).sum()
