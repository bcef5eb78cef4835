"""FlatBuffer: one flat array with one view per shape.

Owns the layout that gradient buckets, sharded units and fused updates have in common. Rules: one
dtype a buffer; views never overlap and keep the order given; the gaps that alignment leaves are
zero, so that sums and norms over the whole array are those of its views.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Allocate = Callable[[tuple[int], np.dtype[Any]], Array]


class FlatBuffer:
    """`array`, 1-D, and `views`, one C-contiguous view of it per shape.

    `offsets[i]` is where view i starts, in elements. `allocate(shape, dtype)` gives the memory (an
    array of that shape: a process group's `empty` puts it where other ranks see it). `align` is in
    bytes, counted from the start of the array; 1 packs the views without gaps. ValueError when
    `align` is not a multiple or a divisor of the item size, or the memory is not as asked for.
    """

    __slots__ = ("array", "offsets", "views")

    def __init__(
        self,
        shapes: Iterable[Sequence[int]],
        dtype: Any,
        *,
        align: int = 64,
        allocate: Allocate = np.zeros,
    ) -> None:
        shapes, dtype = [tuple(shape) for shape in shapes], np.dtype(dtype)
        sizes = [math.prod(shape) for shape in shapes]
        self.offsets, total = _offsets(sizes, _step(align, dtype))
        self.array = allocate((total,), dtype)
        if self.array.shape != (total,) or self.array.dtype != dtype:
            raise ValueError(
                f"allocate(({total},), {dtype}) gave an array of shape {self.array.shape} and "
                f"dtype {self.array.dtype}"
            )
        self.views = tuple(
            self.array[start : start + size].reshape(shape)
            for start, size, shape in zip(self.offsets, sizes, shapes, strict=True)
        )
        ends = (*self.offsets, total)[1:]
        for start, size, end in zip(self.offsets, sizes, ends, strict=True):
            self.array[start + size : end] = 0

    @classmethod
    def of(
        cls, arrays: Sequence[Array], *, align: int = 64, allocate: Allocate = np.zeros
    ) -> FlatBuffer:
        """A buffer with a view per array, holding copies of them.

        ValueError when there is none, or they differ in dtype.
        """
        if not arrays:
            raise ValueError("FlatBuffer.of needs at least one array: the dtype is theirs")
        buffer = cls([a.shape for a in arrays], arrays[0].dtype, align=align, allocate=allocate)
        buffer.copy_in(arrays)
        return buffer

    def copy_in(self, arrays: Sequence[Array]) -> None:
        """Copy array i into view i. ValueError unless number, shapes and dtypes are the views'."""
        if len(arrays) != len(self.views):
            raise ValueError(f"copy_in: expected {len(self.views)} arrays, got {len(arrays)}")
        for i, (view, array) in enumerate(zip(self.views, arrays, strict=True)):
            if array.shape != view.shape or array.dtype != view.dtype:
                raise ValueError(
                    f"array {i} is {array.dtype}{list(array.shape)}, "
                    f"its view is {view.dtype}{list(view.shape)}"
                )
        for view, array in zip(self.views, arrays, strict=True):
            view[...] = array

    def __len__(self) -> int:
        return len(self.views)

    def __repr__(self) -> str:
        return f"FlatBuffer({len(self)} views, {self.array.size} of {self.array.dtype})"


def _step(align: int, dtype: np.dtype[Any]) -> int:
    """The alignment in elements."""
    if align < 1 or (align % dtype.itemsize and dtype.itemsize % align):
        raise ValueError(f"views of {dtype} ({dtype.itemsize} bytes) cannot be aligned to {align}")
    return max(1, align // dtype.itemsize)


def _offsets(sizes: list[int], step: int) -> tuple[tuple[int, ...], int]:
    """Where each view starts, in elements, and the size of the whole."""
    starts, end = [], 0
    for size in sizes:
        start = -(-end // step) * step
        starts.append(start)
        end = start + size
    return tuple(starts), end
