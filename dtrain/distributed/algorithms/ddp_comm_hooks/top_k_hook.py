"""The largest elements only, the rest later: sparsified gradients. Not in torch.

What is not sent is added to the next gradients (error feedback). Source: Aji and Heafield, Sparse
Communication for Distributed Gradient Descent, EMNLP 2017; Lin et al., Deep Gradient Compression,
ICLR 2018 (largest of each parameter).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from dtrain.comm.work import Future
from dtrain.distributed.algorithms.ddp_comm_hooks.gathered import (
    Array,
    Residuals,
    flat,
    mean_of_packed,
    wide,
)
from dtrain.distributed.algorithms.ddp_comm_hooks.stages import Payload, group_of, sends
from dtrain.tensor import Tensor


class TopKState:
    """What `top_k_hook` keeps between calls: the group, `density` and what it has not sent yet.

    `density` is the share of each parameter's elements that is sent, above 0 and at most 1; at
    least one is.
    """

    def __init__(self, process_group: Any = None, density: float = 0.01) -> None:
        if not 0 < density <= 1:
            raise ValueError(f"density must be above 0 and at most 1, got {density}")
        self.process_group = process_group
        self.density = density
        self.residuals = Residuals()

    def count(self, size: int) -> int:
        """How many of `size` elements are sent."""
        return min(size, max(1, math.ceil(self.density * size)))


def largest(values: Array, sizes: list[int], state: TopKState) -> Array:
    """Indices (int32) into `values` of the largest magnitudes of each consecutive part."""
    found, start = [], 0
    for size in sizes:
        k = state.count(size)
        part = np.abs(values[start : start + size])
        found.append(start + np.argpartition(part, size - k)[size - k :] if k else [])
        start += size
    return np.concatenate(found).astype(np.int32)


def _add(total: Array, data: Array) -> None:
    """Indices of one rank are all different, so each element gets one addition."""
    count = data.size // (4 + total.itemsize)
    total[data[: 4 * count].view(np.int32)] += data[4 * count :].view(total.dtype)


def _payload(state: TopKState, bucket: Any) -> Payload:
    gradients = bucket.gradients()
    each = 4 + wide(gradients[0]._data.dtype).itemsize
    return Payload(all_gather=each * sum(state.count(g.numel()) for g in gradients))


@sends(_payload)
def top_k_hook(state: TopKState, bucket: Any) -> Future[Tensor]:
    """The mean of the largest elements: 8 bytes for each that is sent (float32 and its place)."""
    values = flat(bucket, state.residuals)
    where = largest(values, [gradient.numel() for gradient in bucket.gradients()], state)
    packed = np.concatenate([where.view(np.uint8), values[where].view(np.uint8)])
    values[where] = 0
    state.residuals.keep_all(bucket, values)
    return mean_of_packed(packed, _add, bucket, group_of(state))
