"""Adadelta: gradients scaled by the ratio of the running roots of steps and of gradients.

Source: torch.optim.Adadelta; Zeiler, arXiv:1212.5701.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from dtrain.optim.optimizer import Group, number
from dtrain.optim.update import (
    Array,
    UpdateRule,
    blend_square,
    gradient,
    number_or_none,
    require,
    require_options,
)


class Numbers(NamedTuple):
    """What one step multiplies by; None leaves a term out."""

    lr: Any
    rho: Any
    share: Any  # 1 - rho
    eps: Any
    weight_decay: Any
    maximize: bool


class Adadelta(UpdateRule):
    """`param -= lr * d` with `d = grad * sqrt(u + eps) / sqrt(s + eps)`.

    s and u are the running averages of grad^2 and d^2 by `rho`. See UpdateRule for foreach and
    the others.
    """

    temporaries = 3

    def __init__(
        self,
        params: Iterable[Any],
        lr: Any = 1.0,
        rho: float = 0.9,
        eps: float = 1e-6,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        capturable: bool = False,
        maximize: bool = False,
        differentiable: bool = False,
    ) -> None:
        require_options(lr, weight_decay, eps)
        require(0 <= rho <= 1, "rho value", rho)
        defaults = {
            "lr": lr,
            "rho": rho,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "capturable": capturable,
            "foreach": foreach,
            "differentiable": differentiable,
        }
        super().__init__(params, defaults)

    def arrays(self, group: Group) -> tuple[str, ...]:
        return ("square_avg", "acc_delta")

    def numbers(self, group: Group, clock: int) -> Numbers:
        return Numbers(
            lr=number(group["lr"]),
            rho=number(group["rho"]),
            share=1 - number(group["rho"]),
            eps=number(group["eps"]),
            weight_decay=number_or_none(group["weight_decay"]),
            maximize=group["maximize"],
        )

    @staticmethod
    def rule(h: Numbers, temps: Sequence[Array], param: Array, grad: Array, *state: Array) -> None:
        square_avg, acc_delta = state
        delta, t, other = temps
        grad = gradient(h, param, grad, out=other)
        blend_square(square_avg, grad, h.rho, h.share, out=t)
        np.add(square_avg, h.eps, out=t)
        np.sqrt(t, out=t)
        np.add(acc_delta, h.eps, out=delta)
        np.sqrt(delta, out=delta)
        np.divide(delta, t, out=delta)
        np.multiply(delta, grad, out=delta)
        blend_square(acc_delta, delta, h.rho, h.share, out=t)
        np.multiply(delta, h.lr, out=delta)
        np.subtract(param, delta, out=param)
