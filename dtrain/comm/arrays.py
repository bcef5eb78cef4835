"""Arrays as collectives take them: how they are named in words, and what is refused.

Owns: `describe`, `check_array`, `check_pair`. Everything is checked at `submit`, before anything is
sent; behind it, arrays are trusted.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import numpy as np

from dtrain.comm.transports.mailbox import Array

__all__ = ["check_array", "check_pair", "describe", "dtype_name"]


@cache
def dtype_name(dtype: np.dtype[Any]) -> str:
    """The name of a dtype, kept: NumPy computes it anew each time."""
    return dtype.name


def describe(array: Array) -> str:
    """An array in words: float32[2, 3]."""
    return _described(array.dtype, array.shape)


@lru_cache(maxsize=4096)
def _described(dtype: np.dtype[Any], shape: tuple[int, ...]) -> str:
    return f"{dtype_name(dtype)}[{str(shape)[1:-1].removesuffix(',')}]"


def check_array(array: Array | None, what: str, *, writable: bool) -> Array:
    """Raise unless `array` is a C-contiguous, native array of plain values (and writable)."""
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{what}: expected a numpy.ndarray, got {type(array).__name__}")
    if array.dtype.hasobject or not array.dtype.isnative:
        raise TypeError(
            f"{what}: dtype {array.dtype} cannot be exchanged: use a native plain dtype"
        )
    if not array.flags.c_contiguous:
        raise ValueError(f"{what}: Tensors must be contiguous, got strides {array.strides}")
    if writable and not array.flags.writeable:
        raise ValueError(f"{what}: the array is read-only, and the result is written to it")
    return array


def check_pair(whole: Array, part: Array, size: int, what: str) -> None:
    """Raise unless `whole` has the dtype of `part` and holds one such part per rank."""
    if whole.dtype != part.dtype:
        raise TypeError(f"{what}: dtypes differ: {describe(whole)} and {describe(part)}")
    if whole.size != size * part.size:
        raise ValueError(
            f"{what}: expected {size} x {part.size} elements, got {describe(whole)}"
            f" for {describe(part)}"
        )
