"""Several collectives as one: `_coalescing_manager` and the `_coalesced` functions.

The manager only takes the waits out: the calls inside run one after the other in the group's
thread, and the block's end waits for all of them. The functions send one message where
a loop would send one for each tensor, at the price of a copy.
Source: torch.distributed.distributed_c10d.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from dtrain.comm import collectives as calls
from dtrain.comm.reduce import ReduceOp
from dtrain.distributed.staging import (
    Async,
    Batch,
    Landing,
    batch_here,
    check_list,
    outside,
    submit,
)
from dtrain.distributed.world import resolve
from dtrain.tensor import Tensor


@contextlib.contextmanager
def _coalescing_manager(
    group: Any = None, device: Any = None, async_ops: bool = False
) -> Iterator[Batch]:
    """Collectives of `group` inside the block do not wait; its end waits for all of them.

    Their tensors must be neither changed nor read before that. With `async_ops` it does not wait
    either: call `wait()` of what the block gives. When the block raises, its calls go on, and
    nobody waits for them. `device` is accepted and ignored.
    """
    batch = Batch(resolve(group))
    token = batch_here.set(batch)
    try:
        yield batch
    finally:
        batch_here.reset(token)
    if not async_ops:
        batch.wait()


def all_reduce_coalesced(
    tensors: list[Tensor], op: ReduceOp = ReduceOp.SUM, group: Any = None, async_op: bool = False
) -> Async:
    """`all_reduce` of several tensors of one dtype, in one call."""
    given = check_list(tensors, "tensors")
    if outside(group):
        return None
    landing = Landing()
    call = calls.AllReduce(landing.into_each(given, read=True), op)
    return submit(resolve(group), call, landing, async_op)


def all_gather_coalesced(
    output_tensor_lists: list[list[Tensor]],
    input_tensor_list: list[Tensor],
    group: Any = None,
    async_op: bool = False,
) -> Async:
    """Put `input_tensor_list[k]` of rank r into `output_tensor_lists[r][k]`, for all k in one call.

    All tensors are of one dtype.
    """
    inputs = check_list(input_tensor_list, "input_tensor_list")
    outputs = [check_list(part, "output_tensor_lists") for part in output_tensor_lists]
    if outside(group):
        return None
    where, landing = resolve(group), Landing()
    kinds = [calls.describe(t._data) for t in inputs]
    if len(outputs) != where.size() or any(
        [calls.describe(t._data) for t in part] != kinds for part in outputs
    ):
        raise ValueError(
            f"all_gather_coalesced: expected {where.size()} lists of {kinds}, as on this rank, got "
            f"{[[calls.describe(t._data) for t in part] for part in outputs]}"
        )
    out = landing.into_each([tensor for part in outputs for tensor in part])
    return submit(where, calls.AllGather(landing.read_each(inputs), out), landing, async_op)
