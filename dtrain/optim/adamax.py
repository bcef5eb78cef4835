"""Adamax: Adam with a running maximum in place of the second moment.

Source: torch.optim.Adamax; Kingma and Ba, arXiv:1412.6980, section 7.1.
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
    gradient,
    number_or_none,
    require_betas,
    require_options,
)


class Numbers(NamedTuple):
    """What one step multiplies by; None leaves a term out."""

    step_size: Any  # lr / (1 - beta1^step)
    share: Any  # 1 - beta1
    beta2: Any
    eps: Any
    weight_decay: Any
    maximize: bool


class Adamax(UpdateRule):
    """`param -= lr * m / u` with `u = max(beta2 * u, |grad| + eps)`; m as in Adam.

    See UpdateRule for foreach and the others.
    """

    temporaries = 2

    def __init__(
        self,
        params: Iterable[Any],
        lr: Any = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
    ) -> None:
        require_options(lr, weight_decay, eps)
        require_betas(betas)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
            "capturable": capturable,
        }
        super().__init__(params, defaults)

    def arrays(self, group: Group) -> tuple[str, ...]:
        return ("exp_avg", "exp_inf")

    def numbers(self, group: Group, clock: int) -> Numbers:
        beta1, beta2 = map(number, group["betas"])
        return Numbers(
            step_size=number(group["lr"]) / (1 - beta1**clock),
            share=1 - beta1,
            beta2=beta2,
            eps=number(group["eps"]),
            weight_decay=number_or_none(group["weight_decay"]),
            maximize=group["maximize"],
        )

    @staticmethod
    def rule(h: Numbers, temps: Sequence[Array], param: Array, grad: Array, *state: Array) -> None:
        exp_avg, exp_inf = state
        t, other = temps
        grad = gradient(h, param, grad, out=other)
        blend(exp_avg, grad, h.share, out=t)
        np.abs(grad, out=t)
        np.add(t, h.eps, out=t)
        np.multiply(exp_inf, h.beta2, out=exp_inf)
        np.maximum(exp_inf, t, out=exp_inf)
        np.divide(exp_avg, exp_inf, out=t)
        np.multiply(t, h.step_size, out=t)
        np.subtract(param, t, out=param)
