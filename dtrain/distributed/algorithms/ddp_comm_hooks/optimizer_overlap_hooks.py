"""Hooks after which an optimizer steps, in backward: while one bucket is stepped, others are sent.

Source: torch.distributed.algorithms.ddp_comm_hooks.optimizer_overlap_hooks, whose optimizers are
functional; here any `Optimizer` will do.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from functools import partial
from typing import Any

from dtrain.autograd import engine
from dtrain.comm.work import Future
from dtrain.distributed.algorithms.ddp_comm_hooks.ddp_zero_hook import put
from dtrain.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook, whole
from dtrain.distributed.algorithms.ddp_comm_hooks.stages import (
    Hook,
    Stages,
    begin,
    group_of,
    sends,
    staged,
)
from dtrain.distributed.optim.apply_optimizer_in_backward import optimizers_of
from dtrain.distributed.optim.partial_step import step_with
from dtrain.optim.optimizer import Optimizer


class _OptimizerHookState:
    """The optimizer that steps, and for which parameters (None: all of the bucket)."""

    def __init__(self, optimizer: Optimizer, params: Iterable[Any] | None = None) -> None:
        self.optimizer = optimizer
        self.params = None if params is None else set(params)

    def step(self, bucket: Any) -> None:
        pairs = zip(bucket.parameters(), bucket.gradients(), strict=True)
        step_with(self.optimizer, {p: g for p, g in pairs if not self.params or p in self.params})


def _hook_then_optimizer(hook: Hook, optimizer_state: _OptimizerHookState) -> Hook:
    """`hook`, then a step for the parameters of the bucket, while later buckets are reduced."""

    def stages(state: Any, bucket: Any) -> Stages:
        put(bucket, (yield hook(state, bucket)))
        optimizer_state.step(bucket)
        return bucket.buffer()

    @functools.wraps(hook)
    def stepping(state: Any, bucket: Any) -> Future[Any]:
        return begin(group_of(state), stages(state, bucket))

    return stepping


@sends(whole)
@staged
def apply_optim_in_backward_hook(state: Any, bucket: Any) -> Stages:
    """The mean, then the optimizers that `_apply_optimizer_in_backward` gave the parameters.

    `.grad` of these is None after the pass.
    """
    pairs = zip(bucket.parameters(), bucket.gradients(), strict=True)
    due = [(parameter, gradient) for parameter, gradient in pairs if optimizers_of(parameter)]
    if engine.is_running():  # it is not where DDP goes on for a rank without inputs (Join)
        engine.queue_callback(partial(_forget_gradients, [parameter for parameter, _ in due]))
    yield allreduce_hook(state, bucket)
    for parameter, gradient in due:
        for optimizer in optimizers_of(parameter):
            step_with(optimizer, {parameter: gradient})
    return bucket.buffer()


def _forget_gradients(parameters: list[Any]) -> None:
    for parameter in parameters:
        parameter._grad = None
