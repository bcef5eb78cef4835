"""Stochastic gradient descent, with momentum and Nesterov's look-ahead.

Source: torch.optim.SGD; Sutskever et al., On the importance of initialization and momentum in deep
learning, ICML 2013 (in torch's form, where the learning rate multiplies the buffer).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from dtrain.optim.optimizer import Group, number
from dtrain.optim.update import (
    Array,
    State,
    UpdateRule,
    gradient,
    number_or_none,
    require,
    require_options,
)


class Numbers(NamedTuple):
    """What one step multiplies by; None leaves a term out."""

    lr: Any
    momentum: Any
    share: Any  # of the gradient in the buffer: 1 - dampening, and 1 in the first step
    weight_decay: Any
    nesterov: bool
    maximize: bool


class SGD(UpdateRule):
    """`param -= lr * v`, where `v = momentum * v + (1 - dampening) * grad`.

    Nesterov uses `grad + momentum * v` instead of v. See UpdateRule for foreach and the others.
    """

    temporaries = 2

    def __init__(
        self,
        params: Iterable[Any],
        lr: Any = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: Any = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        require_options(lr, weight_decay)
        require(momentum >= 0, "momentum value", momentum)
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults)

    def arrays(self, group: Group) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] else ()

    def clock(self, group: Group, state: State) -> bool:
        """Whether this is the parameter's first step with momentum."""
        return state.get("momentum_buffer") is None

    def numbers(self, group: Group, clock: bool) -> Numbers:
        return Numbers(
            lr=number(group["lr"]),
            momentum=number_or_none(group["momentum"]),
            share=None if clock else number(1 - group["dampening"]),
            weight_decay=number_or_none(group["weight_decay"]),
            nesterov=group["nesterov"],
            maximize=group["maximize"],
        )

    @staticmethod
    def rule(h: Numbers, temps: Sequence[Array], param: Array, grad: Array, *state: Array) -> None:
        step, other = temps
        grad = gradient(h, param, grad, out=other)
        if h.momentum is None:
            np.multiply(grad, h.lr, out=step)
        else:
            (velocity,) = state
            np.multiply(velocity, h.momentum, out=velocity)
            share = grad if h.share is None else np.multiply(grad, h.share, out=step)
            np.add(velocity, share, out=velocity)
            if h.nesterov:
                np.multiply(velocity, h.momentum, out=step)
                np.add(step, grad, out=step)
                np.multiply(step, h.lr, out=step)
            else:
                np.multiply(velocity, h.lr, out=step)
        np.subtract(param, step, out=param)
