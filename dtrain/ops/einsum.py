"""Einstein summation: sums of products by index letters, two operands at a time.

Each step is one matrix product; letters that only one operand has and nobody wants any more are
summed before it. Repeated letters take diagonals; an ellipsis stands for dimensions that broadcast.
"""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from typing import Any

from dtrain.ops.linalg import diagonal, matmul
from dtrain.ops.shape import permute, reshape


def einsum(equation: str, *operands: Any) -> Any:
    """Sums of products by index letters, over any number of operands, from left to right.

    Source: torch.einsum, without its sublist format.
    """
    one = len(operands) == 1 and isinstance(operands[0], (list, tuple))
    tensors = list(operands[0] if one else operands)
    inputs, output = _split(equation, tensors)
    pairs = [_without_repeats(letters, x) for letters, x in zip(inputs, tensors, strict=True)]
    pairs = _without_broadcast(pairs)
    letters, result = pairs[0]
    for i in range(1, len(pairs)):
        later = set(output).union(*(names for names, _ in pairs[i + 1 :]))
        letters, result = _contract(letters, result, *pairs[i], later)
    return _reduce_to(letters, result, output)


def _split(equation: str, tensors: list[Any]) -> tuple[list[str], str]:
    """The letters of each operand and of the result, with letters of their own for an ellipsis."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    inputs = left.split(",")
    if len(inputs) != len(tensors):
        fewer = "more" if len(tensors) > len(inputs) else "fewer"
        raise RuntimeError(
            f"einsum(): {fewer} operands were provided than specified in the equation "
            f"({len(tensors)} and {len(inputs)})"
        )
    for part in [*inputs, right]:
        if any(not (c.isascii() and c.isalpha()) for c in part.replace("...", "", 1)):
            raise RuntimeError(f"einsum(): invalid subscript given in {part!r}: letters and ...")
    spare = [c for c in string.ascii_letters if c not in equation]
    hidden = [_hidden(part, x) for part, x in zip(inputs, tensors, strict=True)]
    dots = "".join(spare[: max(hidden)])
    named = [
        part.replace("...", dots[len(dots) - n :]) for part, n in zip(inputs, hidden, strict=True)
    ]
    if not arrow:
        plain = left.replace(".", "").replace(",", "")
        right = "..." + "".join(sorted(c for c in set(plain) if plain.count(c) == 1))
    output = right.replace("...", dots)
    for c in output:
        if output.count(c) > 1 or not any(c in part for part in named):
            why = "appears more than once" if output.count(c) > 1 else "is in no input"
            raise RuntimeError(f"einsum(): output subscript {c} {why}: {equation!r}")
    return named, output


def _hidden(part: str, x: Any) -> int:
    """How many dimensions the ellipsis of an operand stands for."""
    written = len(part.replace("...", ""))
    if x.ndim < written or ("..." not in part and x.ndim != written):
        raise RuntimeError(
            f"einsum(): the number of subscripts in '{part}' ({written}) does not match the "
            f"number of dimensions ({x.ndim}) of the operand"
        )
    return int(x.ndim) - written


def _without_repeats(letters: str, x: Any) -> tuple[str, Any]:
    for c in letters:
        while letters.count(c) > 1:
            first = letters.index(c)
            second = letters.index(c, first + 1)
            x = diagonal(x, 0, first, second)
            letters = letters[:first] + letters[first + 1 : second] + letters[second + 1 :] + c
    return letters, x


def _without_broadcast(pairs: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Dimensions of size 1 that are larger in another operand are dropped."""
    sizes: dict[str, int] = {}
    for letters, x in pairs:
        for c, n in zip(letters, x.shape, strict=True):
            if n != 1 and sizes.get(c, 1) not in (1, n):
                raise RuntimeError(
                    f"einsum(): subscript {c} has size {n} for one operand, {sizes[c]} for another"
                )
            sizes[c] = n if n != 1 else sizes.get(c, 1)
    out = []
    for letters, x in pairs:
        kept = [i for i, c in enumerate(letters) if x.shape[i] == sizes[c]]
        small = len(kept) < len(letters)
        out.append((
            "".join(letters[i] for i in kept),
            reshape(x, [x.shape[i] for i in kept]) if small else x,
        ))  # fmt: skip
    return out


def _reduce_to(letters: str, x: Any, output: str) -> Any:
    """The sum over letters that `output` lacks, in its order of dimensions."""
    gone = tuple(i for i, c in enumerate(letters) if c not in output)
    if gone:
        x = x.sum(gone)
        letters = "".join(c for c in letters if c in output)
    order = [letters.index(c) for c in output]
    return x if order == sorted(order) else permute(x, order)


def _contract(la: str, a: Any, lb: str, b: Any, later: set[str]) -> tuple[str, Any]:
    """One product: batch letters are in both and wanted later, summed ones in both only."""
    needed_a = "".join(c for c in la if c in lb or c in later)
    needed_b = "".join(c for c in lb if c in la or c in later)
    a, la = _reduce_to(la, a, needed_a), needed_a
    b, lb = _reduce_to(lb, b, needed_b), needed_b
    batch = [c for c in la if c in lb and c in later]
    summed = [c for c in la if c in lb and c not in later]
    only_a = [c for c in la if c not in lb]
    only_b = [c for c in lb if c not in la]
    size = dict(zip(la, a.shape, strict=True)) | dict(zip(lb, b.shape, strict=True))
    left = _as_matrix(la, a, batch, only_a, summed, size)
    right = _as_matrix(lb, b, batch, summed, only_b, size)
    names = batch + only_a + only_b
    return "".join(names), reshape(matmul(left, right), [size[c] for c in names])


def _as_matrix(
    letters: str, x: Any, batch: Sequence[str], rows: Sequence[str], columns: Sequence[str],
    size: dict[str, int],
) -> Any:  # fmt: skip
    x = permute(x, [letters.index(c) for c in (*batch, *rows, *columns)])
    shape = [math.prod([size[c] for c in group]) for group in (rows, columns)]
    return reshape(x, [size[c] for c in batch] + shape)
