"""The hook that sends nothing, to see what a step costs without communication.

Source: torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks.
"""

from __future__ import annotations

from typing import Any

from dtrain.comm.work import Future
from dtrain.distributed.algorithms.ddp_comm_hooks.stages import Payload, sends
from dtrain.tensor import Tensor


@sends(lambda state, bucket: Payload())
def noop_hook(state: Any, bucket: Any) -> Future[Tensor]:
    """Leave each rank its own gradients: the ranks' models go apart."""
    future: Future[Tensor] = Future()
    future.set_result(bucket.buffer())
    return future
