"""RAdam: Adam without its second moment for as long as that rests on too few gradients.

Source: torch.optim.RAdam; Liu et al., arXiv:1908.03265.
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
    require_betas,
    require_options,
)


class Numbers(NamedTuple):
    """What one step multiplies by; None leaves a term out."""

    step_size: Any  # lr times the bias corrections and the rectification
    share: Any  # 1 - beta1
    beta2: Any
    share_squared: Any  # 1 - beta2
    eps: Any  # None: the second moment is not used yet
    shrink: Any  # 1 - lr * weight_decay, of the decoupled form
    weight_decay: Any
    maximize: bool


class RAdam(UpdateRule):
    """Adam times a rectification that grows to 1; plain momentum in the first steps.

    `decoupled_weight_decay` as in Adam. See UpdateRule for foreach and the others.
    """

    temporaries = 2

    def __init__(
        self,
        params: Iterable[Any],
        lr: Any = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        require_options(lr, weight_decay, eps)
        require_betas(betas)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "decoupled_weight_decay": decoupled_weight_decay,
            "differentiable": differentiable,
        }
        super().__init__(params, defaults)

    def arrays(self, group: Group) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def numbers(self, group: Group, clock: int) -> Numbers:
        lr, decay = number(group["lr"]), number_or_none(group["weight_decay"])
        beta1, beta2 = map(number, group["betas"])
        rectification = _rectification(beta2, clock)
        size = lr / (1 - beta1**clock)
        decoupled = group["decoupled_weight_decay"] and decay is not None
        return Numbers(
            step_size=size if rectification is None else size * rectification,
            share=1 - beta1,
            beta2=beta2,
            share_squared=1 - beta2,
            eps=None if rectification is None else number(group["eps"]),
            shrink=1 - lr * decay if decoupled and decay is not None else None,
            weight_decay=None if decoupled else decay,
            maximize=group["maximize"],
        )

    @staticmethod
    def rule(h: Numbers, temps: Sequence[Array], param: Array, grad: Array, *state: Array) -> None:
        exp_avg, exp_avg_sq = state
        t, other = temps
        if h.shrink is not None:
            np.multiply(param, h.shrink, out=param)
        grad = gradient(h, param, grad, out=other)
        blend(exp_avg, grad, h.share, out=t)
        blend_square(exp_avg_sq, grad, h.beta2, h.share_squared, out=t)
        step = exp_avg
        if h.eps is not None:
            np.sqrt(exp_avg_sq, out=t)
            np.add(t, h.eps, out=t)
            step = np.divide(exp_avg, t, out=t)
        np.multiply(step, h.step_size, out=t)
        np.subtract(param, t, out=param)


def _rectification(beta2: float, step: int) -> float | None:
    """sqrt(1 - beta2^step) times the paper's r; None while the variance is intractable."""
    correction = 1 - beta2**step
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * step * beta2**step / correction
    if length <= 5:
        return None
    share = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
    return float((share * correction) ** 0.5)
