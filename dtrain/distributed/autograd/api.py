"""What a training loop calls: `context`, `backward`, `get_gradients`.

Rule: a context belongs to the threads that are inside it, and to those that serve their calls.
Source: torch.distributed.autograd.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from dtrain.distributed.autograd.calls import leave, recording, teller
from dtrain.distributed.autograd.contexts import contexts
from dtrain.distributed.autograd.passes import run_backward
from dtrain.distributed.rpc import current
from dtrain.tensor import Tensor

__all__ = ["backward", "context", "get_gradients"]


@contextlib.contextmanager
def context() -> Iterator[int]:
    """A block whose remote calls are part of one backward pass; gives the id of the context.

    Source: torch.distributed.autograd.context. At its end the gradients of all workers are dropped,
    without waiting for them. RuntimeError inside another context, and before `init_rpc`.
    """
    if current.recorder.get() is not None:
        raise RuntimeError("Already have an autograd context id for this thread.")
    made = contexts().new()
    try:
        with recording(made):
            yield made.id
    finally:
        if current.installed() is not None:
            leave(made.id)


def backward(context_id: int, roots: Sequence[Tensor], retain_graph: bool = False) -> None:
    """Run backward from `roots` (scalars) through all workers of the context.

    Gradients are added up in the context, on the worker of the parameter: `.grad` stays as it is.
    Blocks until all workers are done; each message is bounded by the `rpc_timeout` of the options.
    Raises what a worker raised, `RpcTimeout`, `PeerLost`, and RuntimeError when calls of the
    context are not answered yet. Calls whose results are not used cost a message and change
    nothing (in torch they make it wait for ever). Source: torch.distributed.autograd.backward.
    """
    run_backward(contexts().find(context_id), roots, retain_graph, teller)


def get_gradients(context_id: int) -> dict[Tensor, Tensor]:
    """{leaf: gradient} of the leaves that live on this worker, as the context has them now.

    Source: torch.distributed.autograd.get_gradients.
    """
    found = contexts().find(context_id)
    with found.lock:
        return dict(found.gradients)
