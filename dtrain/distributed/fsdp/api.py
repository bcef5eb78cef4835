"""The words in which `FullyShardedDataParallel` is told what to do: enumerations and plain data.

Source: torch.distributed.fsdp.api.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

from dtrain.dtypes import dtype
from dtrain.nn.modules.batchnorm import _BatchNorm
from dtrain.nn.modules.module import Module

__all__ = [
    "BackwardPrefetch",
    "CPUOffload",
    "FullOptimStateDictConfig",
    "FullStateDictConfig",
    "LocalOptimStateDictConfig",
    "LocalStateDictConfig",
    "MixedPrecision",
    "OptimStateDictConfig",
    "ShardedOptimStateDictConfig",
    "ShardedStateDictConfig",
    "ShardingStrategy",
    "StateDictConfig",
    "StateDictSettings",
    "StateDictType",
]


class ShardingStrategy(Enum):
    """What is divided among the ranks. On one host the ranks keep one copy of the parameters
    between them with FULL_SHARD and SHARD_GRAD_OP alike; these differ over messages.

    FULL_SHARD      parameters, gradients, optimizer state; whole parameters are given back between
                    forward and backward.
    SHARD_GRAD_OP   the same, and whole parameters stay until backward is over.
    NO_SHARD        nothing: every rank keeps everything, as in DDP.
    HYBRID_SHARD, _HYBRID_SHARD_ZERO2   FULL_SHARD or SHARD_GRAD_OP within a host, copies between.
    """

    FULL_SHARD = auto()
    SHARD_GRAD_OP = auto()
    NO_SHARD = auto()
    HYBRID_SHARD = auto()
    _HYBRID_SHARD_ZERO2 = auto()


class BackwardPrefetch(Enum):
    """When the unit that backward needs next is gathered, where units travel in messages.

    BACKWARD_PRE    beside the backward pass of the unit before: two are whole at a time.
    BACKWARD_POST   when the gradients of the unit before are complete, beside their reduction.
    """

    BACKWARD_PRE = auto()
    BACKWARD_POST = auto()


@dataclass(frozen=True)
class MixedPrecision:
    """Dtypes of forward, backward and reduction; None leaves one as it is.

    param_dtype    of whole parameters, hence of forward, backward and what is gathered.
    reduce_dtype   in which gradients are added; None: `param_dtype`.
    buffer_dtype   of floating buffers, once and for all.
    cast_forward_inputs, cast_root_forward_inputs   whether floating inputs of forward are cast to
                   `param_dtype`: of inner wrappers, and of the outermost.
    keep_low_precision_grads   accepted and ignored: gradients have the dtype of the parameters.
    _module_classes_to_ignore  with an auto_wrap_policy: modules that compute in the dtype they
                   have; their inputs and results are cast.

    Parameters, their gradients and the optimizer keep the dtype that the model has.
    """

    param_dtype: dtype | None = None
    reduce_dtype: dtype | None = None
    buffer_dtype: dtype | None = None
    keep_low_precision_grads: bool = False
    cast_forward_inputs: bool = False
    cast_root_forward_inputs: bool = True
    _module_classes_to_ignore: Sequence[type[Module]] = (_BatchNorm,)


@dataclass
class CPUOffload:
    """Whether parameters and optimizer state are kept in files in place of memory."""

    offload_params: bool = False


class StateDictType(Enum):
    """What `state_dict` gives for a parameter: all of it, this rank's part, or a DTensor."""

    FULL_STATE_DICT = auto()
    LOCAL_STATE_DICT = auto()
    SHARDED_STATE_DICT = auto()


@dataclass
class StateDictConfig:
    """`offload_to_cpu` is accepted and changes nothing: all memory is the CPU's."""

    offload_to_cpu: bool = False


@dataclass
class FullStateDictConfig(StateDictConfig):
    """`rank0_only`: only the first rank of the group gets a state dict, the others an empty one."""

    rank0_only: bool = False


@dataclass
class LocalStateDictConfig(StateDictConfig):
    """Nothing to choose."""


@dataclass
class ShardedStateDictConfig(StateDictConfig):
    """`_use_dtensor` is accepted and changes nothing: parts are DTensors."""

    _use_dtensor: bool = False


@dataclass
class OptimStateDictConfig:
    """`offload_to_cpu` is accepted and changes nothing: all memory is the CPU's."""

    offload_to_cpu: bool = True


@dataclass
class FullOptimStateDictConfig(OptimStateDictConfig):
    """`rank0_only`: only the first rank of the group gets the state, the others an empty dict."""

    rank0_only: bool = False


@dataclass
class LocalOptimStateDictConfig(OptimStateDictConfig):
    """Nothing to choose."""

    offload_to_cpu: bool = False


@dataclass
class ShardedOptimStateDictConfig(OptimStateDictConfig):
    """`_use_dtensor` is accepted and changes nothing: parts are DTensors."""

    _use_dtensor: bool = False


class OptimStateKeyType(Enum):
    """By what the parameters are told in the state of an optimizer: their names, or numbers."""

    PARAM_NAME = auto()
    PARAM_ID = auto()


@dataclass
class StateDictSettings:
    """How the state of a model and of its optimizer is given."""

    state_dict_type: StateDictType
    state_dict_config: StateDictConfig
    optim_state_dict_config: OptimStateDictConfig
