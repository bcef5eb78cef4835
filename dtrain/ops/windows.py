"""Sliding windows over images as matrices (im2col), and back: what convolutions are made of.

Rules: as many images at a time as have a matrix that stays in cache, and large ones in strips of
output rows; inside, pixels are rows of channels (channels last), because windows are then copied in
long runs and the matrix products read them as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.lib.stride_tricks import as_strided

# Elements of the matrix of windows held at a time. Six 3x3 convolutions and their gradients, batch
# 32, float32, 2 MiB L2: 85 ms with 128 Ki and 256 Ki, 90 ms with 512 Ki, 96 ms with 1 Mi.
TILE = 1 << 18

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
    """The windows of some images after the other, in buffers that are used again.

    `count`: how many images there are, or 1 where they are to be taken one at a time.
    Matrices are (groups, output pixels, kernel height * kernel width * channels of a group).
    """

    def __init__(self, geometry: Geometry, dtype: np.dtype, count: int = 1) -> None:
        self.geometry = geometry
        channels, height, width = geometry.image
        (top, _), (left, _) = geometry.padding
        rows, columns = geometry.out
        per_row = max(1, columns * channels * geometry.kernel[0] * geometry.kernel[1])
        self.rows = max(1, min(rows, TILE // per_row))
        self.count = max(1, min(count, TILE // (rows * per_row)))
        self.canvas = np.zeros((self.count, *geometry.padded, channels), dtype)
        self.inner = self.canvas[:, top : top + height, left : left + width]
        self.view = self._view()
        self.buffer = np.empty(
            (geometry.groups, self.count, self.rows, *self.view.shape[3:]), dtype
        )

    def _view(self) -> np.ndarray:
        """The canvas as (groups, images, out rows, out columns, kernel rows, columns, channels)."""
        g = self.geometry
        image, y, x, c = self.canvas.strides
        channels = g.image[0] // g.groups
        return as_strided(
            self.canvas,
            (g.groups, self.count, *g.out, *g.kernel, channels),
            (channels * c, image, y * g.stride[0], x * g.stride[1], y * g.dilation[0],
             x * g.dilation[1], c),
        )  # fmt: skip

    def strips(self) -> Iterator[tuple[slice, slice]]:
        """The output rows that are worked on together, and the output pixels these are."""
        rows, columns = self.geometry.out
        for start in range(0, rows, self.rows):
            stop = min(start + self.rows, rows)
            yield slice(start, stop), slice(start * columns, stop * columns)

    def matrices(self, images: np.ndarray) -> Iterator[tuple[slice, slice, np.ndarray]]:
        """Of `images` (N, channels, height, width): which ones, which of their pixels, and the
        windows of these, those of the first image first.
        """
        groups = self.geometry.groups
        if self.geometry.pointwise:  # nothing to copy, then
            for i, image in enumerate(images):
                values = image.reshape(groups, image.shape[0] // groups, -1)
                yield slice(i, i + 1), slice(None), values.transpose(0, 2, 1)
            return
        for start in range(0, len(images), self.count):
            part = images[start : start + self.count]
            np.copyto(self.inner[: len(part)], part.transpose(0, 2, 3, 1))
            for rows, pixels in self.strips():
                room = self.buffer[:, : len(part), : rows.stop - rows.start]
                np.copyto(room, self.view[:, : len(part), rows])
                count = len(part) * (pixels.stop - pixels.start)
                yield slice(start, start + len(part)), pixels, room.reshape(groups, count, -1)

    def clear(self) -> None:
        self.canvas[...] = 0

    def add(self, rows: slice, windows: np.ndarray) -> None:
        """Add (groups, pixels, elements) of the one image to where on the canvas they came from."""
        parts = windows.reshape(-1, rows.stop - rows.start, *self.view.shape[3:])
        target = self.view[:, 0, rows]
        for i in range(parts.shape[3]):
            for j in range(parts.shape[4]):
                place = target[:, :, :, i, j]
                np.add(place, parts[:, :, :, i, j], out=place)
