"""Algorithms over process groups, at torch.distributed.algorithms' names and paths.

join.py lets ranks have different numbers of inputs; ddp_comm_hooks/ is what may happen to gradients
between backward and their mean; model_averaging/ averages parameters now and then instead of
gradients always.
"""

from __future__ import annotations

from dtrain.distributed.algorithms.join import (
    Join as Join,
    Joinable as Joinable,
    JoinHook as JoinHook,
)
