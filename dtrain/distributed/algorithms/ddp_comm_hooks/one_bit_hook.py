"""One bit an element: the sign of each gradient, and two means for each row. Not in torch.

What rounding leaves over is added to the next gradients (error feedback), so that in the long run
everything is sent. A row is what leads to one output of a layer (the paper's column); a vector is
one row. With one pair of means for a whole parameter an MLP on digits learns a tenth as fast.
Source: Seide et al., 1-Bit Stochastic Gradient Descent, Interspeech 2014.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np

from dtrain.comm.work import Future
from dtrain.distributed.algorithms.ddp_comm_hooks.gathered import (
    Array,
    Residuals,
    elements,
    flat,
    mean_of_packed,
)
from dtrain.distributed.algorithms.ddp_comm_hooks.stages import Payload, group_of, sends
from dtrain.tensor import Tensor

HEADER = 8  # bytes a row: what a 1 and what a 0 stand for, float32 each


class OneBitState:
    """What `one_bit_hook` keeps between calls: the group, and what it has not sent yet."""

    def __init__(self, process_group: Any = None) -> None:
        self.process_group = process_group
        self.residuals = Residuals()


def rows_of(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a gradient."""
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))


def pack(values: Array, shapes: list[tuple[int, int]]) -> Array:
    """The bytes of `values`, consecutive matrices: the two means of each row, then all signs.

    An element stands for the mean of those of its row and sign: the best two levels can do.
    """
    levels = []
    for matrix in _matrices(values, shapes):
        up = matrix >= 0
        count, total = up.sum(axis=1), np.where(up, matrix, 0).sum(axis=1)
        rest = matrix.shape[1] - count, np.where(up, 0, matrix).sum(axis=1)
        levels.append(np.stack([total / np.maximum(count, 1), rest[1] / np.maximum(rest[0], 1)], 1))
    header = np.concatenate(levels, dtype=np.float32, casting="same_kind")
    return np.concatenate([header.reshape(-1).view(np.uint8), np.packbits(values >= 0)])


def unpack(data: Array, shapes: list[tuple[int, int]]) -> Array:
    """The elements (float32) that `pack` made bytes of."""
    end = HEADER * sum(rows for rows, _ in shapes)
    levels = np.split(data[:end].view(np.float32).reshape(-1, 2), np.cumsum([r for r, _ in shapes]))
    size = sum(rows * columns for rows, columns in shapes)
    up = np.unpackbits(data[end:], count=size).view(np.bool_)
    parts = zip(_matrices(up, shapes), levels, strict=False)
    return np.concatenate([np.where(m, pair[:, :1], pair[:, 1:]).reshape(-1) for m, pair in parts])


def _matrices(flat: Array, shapes: list[tuple[int, int]]) -> list[Array]:
    parts = np.split(flat, np.cumsum([rows * columns for rows, columns in shapes])[:-1])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def _shapes(bucket: Any) -> list[tuple[int, int]]:
    return [rows_of(gradient._data.shape) for gradient in bucket.gradients()]


def _add(shapes: list[tuple[int, int]], total: Array, data: Array) -> None:
    total += unpack(data, shapes)


def _payload(state: OneBitState, bucket: Any) -> Payload:
    header = HEADER * sum(rows for rows, _ in _shapes(bucket))
    return Payload(all_gather=header + -(-elements(bucket) // 8))


@sends(_payload)
def one_bit_hook(state: OneBitState, bucket: Any) -> Future[Tensor]:
    """The mean of signs times means: n / 8 + 8 r bytes for n elements in r rows."""
    values, shapes = flat(bucket, state.residuals), _shapes(bucket)
    packed = pack(values, shapes)
    state.residuals.keep_all(bucket, values - unpack(packed, shapes))
    return mean_of_packed(packed, partial(_add, shapes), bucket, group_of(state))
