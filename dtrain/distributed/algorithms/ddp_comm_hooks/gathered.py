"""Means of what cannot be added while it is packed: gathered from all ranks, then unpacked.

Owns `mean_of_packed`, and `Residuals`, the part of the gradients that has not been sent yet. Rule:
contributions are unpacked and added in rank order, so that the mean has the same bits everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from dtrain.comm.collectives import AllGather
from dtrain.comm.work import Future
from dtrain.distributed.world import ProcessGroup
from dtrain.tensor import Tensor

Array = np.ndarray[Any, Any]


def wide(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype to compute in: 16-bit floats are widened."""
    return dtype if dtype.itemsize > 2 else np.dtype(np.float32)


def elements(bucket: Any) -> int:
    """How many elements the bucket's gradients have; its buffer may have gaps between them."""
    return sum(gradient.numel() for gradient in bucket.gradients())


def flat(bucket: Any, residuals: Residuals | None = None) -> Array:
    """The elements of the bucket's gradients, one after the other, in the dtype to compute in.

    With what is left over of them added, if given.
    """
    pairs = zip(bucket.parameters(), bucket.gradients(), strict=True)
    parts = [g._data if residuals is None else residuals.plus(p, g._data) for p, g in pairs]
    return np.concatenate([part.reshape(-1) for part in parts], dtype=wide(parts[0].dtype))


def spread(bucket: Any, values: Array) -> Tensor:
    """Write what `flat` gave into the gradients; returns the buffer."""
    start = 0
    for gradient in bucket.gradients():
        end = start + gradient.numel()
        gradient._data[...] = values[start:end].reshape(gradient._data.shape)
        start = end
    buffer: Tensor = bucket.buffer()
    buffer._bump_version()
    return buffer


def mean_of_packed(
    packed: Array, add: Callable[[Array, Array], None], bucket: Any, group: ProcessGroup
) -> Future[Tensor]:
    """Make the bucket's gradients the mean of what all ranks have packed; does not block.

    `packed` are uint8, as many on all ranks, `add(total, packed)` adds what they stand for to the
    elements of `flat`. One all-gather; takes memory for the bytes of all ranks.
    """
    everyone = np.empty((group.size(), packed.size), np.uint8)

    def average(future: Future[Any]) -> Tensor:
        future.value()
        total = np.zeros(elements(bucket), wide(bucket.buffer()._data.dtype))
        for theirs in everyone:
            add(total, theirs)
        total /= len(everyone)
        return spread(bucket, total)

    return group.issue(AllGather(packed, everyone), async_op=True).get_future().then(average)


class Residuals(dict[Any, Array]):
    """{parameter: what of its gradients has not been sent yet}, on this rank.

    Kept by parameter and not by bucket: DDP rebuilds its buckets after the first backward pass.
    """

    def plus(self, parameter: Any, gradient: Array) -> Array:
        """The gradient with what is left over, in the dtype to compute in; always a new array."""
        held = self.get(parameter)
        values = gradient.astype(wide(gradient.dtype))
        if held is not None:
            values += held
        return values

    def keep(self, parameter: Any, left: Array) -> None:
        """Remember what was not sent of `parameter`'s gradient, in its shape; `left` is copied."""
        held = self.get(parameter)
        if held is None:
            self[parameter] = np.array(left.reshape(parameter._data.shape))
        else:
            np.copyto(held, left.reshape(held.shape))

    def keep_all(self, bucket: Any, left: Array) -> None:
        """As `keep`, for every gradient of the bucket; `left` is laid out as `flat`."""
        start = 0
        for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
            self.keep(parameter, left[start : start + gradient.numel()])
            start += gradient.numel()
