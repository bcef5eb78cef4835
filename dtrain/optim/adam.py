"""Adam, with AMSGrad and either form of weight decay.

Source: torch.optim.Adam; Kingma and Ba, arXiv:1412.6980; Reddi et al., arXiv:1904.09237 (AMSGrad).
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

    step_size: Any  # lr times both bias corrections
    eps: Any  # times the bias correction of the second moment
    share: Any  # 1 - beta1
    beta2: Any
    share_squared: Any  # 1 - beta2
    shrink: Any  # 1 - lr * weight_decay, of the decoupled form
    weight_decay: Any
    maximize: bool


class Adam(UpdateRule):
    """`param -= lr * m / (sqrt(v) + eps)`; m, v: bias-corrected averages of grad and grad^2.

    `amsgrad` divides by the largest v so far. `weight_decay` is added to the gradient, or with
    `decoupled_weight_decay` shrinks the parameter (AdamW). See UpdateRule for foreach and the
    others.
    """

    temporaries = 2

    def __init__(
        self,
        params: Iterable[Any],
        lr: Any = 1e-3,
        betas: tuple[Any, Any] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
    ) -> None:
        require_options(lr, weight_decay, eps)
        require_betas(betas)
        defaults = {
            "lr": lr,
            "betas": tuple(number(b) for b in betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults)

    def arrays(self, group: Group) -> tuple[str, ...]:
        names = ("exp_avg", "exp_avg_sq")
        return (*names, "max_exp_avg_sq") if group["amsgrad"] else names

    def numbers(self, group: Group, clock: int) -> Numbers:
        lr, decay = number(group["lr"]), number_or_none(group["weight_decay"])
        beta1, beta2 = map(number, group["betas"])
        # m / (sqrt(v) / root + eps) = root * m / (sqrt(v) + eps * root): one pass less
        root = (1 - beta2**clock) ** 0.5
        decoupled = group["decoupled_weight_decay"] and decay is not None
        return Numbers(
            step_size=lr / (1 - beta1**clock) * root,
            eps=group["eps"] * root,
            share=1 - beta1,
            beta2=beta2,
            share_squared=1 - beta2,
            shrink=1 - lr * decay if decoupled and decay is not None else None,
            weight_decay=None if decoupled else decay,
            maximize=group["maximize"],
        )

    @staticmethod
    def rule(h: Numbers, temps: Sequence[Array], param: Array, grad: Array, *state: Array) -> None:
        exp_avg, exp_avg_sq, *largest = state
        t, other = temps
        if h.shrink is not None:
            np.multiply(param, h.shrink, out=param)
        grad = gradient(h, param, grad, out=other)
        blend(exp_avg, grad, h.share, out=t)
        blend_square(exp_avg_sq, grad, h.beta2, h.share_squared, out=t)
        for maximum in largest:
            exp_avg_sq = np.maximum(maximum, exp_avg_sq, out=maximum)
        np.sqrt(exp_avg_sq, out=t)
        np.add(t, h.eps, out=t)
        np.divide(exp_avg, t, out=t)
        np.multiply(t, h.step_size, out=t)
        np.subtract(param, t, out=param)
