"""One bit an element: the sign of each gradient, and two means for each parameter. Not in torch.

What rounding leaves over is added to the next gradients (error feedback), so that in the long run
everything is sent. Source: Seide et al., 1-Bit Stochastic Gradient Descent, Interspeech 2014, with
a pair of means for each parameter where the paper has one for each column.
"""

from __future__ import annotations

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

HEADER = 8  # bytes a parameter: what a 1 and what a 0 stand for, float32 each


class OneBitState:
    """What `one_bit_hook` keeps between calls: the group, and what it has not sent yet."""

    def __init__(self, process_group: Any = None) -> None:
        self.process_group = process_group
        self.residuals = Residuals()


def pack(values: Array, sizes: list[int]) -> Array:
    """The bytes of `values`: for each of the consecutive parts the means above and below 0; signs.

    An element stands for the mean of those of its part and sign: the best two levels can do.
    """
    up = values >= 0
    ends = np.cumsum(sizes)[:-1]
    levels = np.zeros((len(sizes), 2), np.float32)
    parts = zip(np.split(values, ends), np.split(up, ends), strict=True)
    for level, (part, positive) in zip(levels, parts, strict=True):
        above, below = part[positive], part[~positive]
        level[:] = above.sum() / max(1, above.size), below.sum() / max(1, below.size)
    return np.concatenate([levels.reshape(-1).view(np.uint8), np.packbits(up)])


def unpack(data: Array, sizes: list[int]) -> Array:
    """The elements (float32) that `pack` made bytes of."""
    levels = data[: HEADER * len(sizes)].view(np.float32).reshape(-1, 2)
    up = np.unpackbits(data[HEADER * len(sizes) :], count=sum(sizes)).view(np.bool_)
    above, below = np.repeat(levels, sizes, axis=0).T
    return np.where(up, above, below)


def _add(sizes: list[int], total: Array, data: Array) -> None:
    total += unpack(data, sizes)


def _payload(state: OneBitState, bucket: Any) -> Payload:
    return Payload(all_gather=HEADER * len(bucket.gradients()) + -(-elements(bucket) // 8))


@sends(_payload)
def one_bit_hook(state: OneBitState, bucket: Any) -> Future[Tensor]:
    """The mean of signs times means: n / 8 + 8 p bytes for n elements of p parameters."""
    values = flat(bucket, state.residuals)
    sizes = [gradient.numel() for gradient in bucket.gradients()]
    packed = pack(values, sizes)
    state.residuals.keep_all(bucket, values - unpack(packed, sizes))
    return mean_of_packed(packed, partial(_add, sizes), bucket, group_of(state))
