"""How an array is divided among the ranks of a group.

Owns: `slices` and `rows`. All algorithms divide alike, so that the ranks agree on it without a
word.
"""

from __future__ import annotations

from itertools import pairwise

from dtrain.comm.transports.mailbox import Array

__all__ = ["rows", "slices"]


def slices(count: int, size: int) -> list[slice]:
    """`count` elements in `size` consecutive parts; the first `count % size` are one longer."""
    part, rest = divmod(count, size)
    bounds = [r * part + min(r, rest) for r in range(size + 1)]
    return [slice(a, b) for a, b in pairwise(bounds)]


def rows(array: Array, size: int) -> list[Array]:
    """A flat view of each rank's part of `array`."""
    flat = array.reshape(-1)
    return [flat[s] for s in slices(flat.size, size)]
