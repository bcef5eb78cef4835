"""torch.distributed.tensor.parallel: a module's layers cut over the ranks of a mesh.

`parallelize_module` applies a plan of styles; what each costs is in docs/tensor-parallel.md.
Source: torch.distributed.tensor.parallel.
"""

from __future__ import annotations

from dtrain.distributed.tensor.parallel.api import parallelize_module as parallelize_module
from dtrain.distributed.tensor.parallel.loss import loss_parallel as loss_parallel
from dtrain.distributed.tensor.parallel.preparing import (
    PrepareModuleInput as PrepareModuleInput,
    PrepareModuleInputOutput as PrepareModuleInputOutput,
    PrepareModuleOutput as PrepareModuleOutput,
)
from dtrain.distributed.tensor.parallel.style import (
    ColwiseParallel as ColwiseParallel,
    ParallelStyle as ParallelStyle,
    RowwiseParallel as RowwiseParallel,
    SequenceParallel as SequenceParallel,
)

__all__ = [
    "ColwiseParallel",
    "ParallelStyle",
    "PrepareModuleInput",
    "PrepareModuleInputOutput",
    "PrepareModuleOutput",
    "RowwiseParallel",
    "SequenceParallel",
    "loss_parallel",
    "parallelize_module",
]
