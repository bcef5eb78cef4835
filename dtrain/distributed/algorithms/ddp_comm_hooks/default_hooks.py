"""Hooks that reduce the gradients as they are, or rounded to 16 bits.

Source: torch.distributed.algorithms.ddp_comm_hooks.default_hooks. `state` is a process group, None
for the default one. Sums of 16-bit numbers are added in 32 bits, in rank order, divided by the
number of ranks and rounded once; torch divides first and rounds each sum.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from dtrain import dtypes
from dtrain.autograd.node import make
from dtrain.comm.reduce import ReduceOp, rounded, wide
from dtrain.comm.work import Future
from dtrain.distributed.algorithms.ddp_comm_hooks.gathered import spread
from dtrain.distributed.algorithms.ddp_comm_hooks.stages import Hook, Payload, sends
from dtrain.distributed.collectives import all_reduce
from dtrain.distributed.grad_bucket import GradBucket
from dtrain.flat import FlatBuffer
from dtrain.tensor import Tensor


def mean(tensor: Tensor, group: Any) -> Future[Tensor]:
    """The mean of `tensor` over the ranks of `group`, in place; does not block."""
    work = all_reduce(tensor, ReduceOp.AVG, group, async_op=True)
    assert work is not None
    return work.get_future().then(lambda future: future.value()[0])


def whole(state: Any, bucket: Any) -> Payload:
    """The payload of a hook that reduces the buffer as it is."""
    return Payload(all_reduce=bucket.buffer().nbytes)


def _half(state: Any, bucket: Any) -> Payload:
    return Payload(all_reduce=2 * bucket.buffer().numel())


@sends(whole)
def allreduce_hook(process_group: Any, bucket: Any) -> Future[Tensor]:
    """What DDP does without a hook: the mean, all bytes of the bucket in one all-reduce."""
    return mean(bucket.buffer(), process_group)


def _compress(dtype: dtypes.dtype, process_group: Any, bucket: Any) -> Future[Tensor]:
    buffer = bucket.buffer()
    reduced = mean(_rounded(buffer, dtype), process_group)
    return reduced.then(lambda future: _copied(buffer, future.value()))


def _rounded(tensor: Tensor, dtype: dtypes.dtype) -> Tensor:
    with np.errstate(over="ignore", invalid="ignore"):  # inf is a value, and is seen in the result
        half: Tensor = make(rounded(tensor._data, dtype.numpy))
        return half


def _copied(buffer: Tensor, result: Tensor) -> Tensor:
    buffer.set_array(wide(result._data, buffer._data.dtype))
    return buffer


@sends(_half)
def fp16_compress_hook(process_group: Any, bucket: Any) -> Future[Tensor]:
    """The mean of gradients rounded to float16: 2 bytes an element; above 65504 they are inf."""
    return _compress(dtypes.float16, process_group, bucket)


@sends(_half)
def bf16_compress_hook(process_group: Any, bucket: Any) -> Future[Tensor]:
    """The mean of gradients rounded to bfloat16: 2 bytes an element, 8 bits of mantissa."""
    return _compress(dtypes.bfloat16, process_group, bucket)


def fp16_compress_wrapper(hook: Hook) -> Hook:
    """`hook` on gradients rounded to float16, its result in the dtype of the gradients."""
    return _wrapper(hook, dtypes.float16)


def bf16_compress_wrapper(hook: Hook) -> Hook:
    """`hook` on gradients rounded to bfloat16, its result in the dtype of the gradients."""
    return _wrapper(hook, dtypes.bfloat16)


def _wrapper(hook: Hook, dtype: dtypes.dtype) -> Hook:
    def payload(state: Any, bucket: Any) -> Payload:
        small = _rounded_bucket(bucket, dtype)
        return hook.payload(state, small)  # type: ignore[attr-defined,no-any-return]

    @sends(payload)
    @functools.wraps(hook)
    def rounded_hook(state: Any, bucket: Any) -> Future[Any]:
        reduced = hook(state, _rounded_bucket(bucket, dtype))
        return reduced.then(lambda future: _widened(bucket, future.value()))

    return rounded_hook


def _rounded_bucket(bucket: Any, dtype: dtypes.dtype) -> GradBucket:
    """A copy of the bucket in `dtype`, its gradients without gaps."""
    gradients = [gradient._data for gradient in bucket.gradients()]
    flat = FlatBuffer([gradient.shape for gradient in gradients], dtype.numpy, align=1)
    with np.errstate(over="ignore", invalid="ignore"):
        for view, gradient in zip(flat.views, gradients, strict=True):
            view[...] = rounded(gradient, dtype.numpy)
    views = [make(view) for view in flat.views]
    return GradBucket(
        bucket.index(), make(flat.array), views, bucket.parameters(), bucket.is_last()
    )


def _widened(bucket: Any, result: Any) -> Tensor:
    value = result[0] if isinstance(result, list) else result
    return spread(bucket, value._data.reshape(-1))
