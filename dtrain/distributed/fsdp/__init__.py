"""Fully sharded data parallel, at torch.distributed.fsdp's names and paths.

_fully_shard.py and fully_sharded_data_parallel.py are the public faces; api.py has the words of the
second. Below them the engine: layout.py (which rows are whose), memory.py (where a unit is while
it is whole), unit.py (states and verbs), root.py (when what happens, fences), state.py (around the
calls of modules), making.py (what becomes a unit). wrap.py chooses modules by a policy. Names are
loaded when they are first asked for: wrap.py is used without the engine.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dtrain.distributed.fsdp._fully_shard import (
        FSDPModule as FSDPModule,
        UnshardHandle as UnshardHandle,
        fully_shard as fully_shard,
        register_fsdp_forward_method as register_fsdp_forward_method,
        share_comm_ctx as share_comm_ctx,
    )
    from dtrain.distributed.fsdp.api import (
        BackwardPrefetch as BackwardPrefetch,
        CPUOffload as CPUOffload,
        FullOptimStateDictConfig as FullOptimStateDictConfig,
        FullStateDictConfig as FullStateDictConfig,
        LocalOptimStateDictConfig as LocalOptimStateDictConfig,
        LocalStateDictConfig as LocalStateDictConfig,
        MixedPrecision as MixedPrecision,
        OptimStateDictConfig as OptimStateDictConfig,
        OptimStateKeyType as OptimStateKeyType,
        ShardedOptimStateDictConfig as ShardedOptimStateDictConfig,
        ShardedStateDictConfig as ShardedStateDictConfig,
        ShardingStrategy as ShardingStrategy,
        StateDictConfig as StateDictConfig,
        StateDictSettings as StateDictSettings,
        StateDictType as StateDictType,
    )
    from dtrain.distributed.fsdp.fully_sharded_data_parallel import (
        FullyShardedDataParallel as FullyShardedDataParallel,
    )
    from dtrain.distributed.fsdp.policies import (
        CPUOffloadPolicy as CPUOffloadPolicy,
        MixedPrecisionPolicy as MixedPrecisionPolicy,
        OffloadPolicy as OffloadPolicy,
    )

__all__ = [
    "BackwardPrefetch",
    "CPUOffload",
    "CPUOffloadPolicy",
    "FSDPModule",
    "FullOptimStateDictConfig",
    "FullStateDictConfig",
    "FullyShardedDataParallel",
    "LocalOptimStateDictConfig",
    "LocalStateDictConfig",
    "MixedPrecision",
    "MixedPrecisionPolicy",
    "OffloadPolicy",
    "OptimStateDictConfig",
    "OptimStateKeyType",
    "ShardedOptimStateDictConfig",
    "ShardedStateDictConfig",
    "ShardingStrategy",
    "StateDictConfig",
    "StateDictSettings",
    "StateDictType",
    "UnshardHandle",
    "fully_shard",
    "register_fsdp_forward_method",
    "share_comm_ctx",
]

_PLACES = {
    **dict.fromkeys(
        (
            "FSDPModule",
            "UnshardHandle",
            "fully_shard",
            "register_fsdp_forward_method",
            "share_comm_ctx",
        ),
        "_fully_shard",
    ),
    **dict.fromkeys(("CPUOffloadPolicy", "MixedPrecisionPolicy", "OffloadPolicy"), "policies"),
    "FullyShardedDataParallel": "fully_sharded_data_parallel",
    **dict.fromkeys(
        (
            "BackwardPrefetch",
            "CPUOffload",
            "FullOptimStateDictConfig",
            "FullStateDictConfig",
            "LocalOptimStateDictConfig",
            "LocalStateDictConfig",
            "MixedPrecision",
            "OptimStateDictConfig",
            "OptimStateKeyType",
            "ShardedOptimStateDictConfig",
            "ShardedStateDictConfig",
            "ShardingStrategy",
            "StateDictConfig",
            "StateDictSettings",
            "StateDictType",
        ),
        "api",
    ),
}


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        value = getattr(importlib.import_module(f"dtrain.distributed.fsdp.{_PLACES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'dtrain.distributed.fsdp' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
