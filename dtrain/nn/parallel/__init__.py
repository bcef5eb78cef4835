"""Data parallel training: `DistributedDataParallel`. Source: torch.nn.parallel.

The one part of `nn` that communicates; it is loaded only when asked for.
"""

from __future__ import annotations

from dtrain.nn.parallel.distributed import DistributedDataParallel as DistributedDataParallel
