"""Sliding windows over images as matrices (im2col), and back: what convolutions are made of.

Rules: one image at a time, so that its matrix stays in cache; inside, pixels are rows of channels
(channels last), because windows are then copied in long runs and the matrix products read them
as they are. Large images are worked through in strips of output rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.lib.stride_tricks import as_strided

TILE = 1 << 20  # elements of the matrix of windows held at a time

Pair = tuple[int, int]


@dataclass(frozen=True)
class Geometry:
    """How a kernel moves over images (channels, height, width).

    `padding` is ((top, bottom), (left, right)).
    """

    image: tuple[int, int, int]
    kernel: Pair
    stride: Pair
    padding: tuple[Pair, Pair]
    dilation: Pair
    groups: int

    @cached_property
    def padded(self) -> Pair:
        (top, bottom), (left, right) = self.padding
        return self.image[1] + top + bottom, self.image[2] + left + right

    @cached_property
    def reach(self) -> Pair:
        """The pixels from the first to the last that one window touches."""
        return tuple(d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel, strict=True))

    @cached_property
    def out(self) -> Pair:
        sizes = zip(self.padded, self.reach, self.stride, strict=True)
        return tuple((size - reach) // step + 1 for size, reach, step in sizes)

    @property
    def pointwise(self) -> bool:
        """Whether every window is one pixel, and every pixel a window."""
        return self.kernel == (1, 1) == self.stride and self.padding == ((0, 0), (0, 0))


class Windows:
    """The windows of one image after the other, in buffers that are used again.

    Matrices are (groups, kernel height * kernel width * channels of a group, output pixels).
    """

    def __init__(self, geometry: Geometry, dtype: np.dtype) -> None:
        self.geometry = geometry
        channels, height, width = geometry.image
        (top, _), (left, _) = geometry.padding
        self.canvas = np.zeros((*geometry.padded, channels), dtype)
        self.inner = self.canvas[top : top + height, left : left + width]
        rows, columns = geometry.out
        per_row = max(1, columns * channels * geometry.kernel[0] * geometry.kernel[1])
        self.rows = max(1, min(rows, TILE // per_row))
        self.view = self._view()
        self.buffer = np.empty((geometry.groups, self.rows, *self.view.shape[2:]), dtype)

    def _view(self) -> np.ndarray:
        """The canvas as (groups, out rows, out columns, kernel rows, kernel columns, channels)."""
        g = self.geometry
        y, x, c = self.canvas.strides
        channels = g.image[0] // g.groups
        return as_strided(
            self.canvas,
            (g.groups, *g.out, *g.kernel, channels),
            (channels * c, y * g.stride[0], x * g.stride[1], y * g.dilation[0],
             x * g.dilation[1], c),
        )  # fmt: skip

    def strips(self) -> Iterator[tuple[slice, slice]]:
        """The output rows that are worked on together, and the output pixels these are."""
        rows, columns = self.geometry.out
        for start in range(0, rows, self.rows):
            stop = min(start + self.rows, rows)
            yield slice(start, stop), slice(start * columns, stop * columns)

    def matrices(self, image: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
        """For each strip of `image` (channels, height, width): its pixels, its windows."""
        g = self.geometry
        if g.pointwise:
            yield slice(None), image.reshape(g.groups, g.image[0] // g.groups, -1)
            return
        np.copyto(self.inner, image.transpose(1, 2, 0))
        for rows, pixels in self.strips():
            part = self.buffer[:, : rows.stop - rows.start]
            np.copyto(part, self.view[:, rows])
            count = pixels.stop - pixels.start
            yield pixels, part.reshape(g.groups, count, -1).transpose(0, 2, 1)

    def clear(self) -> None:
        self.canvas[...] = 0

    def add(self, rows: slice, windows: np.ndarray) -> None:
        """Add (groups, pixels, elements) to the places on the canvas that they came from."""
        parts = windows.reshape(-1, rows.stop - rows.start, *self.view.shape[2:])
        target = self.view[:, rows]
        for i in range(parts.shape[3]):
            for j in range(parts.shape[4]):
                place = target[:, :, :, i, j]
                np.add(place, parts[:, :, :, i, j], out=place)
