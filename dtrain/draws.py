"""From uniform words to numbers: the arithmetic of a Generator's draws, without its state.

Rule 1: every rounding is torch's; where one is not, the docstring says by how much.
Rule 2: long draws go through chunks of 32 Ki elements: temporaries stay in the cache.
Rule 3: refusals are here too, with torch's sentences, so that the draws read as formulas.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dtrain.dtypes import DTYPE_OF, bool_, dtype, finfo, iinfo

Array = np.ndarray[Any, Any]
Shape = Sequence[int]

_CHUNK = 1 << 15  # elements; a multiple of 16, so that no block of a normal fill is split


def fill(shape: Shape, dtype: dtype, draw: Callable[[int], Array]) -> Array:
    """A new array of `dtype`, filled in order by `draw(n)`."""
    out = np.empty(shape, dtype.numpy)
    fill_into(out.reshape(-1), dtype, draw)
    return out


def fill_into(flat: Array, dtype: dtype, draw: Callable[[int], Array]) -> None:
    """Fill a flat array of `dtype` in order by `draw(n)`, at most _CHUNK elements at a time."""
    for start in range(0, flat.size, _CHUNK):
        chunk = flat[start : start + _CHUNK]
        chunk[...] = narrow(draw(chunk.size), dtype)


def narrow(values: Array, dtype: dtype) -> Array:
    """`values` on the way to `dtype`: torch rounds float64 to a 16-bit float through float32."""
    if dtype.itemsize == 2 and values.dtype == np.float64:
        return values.astype(np.float32)
    return values


def multiply_add(x: Array, scale: float, shift: float) -> Array:
    """x * scale + shift; float32 with one rounding, as the fused instruction that torch uses."""
    if x.dtype == np.float64:
        return x * scale + shift
    if shift == 0:
        return x if scale == 1 else x * np.float32(scale)
    exact = x.astype(np.float64)  # a product of two 24-bit mantissas fits 53 bits
    exact *= np.float32(scale)
    exact += np.float32(shift)
    return exact.astype(np.float32)


def box_muller(u: Array) -> Array:
    """Normals from uniforms, in blocks of 16: eight radii, eight angles; eight cos, eight sin."""
    blocks = u.reshape(-1, 16)
    radius = np.sqrt(-2 * np.log(1 - blocks[:, :8]))
    angle = u.dtype.type(2 * math.pi) * blocks[:, 8:]
    out = np.empty_like(blocks)
    np.multiply(radius, np.cos(angle), out=out[:, :8])
    np.multiply(radius, np.sin(angle), out=out[:, 8:])
    return out.reshape(-1)


def modulo(words: Array, span: int) -> Array:
    # NumPy divides by a constant with SIMD, but not its remainder: 4 times faster in two steps.
    quotient = words // np.uint64(span)
    quotient *= np.uint64(span)
    return words - quotient


def shuffled(n: int, targets: Array) -> Array:
    """arange(n) after swapping i with targets[i] >= i, for i = 0, 1, ..., n-2.

    While about sqrt(n) steps touch different places they are one NumPy swap; a plain loop ends.
    """
    order = np.arange(n)
    last_writer = np.empty(n, np.int64)
    start = 0
    while n - start > 4096:
        stop = start + math.isqrt(n - start) // 2
        block = targets[start:stop]
        steps = np.arange(start, stop)
        last_writer[block] = steps
        independent = (last_writer[block] == steps) & ((block >= stop) | (block == steps))
        if not independent.all():
            stop = start + _independent_steps(start, block.tolist())
            block = targets[start:stop]
        order[start:stop], order[block] = order[block], order[start:stop].copy()
        start = stop
    rest = order[start:].tolist()
    for i, target in enumerate((targets[start:] - start).tolist()):
        rest[i], rest[target] = rest[target], rest[i]
    order[start:] = rest
    return order


def _independent_steps(start: int, block: list[int]) -> int:
    """How many of the first swaps (start + k, block[k]) touch no place twice; at least one."""
    touched: set[int] = set()
    for i, target in enumerate(block, start):
        if i in touched or target in touched:
            return i - start
        touched.add(target)
    return len(block)


def inside_out(n: int, draw: Callable[[int], Array]) -> Array:
    """torch's shuffle for very long permutations, where one word would be too coarse."""
    order = np.empty(n, np.int64)
    view = order.data
    for start in range(0, n, _CHUNK):
        bounds = np.arange(start + 1, min(start + _CHUNK, n) + 1, dtype=np.uint64)
        for i, place in enumerate((draw(bounds.size) % bounds).tolist(), start):
            view[i] = view[place]
            view[place] = i
    return order


# --- what callers may not do ---------------------------------------------------------------------


def require_floating(dtype: dtype, kernel: str) -> None:
    if not dtype.is_floating_point:
        raise NotImplementedError(f"\"{kernel}\" not implemented for '{dtype.scalar_type}'")


@functools.cache
def _largest(dtype: dtype) -> float:
    return finfo(dtype).max


def require_interval(low: float, high: float, dtype: dtype) -> None:
    if low > high:
        raise RuntimeError(
            f"uniform_ expects to return a [from, to) range, but found from={low} > to={high}"
        )
    largest = _largest(dtype)
    if not (-largest <= low and high <= largest and high - low <= largest):
        raise RuntimeError(
            "uniform_ expects to-from <= std::numeric_limits<T>::max(), but found "
            f"to={high} and from={low} which result in to-from to exceed the limit of {dtype}"
        )


def require_range(low: int, high: int, dtype: dtype) -> None:
    if dtype is bool_:
        smallest, largest = 0, 1
    elif dtype.is_floating_point:
        smallest, largest = int(finfo(dtype).min), int(finfo(dtype).max)
    else:
        smallest, largest = iinfo(dtype).min, iinfo(dtype).max
    if not smallest <= low <= largest:
        raise RuntimeError(f"from is out of bounds for {dtype}: got {low}")
    if high - 1 > largest:
        raise RuntimeError(f"to - 1 is out of bounds for {dtype}: got to={high}")


def check_multinomial(probs: Array, num_samples: int, replacement: bool) -> None:
    dt = DTYPE_OF[probs.dtype]
    if not dt.is_floating_point:
        raise RuntimeError(
            f"multinomial only supports floating-point dtypes for input, got: {dt.scalar_type}"
        )
    if probs.ndim not in (1, 2):
        raise RuntimeError(f"prob_dist must be 1 or 2 dim, got shape {list(probs.shape)}")
    if num_samples <= 0:
        raise RuntimeError(f"cannot sample n_sample <= 0 samples, got {num_samples}")
    if not replacement and num_samples > probs.shape[-1]:
        raise RuntimeError(
            "cannot sample n_sample > prob_dist.size(-1) samples without replacement, got "
            f"{num_samples} > {probs.shape[-1]}"
        )
    if not ((probs >= 0) & (probs < np.inf)).all():
        raise RuntimeError("probability tensor contains either `inf`, `nan` or element < 0")
    if (probs.sum(axis=-1) == 0).any():
        raise RuntimeError("invalid multinomial distribution (sum of probabilities <= 0)")
