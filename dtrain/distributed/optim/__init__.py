"""Optimizers that know of other ranks, at torch.distributed.optim's names and paths.

zero_redundancy_optimizer.py shares the state of an optimizer among ranks;
apply_optimizer_in_backward.py steps each parameter as soon as its gradient is there;
post_localSGD_optimizer.py averages parameters now and then; optimizer.py steps parameters that
other workers own, by remote calls.
"""

from __future__ import annotations

from dtrain.distributed.optim.apply_optimizer_in_backward import (
    _apply_optimizer_in_backward as _apply_optimizer_in_backward,
    _get_in_backward_optimizers as _get_in_backward_optimizers,
)
from dtrain.distributed.optim.optimizer import (
    DistributedOptimizer as DistributedOptimizer,
)
from dtrain.distributed.optim.post_localSGD_optimizer import (
    PostLocalSGDOptimizer as PostLocalSGDOptimizer,
)
from dtrain.distributed.optim.zero_redundancy_optimizer import (
    ZeroRedundancyOptimizer as ZeroRedundancyOptimizer,
)
