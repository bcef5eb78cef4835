"""`DistributedOptimizer`: parameters on several workers, each stepped by an optimizer beside them.

Rules: 1. a worker's optimizer sees the gradients that a distributed autograd context has on that
worker, and only while it steps: `.grad` is as it was afterwards. 2. Steps on one worker are one
after the other, whoever asks for them; between workers there is no order.

Source: torch.distributed.optim.DistributedOptimizer.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from dtrain.distributed.autograd.api import get_gradients
from dtrain.distributed.autograd.calls import recording
from dtrain.distributed.rpc.api import remote
from dtrain.distributed.rpc.rref import RRef
from dtrain.futures import wait_all

__all__ = ["DistributedOptimizer"]


class DistributedOptimizer:
    """An `optimizer_class(parameters, *args, **kwargs)` on each worker that owns parameters.

    `params_rref`: references to parameters. Blocks until the optimizers are there. Raises what
    their constructors raise, and TypeError for what is no reference. `remote_optimizers`:
    references to them.
    """

    def __init__(
        self, optimizer_class: type, params_rref: Sequence[RRef], *args: Any, **kwargs: Any
    ) -> None:
        by_owner: dict[Any, list[RRef]] = {}
        for reference in _checked(optimizer_class, params_rref):
            by_owner.setdefault(reference.owner(), []).append(reference)
        with recording(None):
            self.remote_optimizers = [
                remote(owner, _LocalOptimizer, (optimizer_class, references, args, kwargs))
                for owner, references in by_owner.items()
            ]
        wait_all([handle._get_future() for handle in self.remote_optimizers])

    def step(self, context_id: int) -> None:
        """Step on all workers at once, with the gradients of the context.

        Blocks until all have stepped. A parameter without a gradient there is left as it is.
        """
        with recording(None):
            steps = [handle.rpc_async().step(context_id) for handle in self.remote_optimizers]
        wait_all(steps)


def _checked(optimizer_class: Any, params_rref: Any) -> list[RRef]:
    if not isinstance(optimizer_class, type):
        raise TypeError(
            f"optimizer_class must be a class, got {type(optimizer_class).__name__}: optimizers "
            "are made on the workers that own parameters"
        )
    if isinstance(params_rref, RRef):
        raise TypeError("params_rref must be a list of RRefs, got one: write [reference]")
    references = list(params_rref)
    for i, reference in enumerate(references):
        if not isinstance(reference, RRef):
            raise TypeError(
                f"params_rref[{i}] must be an RRef, got {type(reference).__name__}: those of this "
                "worker are made by rpc.RRef(parameter)"
            )
    return references


class _LocalOptimizer:
    """The optimizer of one worker."""

    _turn = threading.Lock()

    def __init__(
        self, optimizer_class: type, references: Sequence[RRef], args: Any, kwargs: Any
    ) -> None:
        self._parameters = [reference.local_value() for reference in references]
        self.optim = optimizer_class(self._parameters, *args, **kwargs)

    def step(self, context_id: int) -> None:
        gradients = get_gradients(context_id)
        with self._turn:
            before = [parameter.grad for parameter in self._parameters]
            try:
                for parameter in self._parameters:
                    parameter.grad = gradients.get(parameter)
                self.optim.step()
            finally:
                for parameter, grad in zip(self._parameters, before, strict=True):
                    parameter.grad = grad
