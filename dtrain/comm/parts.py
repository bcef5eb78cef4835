"""How an array is divided among the ranks of a group, and into pieces that fit somewhere.

Owns: `slices`, `rows` and `pieces`. All algorithms divide alike, so that the ranks agree on it
without a word.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from dtrain.comm.transports.mailbox import Array

__all__ = ["pieces", "rows", "slices"]


def slices(count: int, size: int) -> list[slice]:
    """`count` elements in `size` consecutive parts; the first `count % size` are one longer."""
    part, rest = divmod(count, size)
    bounds = [r * part + min(r, rest) for r in range(size + 1)]
    return [slice(a, b) for a, b in pairwise(bounds)]


def rows(array: Array, size: int) -> list[Array]:
    """A flat view of each rank's part of `array`."""
    flat = array.reshape(-1)
    return [flat[s] for s in slices(flat.size, size)]


def pieces(count: int, itemsize: int, limit: int) -> Iterator[slice]:
    """`count` elements in consecutive pieces of at most `limit` bytes; at least one piece."""
    step = limit // itemsize
    for start in range(0, max(count, 1), step):
        yield slice(start, min(start + step, count))
