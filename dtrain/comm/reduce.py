"""Reduction operators, and the one function that combines the contributions of all ranks.

Owns: `ReduceOp`, which dtypes each operator allows, the order and the precision of every sum.
Rules: 1. contributions are combined in rank order, ((c0 + c1) + c2) + ..., so that the bits of a
result depend on nothing but the values. 2. float16 and bfloat16 are accumulated in float32 and
rounded once, at the end. 3. MIN and MAX propagate NaN. 4. Integers wrap around; on bool SUM is "or"
and PRODUCT is "and". 5. AVG is the sum divided by the number of ranks; integers and bool refuse it,
as torch's gloo backend does.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextvars import Context
from dataclasses import dataclass
from typing import Any, ClassVar

import ml_dtypes
import numpy as np

from dtrain.comm.transports.mailbox import Array

__all__ = [
    "AVG",
    "BAND",
    "BOR",
    "BXOR",
    "MAX",
    "MIN",
    "PREMUL_SUM",
    "PRODUCT",
    "SUM",
    "ReduceOp",
    "check_op",
    "combine",
    "finish",
    "fold",
    "rounded",
    "wide",
    "widened",
]

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_FLOAT16 = np.dtype(np.float16)
_FLOAT32 = np.dtype(np.float32)

_BLOCK = 1 << 15  # elements that are converted at a time, in cache
_SMALL = 1 << 12  # below this NumPy's own conversion is as fast
_OVERFLOWS = 0x477FF000  # the bits of 65520, which is no float16 any more

_UFUNCS: dict[str, np.ufunc] = {
    "SUM": np.add,
    "AVG": np.add,
    "PREMUL_SUM": np.add,
    "PRODUCT": np.multiply,
    "MIN": np.minimum,
    "MAX": np.maximum,
    "BAND": np.bitwise_and,
    "BOR": np.bitwise_or,
    "BXOR": np.bitwise_xor,
}
_NOT_COMPLEX = {"PRODUCT", "MIN", "MAX", "BAND", "BOR", "BXOR"}
_BITWISE = {"BAND", "BOR", "BXOR"}


@dataclass(frozen=True, slots=True)
class ReduceOp:
    """How contributions are combined. Compare by value; the ready ones are class attributes.

    `ReduceOp.PREMUL_SUM(factor)` multiplies every contribution by `factor` (the same on all ranks)
    and adds.
    """

    name: str
    factor: float | None = None

    SUM: ClassVar[ReduceOp]
    AVG: ClassVar[ReduceOp]
    PRODUCT: ClassVar[ReduceOp]
    MIN: ClassVar[ReduceOp]
    MAX: ClassVar[ReduceOp]
    BAND: ClassVar[ReduceOp]
    BOR: ClassVar[ReduceOp]
    BXOR: ClassVar[ReduceOp]
    RedOpType: ClassVar[type[ReduceOp]]  # torch's name for the kind of these values

    def __post_init__(self) -> None:
        if self.name not in _UFUNCS:
            raise ValueError(f"unknown ReduceOp {self.name!r} (known: {', '.join(_UFUNCS)})")
        if (self.name == "PREMUL_SUM") != (self.factor is not None):
            raise ValueError("a factor belongs to PREMUL_SUM, and only to it")

    @staticmethod
    def PREMUL_SUM(factor: float) -> ReduceOp:
        return ReduceOp("PREMUL_SUM", float(factor))

    def __str__(self) -> str:
        return self.name if self.factor is None else f"{self.name}({self.factor!r})"


ReduceOp.RedOpType = ReduceOp
for _name in ("SUM", "AVG", "PRODUCT", "MIN", "MAX", "BAND", "BOR", "BXOR"):
    setattr(ReduceOp, _name, ReduceOp(_name))

SUM, AVG, PRODUCT, MIN, MAX = (
    ReduceOp.SUM,
    ReduceOp.AVG,
    ReduceOp.PRODUCT,
    ReduceOp.MIN,
    ReduceOp.MAX,
)
BAND, BOR, BXOR = ReduceOp.BAND, ReduceOp.BOR, ReduceOp.BXOR
PREMUL_SUM = ReduceOp.PREMUL_SUM


def check_op(op: ReduceOp, dtype: np.dtype[Any], where: str) -> None:
    """Raise what torch raises when `op` is not defined on `dtype`.

    `where` is the collective's name.
    """
    if not isinstance(op, ReduceOp):
        raise TypeError(f"{where}: op must be a ReduceOp, such as ReduceOp.SUM, got {op!r}")
    integral = dtype.kind in "biu"
    if dtype.kind == "c" and op.name in _NOT_COMPLEX:
        raise ValueError(f"{where} does not support ReduceOp.{op} on complex tensors")
    if op.name in _BITWISE and not integral:
        raise RuntimeError(f"Cannot use ReduceOp.{op} with non-integral dtype ({dtype.name})")
    if op.name in ("AVG", "PREMUL_SUM") and integral:
        raise RuntimeError(
            f"{where}: result type Float can't be cast to the desired output type {dtype.name};"
            f" ReduceOp.{op.name} needs a floating dtype: use SUM and divide"
        )


def combine(op: ReduceOp, contributions: Sequence[Array], out: Array) -> None:
    """Combine one array per rank, in rank order, into `out`; all have the same shape and dtype.

    Contributions of 16-bit floats may also be combined into float32, which is not rounded then.
    `out` may be the very memory of one contribution (an all-reduce in place). If that one comes
    third or later, the first contribution is used as scratch and overwritten: it must then be the
    caller's to spoil. Each step is one NumPy call with `out=`, which releases the GIL when it is
    large.
    """
    given = contributions[0].dtype
    if given.itemsize == 2 and given in (_FLOAT16, _BFLOAT16):
        _quiet.copy().run(_combine_wide, op, contributions, out)
    else:
        _quiet.copy().run(_combine, op, contributions, out)


# Overflow and NaN are the user's values, reported by his own code and not by a warning from here.
# NumPy keeps its error state in a context variable: a copy of a context in which it is set costs
# 0.2 us, np.errstate 0.9 us.
_quiet = Context()
_quiet.run(np.seterr, all="ignore")


def _combine_wide(op: ReduceOp, contributions: Sequence[Array], out: Array) -> None:
    total = np.empty(out.shape, _FLOAT32)
    _combine(op, [wide(c, _FLOAT32) for c in contributions], total)
    out[...] = rounded(total, out.dtype)


def rounded(values: Array, dtype: np.dtype[Any]) -> Array:
    """`values.astype(dtype)` with the same bits, without NumPy's slow way to float16.

    1 M gradients of about 1e-6: 2 ms instead of 63, of about 1e-4: 2 instead of 34, of about 1: as
    long. Overflow warns as in `astype`.
    """
    if dtype != _FLOAT16 or values.dtype != _FLOAT32 or values.size < _SMALL:
        return values.astype(dtype, copy=False)
    out = np.empty(values.shape, dtype)
    source, target = values.reshape(-1), out.reshape(-1)
    spare = np.empty((3, min(_BLOCK, values.size)), np.uint32)
    for at in range(0, values.size, _BLOCK):
        part = source[at : at + _BLOCK]
        _round(part, target[at : at + _BLOCK], *spare[:, : part.size])
    return out


def _round(values: Array, out: Array, size: Array, half: Array, mask: Array) -> None:
    """One block of float32 to float16, by bits; the last three are memory to work in.

    Normal: half of the lowest bit that stays is added, a bit less if that one is even, then the
    exponent's offset goes from 127 to 15. Below 2**-14 float16 has steps of 2**-24, as float32 has
    around 0.5: adding that rounds, and leaves the bits. Without a branch: both are computed.
    """
    bits, signed = values.view(np.uint32), mask.view(np.int32)
    np.bitwise_and(bits, 0x7FFFFFFF, out=size)
    if size.max() >= _OVERFLOWS:
        out[...] = values  # also what is infinite, or no number
        return
    np.right_shift(size, 13, out=half)
    np.bitwise_and(half, 1, out=half)
    half += 0xFFF
    half += size
    np.right_shift(half, 13, out=half)
    half -= 112 << 10
    np.subtract(size.view(np.int32), 0x38800000, out=signed)  # negative below 2**-14
    np.right_shift(signed, 31, out=signed)  # all ones there
    small = size.view(_FLOAT32)
    small += _FLOAT32.type(0.5)
    size -= 0x3F000000
    size ^= half
    size &= mask
    half ^= size
    np.right_shift(bits, 16, out=mask)
    mask &= 0x8000
    half |= mask
    out.view(np.uint16)[...] = half


def wide(values: Array, dtype: np.dtype[Any]) -> Array:
    """`np.asarray(values, dtype)`, without NumPy's slow way from small float16.

    A table has all float16 there are: 1 M gradients of about 1e-6 take 1 ms instead of 11. Blocks
    keep the indices, which NumPy makes 8 bytes wide, in cache.
    """
    if values.dtype != _FLOAT16 or dtype != _FLOAT32 or values.size < _SMALL:
        return np.asarray(values, dtype)
    out = np.empty(values.shape, dtype)
    places, flat = values.reshape(-1).view(np.uint16), out.reshape(-1)
    for at in range(0, values.size, _BLOCK):
        np.take(_halves(), places[at : at + _BLOCK], out=flat[at : at + _BLOCK], mode="clip")
    return out


@functools.cache
def _halves() -> Array:
    """Every float16 as float32, by its bits; 256 KiB."""
    return np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(_FLOAT32)


def _combine(op: ReduceOp, contributions: Sequence[Array], out: Array) -> None:
    ufunc = _UFUNCS[op.name]
    if op.name == "SUM" and len(contributions) == 2:
        ufunc(*contributions, out)
        return
    if op.factor is not None:
        contributions = [np.multiply(c, out.dtype.type(op.factor)) for c in contributions]
    total = contributions[0]
    many = len(contributions) > 2
    spoil = many and any(np.may_share_memory(c, out) for c in contributions[2:])
    for k, contribution in enumerate(contributions[1:], start=2):
        target = out if k == len(contributions) or not spoil else contributions[0]
        total = ufunc(total, contribution, out=target)
    if total is not out:
        np.copyto(out, total)
    if op.name == "AVG":
        _divide(out, len(contributions))


def _divide(total: Array, size: int) -> None:
    """`total / size`, in place. A real number by a power of two: a product gives the same bits,
    four times as fast.
    """
    if size & (size - 1) or total.dtype.kind != "f":
        np.divide(total, total.dtype.type(size), out=total)
    else:
        np.multiply(total, total.dtype.type(1 / size), out=total)


def widened(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype in which contributions of `dtype` are accumulated."""
    return _FLOAT32 if dtype in (_FLOAT16, _BFLOAT16) else dtype


def fold(op: ReduceOp, total: Array | None, contributions: Sequence[Array], out: Array) -> None:
    """Go on with `combine`: add the next ranks' `contributions` to `total` (None: nothing yet).

    `total` and `out` have the `widened` dtype, and `out` is none of the contributions.
    """
    _quiet.copy().run(_fold, op, total, contributions, out)


def _fold(op: ReduceOp, total: Array | None, contributions: Sequence[Array], out: Array) -> None:
    ufunc = _UFUNCS[op.name]
    for contribution in contributions:
        term = wide(contribution, out.dtype)
        if op.factor is not None:
            term = np.multiply(term, out.dtype.type(op.factor))
        total = term if total is None else ufunc(total, term, out=out)
    if total is not out and total is not None:
        np.copyto(out, total)


def finish(op: ReduceOp, total: Array, size: int, dtype: np.dtype[Any]) -> Array:
    """The result of `combine` in `dtype`, once the contributions of all `size` ranks are folded."""
    return _quiet.copy().run(_finish, op, total, size, dtype)


def _finish(op: ReduceOp, total: Array, size: int, dtype: np.dtype[Any]) -> Array:
    if op.name == "AVG":
        _divide(total, size)
    return rounded(total, dtype)
