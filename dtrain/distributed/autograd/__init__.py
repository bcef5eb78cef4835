"""Gradients through remote calls, under the names of torch.distributed.autograd.

`context` records what is sent between workers, `backward` runs through all of them, gradients stay
in the context, on the worker that has the parameter. api.py is what a training loop calls, calls.py
wraps remote calls, edges.py has the nodes at which the graph leaves a worker, passes.py walks,
contexts.py keeps the books.
"""

from dtrain.distributed.autograd.api import (
    backward as backward,
    context as context,
    get_gradients as get_gradients,
)
from dtrain.distributed.autograd.contexts import (
    _get_debug_info as _get_debug_info,
)


def is_available() -> bool:
    """True: rpc is part of dtrain."""
    return True
