"""torch.distributed.tensor: tensors cut over a mesh of ranks, and operations on them.

`DTensor` with its placements, `distribute_tensor`, `distribute_module` and the factories; tensor
parallelism is in `parallel`. Importing this package is what makes operations ask whether a tensor
is a part. Source: torch.distributed.tensor.
"""

from __future__ import annotations

from dtrain.distributed.tensor import _rules_matrix, _rules_views
from dtrain.distributed.tensor._api import DTensor as DTensor
from dtrain.distributed.tensor._distribute import (
    distribute_module as distribute_module,
    distribute_tensor as distribute_tensor,
)
from dtrain.distributed.tensor._dtensor_spec import local_box as local_box
from dtrain.distributed.tensor._factories import (
    empty as empty,
    full as full,
    ones as ones,
    rand as rand,
    randn as randn,
    zeros as zeros,
)
from dtrain.distributed.tensor.placement_types import (
    Partial as Partial,
    Placement as Placement,
    Replicate as Replicate,
    Shard as Shard,
)

_RULES = (_rules_matrix, _rules_views)  # importing them fills the table of `_dispatch`

__all__ = [
    "DTensor",
    "Partial",
    "Placement",
    "Replicate",
    "Shard",
    "distribute_module",
    "distribute_tensor",
    "empty",
    "full",
    "local_box",
    "ones",
    "rand",
    "randn",
    "zeros",
]
