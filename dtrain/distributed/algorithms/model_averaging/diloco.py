"""DiLoCo: ranks train by themselves for many steps, then an outer optimizer follows their mean.

Rules: every rank keeps the same global parameters, the outer optimizer's. After `period` steps the
mean of (global - local) over ranks, in rank order, is their gradient; the outer step moves them,
and local training goes on from there. The inner optimizer keeps its own state.
With SGD of learning rate 1 and no momentum outside this is local SGD.
Source: Douillard et al., DiLoCo: Distributed Low-Communication Training of Language Models, 2023.
Not in torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import numpy as np

from dtrain.autograd.node import make
from dtrain.comm.collectives import AllReduce, Broadcast
from dtrain.comm.reduce import ReduceOp
from dtrain.distributed.algorithms.model_averaging.averagers import ModelAverager
from dtrain.distributed.algorithms.model_averaging.utils import flat_of
from dtrain.optim.optimizer import Optimizer
from dtrain.optim.sgd import SGD


def paper_outer_optimizer(params: list[Any]) -> Optimizer:
    """Nesterov momentum with the paper's values: learning rate 0.7, momentum 0.9."""
    return SGD(params, lr=0.7, momentum=0.9, nesterov=True)


class DiLoCoAverager(ModelAverager):
    """Averages by an outer optimizer after every `period` steps.

    params   the model's parameters. The first rank's are copied to all in the constructor, which
             waits for all ranks.
    period   inner steps between two outer ones (the paper's H, 500 there).
    outer_optimizer   makes the outer optimizer of the global parameters.

    Memory: the parameters once more and the outer state, and once more while averaging. An outer
    step is one all-reduce for each dtype, 1 / period of what DDP sends.
    """

    def __init__(
        self,
        params: Iterable[Any],
        period: int,
        outer_optimizer: Callable[[list[Any]], Optimizer] = paper_outer_optimizer,
        process_group: Any = None,
    ) -> None:
        super().__init__(process_group)
        if period < 1:
            raise ValueError("Arg ``period`` must be a positive value.")
        self.period = period
        self.locals = list(params)
        for tensors, flat in flat_of(self.locals, self.process_group):
            self.process_group.issue(Broadcast(flat.array, 0))
            for tensor, first in zip(tensors, flat.views, strict=True):
                tensor.set_array(first)
        self.globals = [make(p._data.copy()) for p in self.locals]
        self.outer = outer_optimizer(self.globals)

    def average_parameters(self, params: Iterable[Any]) -> None:
        """Count a step; after every `period`-th make an outer one. `params`: the constructor's."""
        self._check_same(params)
        self.step += 1
        if self.step % self.period == 0:
            self._outer_step()

    def _outer_step(self) -> None:
        pairs = zip(self.globals, self.locals, strict=True)
        deltas = [make(g._data - p._data) for g, p in pairs]
        for tensors, flat in flat_of(deltas, self.process_group):
            self.process_group.issue(AllReduce(flat.array, ReduceOp.AVG))
            for delta, mean in zip(tensors, flat.views, strict=True):
                delta._data = mean
        for shared, delta in zip(self.globals, deltas, strict=True):
            shared._grad = delta
        self.outer.step()
        self.outer.zero_grad()
        for shared, own in zip(self.globals, self.locals, strict=True):
            own.set_array(shared._data)

    def _check_same(self, params: Iterable[Any]) -> None:
        given = list(chain(*(p["params"] if isinstance(p, dict) else (p,) for p in params)))
        if list(map(id, given)) != list(map(id, self.locals)):
            raise ValueError(
                f"DiLoCoAverager was made for {len(self.locals)} parameters, and "
                f"average_parameters was given {len(given)} that are not the same ones in the same "
                "order"
            )

    def state_dict(self) -> dict[str, Any]:
        """The step, the global parameters and the outer optimizer's state: the same on all ranks.

        The local parameters are the model's, each rank's own.
        """
        shared = [make(np.array(g._data)) for g in self.globals]
        return {"step": self.step, "globals": shared, "outer": self.outer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state; the local parameters are left as they are."""
        self.step = state_dict["step"]
        for shared, saved in zip(self.globals, state_dict["globals"], strict=True):
            shared.set_array(saved._data)
        self.outer.load_state_dict(state_dict["outer"])
