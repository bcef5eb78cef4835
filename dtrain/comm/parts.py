"""How an array is divided among the ranks of a group, and into pieces that fit somewhere.

Owns: `slices`, `rows` and `pieces`; and `Cuts`, for parts that are themselves several pieces. All
algorithms divide alike, so that the ranks agree on it without a word.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from dtrain.comm.transports.mailbox import Array

__all__ = ["Cuts", "length", "packed", "pieces", "rows", "slices", "unpack", "whence", "where"]

# What belongs to one rank of a flat array: pieces of it, in ascending order. Packed, they stand one
# after the other.
Cuts = Sequence[slice]


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


def length(cuts: Cuts) -> int:
    """How many elements the pieces have together."""
    return sum(cut.stop - cut.start for cut in cuts)


def where(cuts: Cuts, window: slice) -> Iterator[tuple[slice, slice]]:
    """Where the pieces lie in `window`, a range of the flat array: (there, in the packed one)."""
    at = 0
    for cut in cuts:
        start, stop = max(cut.start, window.start), min(cut.stop, window.stop)
        if start < stop:
            here = at + start - cut.start
            yield (
                slice(start - window.start, stop - window.start),
                slice(here, here + stop - start),
            )
        at += cut.stop - cut.start


def whence(cuts: Cuts, window: slice) -> Iterator[tuple[slice, slice]]:
    """Where `window`, a range of the packed array, comes from: (there, in the flat one)."""
    at = 0
    for cut in cuts:
        end = at + cut.stop - cut.start
        start, stop = max(at, window.start), min(end, window.stop)
        if start < stop:
            here = cut.start + start - at
            yield (
                slice(start - window.start, stop - window.start),
                slice(here, here + stop - start),
            )
        at = end


def packed(flat: Array, cuts: Cuts) -> Array:
    """The pieces of `flat` one after the other: a copy, or a view when there is one piece."""
    if len(cuts) == 1:
        return flat[cuts[0]]
    return np.concatenate([flat[cut] for cut in cuts]) if cuts else flat[:0]


def unpack(values: Array, flat: Array, cuts: Cuts) -> None:
    """Put the packed `values` into their places in `flat`."""
    for there, here in whence(cuts, slice(0, values.size)):
        flat[here] = values[there]
