"""Hooks that send 8 bits an element: gradients as `scale * (code - zero_point)`.

Scale and zero point travel in front of the codes, so that one all-gather does it. Source:
torch.distributed.algorithms.ddp_comm_hooks.quantization_hooks.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from dtrain.comm.work import Future
from dtrain.distributed.algorithms.ddp_comm_hooks.gathered import (
    Array,
    elements,
    flat,
    mean_of_packed,
)
from dtrain.distributed.algorithms.ddp_comm_hooks.stages import Payload, group_of, sends
from dtrain.tensor import Tensor

LEVELS = 255  # the largest code
HEADER = 8  # bytes a channel: scale and zero point, float32 each


def quantize(rows: Array) -> Array:
    """The bytes of rows: their scales, their zero points, the codes. The range of a row includes 0.

    An element comes back within scale / 2, 0 exactly; inf or NaN makes its whole row NaN.
    """
    low = np.minimum(rows.min(axis=1), 0).astype(np.float32)
    high = np.maximum(rows.max(axis=1), 0).astype(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        scale = (high - low) / np.float32(LEVELS)
        scale[scale == 0] = 1  # a row of zeros
        scale[~np.isfinite(scale)] = np.nan
        zero = np.rint(-low / scale)
        codes = np.clip(np.rint(rows / scale[:, None]) + zero[:, None], 0, LEVELS)
        parts = scale, zero.astype(np.float32), codes.astype(np.uint8)
    return np.concatenate([part.reshape(-1).view(np.uint8) for part in parts])


def dequantize(data: Array, channels: int) -> Array:
    """The rows (float32) that `quantize` made bytes of."""
    header = data[: channels * HEADER].view(np.float32).reshape(2, channels, 1)
    codes = data[channels * HEADER :].reshape(channels, -1).astype(np.float32)
    np.subtract(codes, header[1], out=codes)
    return np.multiply(codes, header[0], out=codes)


def _add(channels: int, total: Array, data: Array) -> None:
    total += dequantize(data, channels).reshape(-1)[: total.size]


def _send(process_group: Any, bucket: Any, width: int) -> Future[Tensor]:
    """Quantize the gradients in channels of `width` elements, the last padded with zeros."""
    values = flat(bucket)
    channels = -(-values.size // width)
    rows = np.zeros((channels, width), values.dtype)
    rows.reshape(-1)[: values.size] = values
    return mean_of_packed(quantize(rows), partial(_add, channels), bucket, group_of(process_group))


def _payload(numel: int, width: int) -> Payload:
    return Payload(all_gather=-(-numel // width) * (width + HEADER))


@sends(lambda state, bucket: _payload(elements(bucket), elements(bucket)))
def quantization_pertensor_hook(process_group: Any, bucket: Any) -> Future[Tensor]:
    """The mean of gradients in 256 steps over the range of the bucket: n + 8 bytes."""
    return _send(process_group, bucket, elements(bucket))


@sends(lambda state, bucket, bucket_size=512: _payload(elements(bucket), bucket_size))
def quantization_perchannel_hook(
    process_group: Any, bucket: Any, bucket_size: int = 512
) -> Future[Tensor]:
    """As per tensor, with a range for every `bucket_size` elements: c (bucket_size + 8) bytes,
    where c is n / bucket_size rounded up.
    """
    if bucket_size < 1:
        raise ValueError(f"bucket_size must be positive, got {bucket_size}")
    return _send(process_group, bucket, bucket_size)
