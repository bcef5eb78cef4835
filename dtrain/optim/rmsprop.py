"""RMSprop: gradients divided by the root of their mean square.

Source: torch.optim.RMSprop (the root is taken before eps is added); Hinton's lecture notes;
centered: Graves, arXiv:1308.0850.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from dtrain.optim.optimizer import Group, number
from dtrain.optim.update import (
    Array,
    UpdateRule,
    blend,
    blend_square,
    gradient,
    number_or_none,
    require,
    require_options,
)


class Numbers(NamedTuple):
    """What one step multiplies by; None leaves a term out."""

    lr: Any
    alpha: Any
    share: Any  # 1 - alpha
    eps: Any
    momentum: Any
    weight_decay: Any
    centered: bool
    maximize: bool


class RMSprop(UpdateRule):
    """`param -= lr * grad / (sqrt(s) + eps)`; s: the running average of grad^2 by `alpha`.

    `centered` takes the square of the average gradient off s. With momentum the quotients are
    summed in a buffer. See UpdateRule for foreach and the others.
    """

    temporaries = 3

    def __init__(
        self,
        params: Iterable[Any],
        lr: Any = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
    ) -> None:
        require_options(lr, weight_decay, eps)
        require(momentum >= 0, "momentum value", momentum)
        require(alpha >= 0, "alpha value", alpha)
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "alpha": alpha,
            "eps": eps,
            "centered": centered,
            "weight_decay": weight_decay,
            "capturable": capturable,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
        }
        super().__init__(params, defaults)

    def arrays(self, group: Group) -> tuple[str, ...]:
        return (
            "square_avg",
            *(("momentum_buffer",) if group["momentum"] > 0 else ()),
            *(("grad_avg",) if group["centered"] else ()),
        )

    def numbers(self, group: Group, clock: int) -> Numbers:
        return Numbers(
            lr=number(group["lr"]),
            alpha=number(group["alpha"]),
            share=1 - number(group["alpha"]),
            eps=number(group["eps"]),
            momentum=number_or_none(group["momentum"]),
            weight_decay=number_or_none(group["weight_decay"]),
            centered=group["centered"],
            maximize=group["maximize"],
        )

    @staticmethod
    def rule(h: Numbers, temps: Sequence[Array], param: Array, grad: Array, *state: Array) -> None:
        square_avg = state[0]
        root, t, other = temps
        grad = gradient(h, param, grad, out=other)
        blend_square(square_avg, grad, h.alpha, h.share, out=t)
        if h.centered:
            grad_avg = state[-1]
            blend(grad_avg, grad, h.share, out=t)
            np.multiply(grad_avg, grad_avg, out=t)
            np.subtract(square_avg, t, out=t)
            np.sqrt(t, out=root)
        else:
            np.sqrt(square_avg, out=root)
        np.add(root, h.eps, out=root)
        step = np.divide(grad, root, out=root)
        if h.momentum is not None:
            buffer = state[1]
            np.multiply(buffer, h.momentum, out=buffer)
            step = np.add(buffer, step, out=buffer)
        np.multiply(step, h.lr, out=t)
        np.subtract(param, t, out=param)
