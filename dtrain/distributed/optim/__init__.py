"""Optimizers for several ranks, at torch.distributed.optim's names.

Each lives in the file that torch has it in.
"""

from __future__ import annotations

from dtrain.distributed.optim.post_localSGD_optimizer import (
    PostLocalSGDOptimizer as PostLocalSGDOptimizer,
)
