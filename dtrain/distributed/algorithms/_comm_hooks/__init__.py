"""Communication hooks of `FullyShardedDataParallel`, for `register_comm_hook`.

`LOW_PRECISION_HOOKS` are those that round gradients to 16 bits on their way. Source:
torch.distributed.algorithms._comm_hooks.
"""

from __future__ import annotations

from dtrain.distributed.algorithms._comm_hooks import default_hooks as default

LOW_PRECISION_HOOKS = [default.fp16_compress_hook, default.bf16_compress_hook]
