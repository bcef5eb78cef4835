"""Hooks that step a ZeroRedundancyOptimizer in backward: reduce, step the own share, send it.

Source: torch.distributed.algorithms.ddp_comm_hooks.ddp_zero_hook. Unlike torch's, they step from
the first backward pass on: who owns a parameter does not depend on its bucket.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from dtrain.comm.work import Future
from dtrain.distributed.algorithms.ddp_comm_hooks.stages import (
    Hook,
    Payload,
    Stages,
    begin,
    move_on,
    opened,
    sends,
)
from dtrain.distributed.optim.zero_redundancy_optimizer import ZeroRedundancyOptimizer
from dtrain.futures import collect_all


def hook_with_zero_step(
    hook: Hook, ddp: Any, zero: ZeroRedundancyOptimizer, shard_buckets: bool = False
) -> Hook:
    """`hook`, then a step of `zero` for each bucket in turn when backward has computed all of them.

    While one bucket is stepped, the reductions and the parameters of others are under way.
    `zero` was made with `overlap_with_ddp=True` (else ValueError). `shard_buckets` is accepted and
    ignored: a bucket's parameters always belong to the ranks that `zero` gave them to; so is `ddp`.
    """
    _check(zero)

    def payload(state: Any, bucket: Any) -> Payload:
        """What `hook` sends, and this rank's share of the bucket's parameters."""
        reduced: Payload = hook.payload(state, bucket)  # type: ignore[attr-defined]
        own = zero.carriers_of(bucket.parameters()).nbytes()
        return reduced._replace(broadcast=reduced.broadcast + own)

    @sends(payload)
    @functools.wraps(hook)
    def stepping(state: Any, bucket: Any) -> Future[Any]:
        return begin(zero.process_group, _reduce_and_step(hook, zero, state, bucket))

    return stepping


def hook_with_zero_step_interleaved(
    hook: Hook, ddp: Any, zero: ZeroRedundancyOptimizer, shard_buckets: bool = False
) -> Hook:
    """As `hook_with_zero_step`, with steps in backward: a bucket's when the next one is full.

    Backward then waits for the reduction of the bucket before. Better where communication is fast.
    """
    after: Callable[[Any, Any], Future[Any]] = hook_with_zero_step(hook, ddp, zero, shard_buckets)

    @functools.wraps(after)
    def interleaved(state: Any, bucket: Any) -> Future[Any]:
        earlier = opened(zero.process_group)
        future = after(state, bucket)
        move_on(earlier)
        return future

    return interleaved


def _check(zero: ZeroRedundancyOptimizer) -> None:
    if not zero._overlap_with_ddp:
        raise ValueError(
            "ZeroRedundancyOptimizer must be constructed with `overlap_with_ddp=True` to use this "
            "hook properly"
        )


def _reduce_and_step(hook: Hook, zero: ZeroRedundancyOptimizer, state: Any, bucket: Any) -> Stages:
    result = yield hook(state, bucket)
    put(bucket, result)
    zero.step_bucket(bucket.parameters(), bucket.gradients())
    carriers = zero.carriers_of(bucket.parameters())
    yield collect_all(work.get_future() for work in carriers.send())
    carriers.arrive()
    return bucket.buffer()


def put(bucket: Any, result: Any) -> None:
    """Bring a hook's result into the bucket, so that its gradients are the reduced ones."""
    value = result[0] if isinstance(result, list) else result
    if value is not bucket.buffer():
        bucket.buffer().set_array(value._data.astype(bucket.buffer()._data.dtype))
