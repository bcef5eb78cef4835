"""Hooks of DistributedDataParallel: what happens to gradients between backward and the mean.

    ddp.register_comm_hook(PowerSGDState(None), powerSGD_hook)
    register_ddp_comm_hook(DDPCommHookType.FP16_COMPRESS, ddp)

A hook takes its state and a `GradBucket` and returns a future of the reduced gradients. Each has a
`payload(state, bucket)`, the bytes that it puts into collectives for that bucket, in closed form;
what was really sent is in `group.arrays.statistics()`. Source:
torch.distributed.algorithms.ddp_comm_hooks; `one_bit_hook` and `top_k_hook` are not in torch.
"""

from __future__ import annotations

from enum import Enum, member
from functools import partial
from typing import Any

from dtrain.distributed.algorithms.ddp_comm_hooks import (
    debugging_hooks as debugging,
    default_hooks as default,
    powerSGD_hook as powerSGD,
    quantization_hooks as quantization,
)
from dtrain.distributed.algorithms.ddp_comm_hooks.one_bit_hook import (
    OneBitState as OneBitState,
    one_bit_hook as one_bit_hook,
)
from dtrain.distributed.algorithms.ddp_comm_hooks.stages import (
    Hook,
    Payload as Payload,
)
from dtrain.distributed.algorithms.ddp_comm_hooks.top_k_hook import (
    TopKState as TopKState,
    top_k_hook as top_k_hook,
)


def _register(model: Any, state: Any, *, comm_hook: Hook) -> None:
    model.register_comm_hook(state, comm_hook)


def _register_powerSGD(
    model: Any, state: Any, *, comm_hook: Hook, matrix_approximation_rank: int
) -> None:
    """With a state of its own; `state` is the process group."""
    powerSGD_state = powerSGD.PowerSGDState(
        process_group=state, matrix_approximation_rank=matrix_approximation_rank
    )
    model.register_comm_hook(powerSGD_state, comm_hook)


class DDPCommHookType(Enum):
    """The hooks that `register_ddp_comm_hook` knows by name; each value registers its hook."""

    ALLREDUCE = member(partial(_register, comm_hook=default.allreduce_hook))
    FP16_COMPRESS = member(partial(_register, comm_hook=default.fp16_compress_hook))
    BF16_COMPRESS = member(partial(_register, comm_hook=default.bf16_compress_hook))
    QUANTIZE_PER_TENSOR = member(
        partial(_register, comm_hook=quantization.quantization_pertensor_hook)
    )
    QUANTIZE_PER_CHANNEL = member(
        partial(_register, comm_hook=quantization.quantization_perchannel_hook)
    )
    POWER_SGD = member(
        partial(_register_powerSGD, comm_hook=powerSGD.powerSGD_hook, matrix_approximation_rank=1)
    )
    POWER_SGD_RANK2 = member(
        partial(_register_powerSGD, comm_hook=powerSGD.powerSGD_hook, matrix_approximation_rank=2)
    )
    BATCHED_POWER_SGD = member(
        partial(
            _register_powerSGD,
            comm_hook=powerSGD.batched_powerSGD_hook,
            matrix_approximation_rank=1,
        )
    )
    BATCHED_POWER_SGD_RANK2 = member(
        partial(
            _register_powerSGD,
            comm_hook=powerSGD.batched_powerSGD_hook,
            matrix_approximation_rank=2,
        )
    )
    NOOP = member(partial(_register, comm_hook=debugging.noop_hook))


def register_ddp_comm_hook(comm_hook_type: DDPCommHookType, model: Any, state: Any = None) -> None:
    """Register a hook by name on a DistributedDataParallel; `state` is a process group or None."""
    comm_hook_type.value(model=model, state=state)
