"""Matrix products and what is built on them.

`linear` is one op so that a sharded weight can be freed after forward and gathered again before
backward: nothing but the weight itself is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dtrain import dtypes
from dtrain.autograd.op import define, sum_to_shape
from dtrain.autograd.value import Value
from dtrain.ops.shape import expand, permute, reshape, transpose, unsqueeze


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


def _matmul_forward(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    _check_dtypes(a, b)
    try:
        return np.matmul(a, b)
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
    rows = int(np.prod(a[:-1])) if len(b) == 2 else a[-2] if len(a) > 1 else 1
    return RuntimeError(
        f"mat1 and mat2 shapes cannot be multiplied ({rows}x{a[-1]} and {b[-2]}x{b[-1]})"
    )


def _matmul_vjp(n: Any, g: Any) -> Any:
    a, b = n.a, n.b
    (ashape, bshape) = n.shapes
    if len(ashape) == 1:
        a, g = unsqueeze(a, 0), unsqueeze(g, -1 if len(bshape) == 1 else -2)
    if len(bshape) == 1:
        b = unsqueeze(b, 1)
        g = g if len(ashape) == 1 else unsqueeze(g, -1)
    da = db = None
    if n.needs[0]:
        da = matmul(g, transpose(b, -1, -2))
        da = sum_to_shape(da, (1, *ashape) if len(ashape) == 1 else ashape).reshape(ashape)
    if n.needs[1]:
        db = matmul(transpose(a, -1, -2), g)
        db = sum_to_shape(db, (*bshape, 1) if len(bshape) == 1 else bshape).reshape(bshape)
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


def _linear_forward(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    if weight.ndim != 2 or x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise _matmul_error(x.shape, weight.shape[::-1])
    _check_dtypes(x, weight)
    flat = x.reshape(-1, x.shape[-1])
    out = np.matmul(flat, weight.T)
    if bias is not None:
        out += bias
    return out.reshape(*x.shape[:-1], weight.shape[0])


def _linear_vjp(n: Any, g: Any) -> Any:
    rows = reshape(g, (-1, n.shapes[1][0]))
    dx = dw = db = None
    if n.needs[0]:
        dx = reshape(matmul(rows, n.weight), n.shapes[0])
    if n.needs[1]:
        dw = matmul(transpose(rows, 0, 1), reshape(n.x, (-1, n.shapes[1][1])))
    if n.needs[2]:
        db = rows.sum(0)
    return dx, dw, db


_linear = define(
    "linear", _linear_forward, inputs="x weight bias", saves="x weight", vjp=_linear_vjp,
    sample=lambda: [((_rand(2, 5, 3), _rand(4, 3), _rand(4)), {}),
                    ((_rand(3), _rand(4, 3), None), {})],
)  # fmt: skip


def linear(input: Any, weight: Any, bias: Any = None) -> Any:
    """`input @ weight.T + bias`: (*, in) x (out, in) [+ (out)] -> (*, out).

    Source: torch.nn.functional.linear.
    """
    return _linear(input, weight, bias)


def addmm(input: Any, mat1: Any, mat2: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    """`beta * input + alpha * (mat1 @ mat2)`. Source: torch.addmm."""
    product = mm(mat1, mat2)
    return (input if beta == 1 else input * beta) + (product if alpha == 1 else product * alpha)


# --- einsum ------------------------------------------------------------------------------------


def _split_subscripts(equation: str, operands: int) -> tuple[list[str], str]:
    left, arrow, right = equation.replace(" ", "").partition("->")
    inputs = left.split(",")
    if len(inputs) != operands:
        raise RuntimeError(
            f"einsum(): the number of subscripts ({len(inputs)}) must match the number of operands "
            f"({operands})"
        )
    if not arrow:
        letters = sorted(c for c in set(left) if c.isalpha() and left.count(c) == 1)
        right = ("..." if "..." in left else "") + "".join(letters)
    return inputs, right


def einsum(equation: str, *operands: Any) -> Any:
    """Sums of products by index letters, over any number of operands. Source: torch.einsum.

    Evaluated from left to right, two operands at a time, each as one matrix product. Repeated
    letters inside one operand (diagonals) and ellipses are not supported.
    """
    tensors = (
        list(operands[0])
        if len(operands) == 1 and isinstance(operands[0], (list, tuple))
        else list(operands)
    )
    inputs, output = _split_subscripts(equation, len(tensors))
    for letters, tensor in zip(inputs, tensors, strict=True):
        if "." in letters or len(set(letters)) != len(letters):
            raise NotImplementedError(
                f"einsum(): '{letters}' in {equation!r}: ellipses and repeated letters are not "
                "supported; write the operation with reshape, diagonal or matmul"
            )
        if len(letters) != tensor.ndim:
            raise RuntimeError(
                f"einsum(): the number of subscripts in '{letters}' ({len(letters)}) does not "
                f"match the number of dimensions ({tensor.ndim})"
            )
    letters, result = inputs[0], tensors[0]
    for i in range(1, len(tensors)):
        later = set(output).union(*inputs[i + 1 :])
        letters, result = _contract(letters, result, inputs[i], tensors[i], later)
    return _reduce_to(letters, result, output)


def _reduce_to(letters: str, x: Any, output: str) -> Any:
    gone = tuple(i for i, c in enumerate(letters) if c not in output)
    if gone:
        x = x.sum(gone)
        letters = "".join(c for c in letters if c in output)
    missing = set(output) - set(letters)
    if missing:
        raise RuntimeError(
            f"einsum(): output subscript {sorted(missing)} does not appear in any input"
        )
    order = [letters.index(c) for c in output]
    return x if order == sorted(order) else permute(x, order)


def _contract(la: str, a: Any, lb: str, b: Any, later: set[str]) -> tuple[str, Any]:
    """One product: batch letters are in both and wanted later, summed ones in both only."""
    a = _reduce_to(la, a, "".join(c for c in la if c in lb or c in later))
    la = "".join(c for c in la if c in lb or c in later)
    b = _reduce_to(lb, b, "".join(c for c in lb if c in la or c in later))
    lb = "".join(c for c in lb if c in la or c in later)
    batch = [c for c in la if c in lb and c in later]
    summed = [c for c in la if c in lb and c not in later]
    only_a = [c for c in la if c not in lb]
    only_b = [c for c in lb if c not in la]
    size = dict(zip(la, a.shape, strict=True)) | dict(zip(lb, b.shape, strict=True))
    left = _as_matrix(la, a, batch, only_a, summed, size)
    right = _as_matrix(lb, b, batch, summed, only_b, size)
    out = matmul(left, right)
    names = batch + only_a + only_b
    return "".join(names), reshape(out, [size[c] for c in names])


def _as_matrix(
    letters: str, x: Any, batch: Sequence[str], rows: Sequence[str], columns: Sequence[str],
    size: dict[str, int],
) -> Any:  # fmt: skip
    x = permute(x, [letters.index(c) for c in (*batch, *rows, *columns)])
    shape = [int(np.prod([size[c] for c in group], dtype=np.int64)) for group in (rows, columns)]
    return reshape(x, [size[c] for c in batch] + shape)


def diagonal(input: Any, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Any:
    """The diagonals of the matrices in (dim1, dim2), as a copy in the last dimension."""
    order = [d for d in range(input.ndim) if d not in (dim1 % input.ndim, dim2 % input.ndim)]
    x = permute(input, [*order, dim1 % input.ndim, dim2 % input.ndim])
    rows = np.arange(max(0, -offset), x.shape[-2])
    columns = np.arange(max(0, offset), x.shape[-1])
    length = min(len(rows), len(columns))
    return x[(..., rows[:length], columns[:length])]


def numel(x: Any) -> int:
    """How many elements a Tensor or array has."""
    return x._data.size if isinstance(x, Value) else x.size  # type: ignore[no-any-return]


__all__ = [
    "addmm",
    "bmm",
    "diagonal",
    "dot",
    "einsum",
    "expand",
    "linear",
    "matmul",
    "mm",
    "mv",
    "numel",
    "outer",
]
