"""NAdam: Adam with Nesterov's look-ahead in the first moment.

Source: torch.optim.NAdam; Dozat, Incorporating Nesterov momentum into Adam, ICLR workshop 2016.
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
    advance,
    blend,
    blend_square,
    gradient,
    new_step,
    number_or_none,
    require,
    require_betas,
    require_options,
)


class Numbers(NamedTuple):
    """What one step multiplies by; None leaves a term out."""

    grad_size: Any  # of the gradient in the update
    average_size: Any  # of the first moment in it
    share: Any  # 1 - beta1
    beta2: Any
    share_squared: Any  # 1 - beta2
    root: Any  # sqrt(1 - beta2^step)
    eps: Any
    shrink: Any  # 1 - lr * weight_decay, of the decoupled form
    weight_decay: Any
    maximize: bool


class NAdam(UpdateRule):
    """Adam whose update mixes the gradient and the first moment by a momentum that grows.

    The momentum of step t is `beta1 * (1 - 0.96**(t * momentum_decay) / 2)`; the state keeps the
    product of them all. `decoupled_weight_decay` as in Adam. See UpdateRule for foreach and the
    others.
    """

    temporaries = 3
    kept_as_saved = ("step", "mu_product")

    def __init__(
        self,
        params: Iterable[Any],
        lr: Any = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum_decay: float = 4e-3,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        require_options(lr, weight_decay, eps)
        require_betas(betas)
        require(momentum_decay >= 0, "momentum_decay value", momentum_decay)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum_decay": momentum_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
        }
        super().__init__(params, defaults)

    def arrays(self, group: Group) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def clock(self, group: Group, state: State) -> tuple[int, float]:
        """The step, and the product of the momenta so far, this step's included."""
        step = advance(state)
        if "mu_product" not in state:
            state["mu_product"] = new_step(1)
        product = state["mu_product"]._data
        product *= _momentum(group, step)
        return step, float(product)

    def numbers(self, group: Group, clock: tuple[int, float]) -> Numbers:
        step, product = clock
        lr, decay = number(group["lr"]), number_or_none(group["weight_decay"])
        beta1, beta2 = map(number, group["betas"])
        following = _momentum(group, step + 1)
        decoupled = group["decoupled_weight_decay"] and decay is not None
        return Numbers(
            grad_size=lr * (1 - _momentum(group, step)) / (1 - product),
            average_size=lr * following / (1 - product * following),
            share=1 - beta1,
            beta2=beta2,
            share_squared=1 - beta2,
            root=(1 - beta2**step) ** 0.5,
            eps=number(group["eps"]),
            shrink=1 - lr * decay if decoupled and decay is not None else None,
            weight_decay=None if decoupled else decay,
            maximize=group["maximize"],
        )

    @staticmethod
    def rule(h: Numbers, temps: Sequence[Array], param: Array, grad: Array, *state: Array) -> None:
        exp_avg, exp_avg_sq = state
        root, t, other = temps
        if h.shrink is not None:
            np.multiply(param, h.shrink, out=param)
        grad = gradient(h, param, grad, out=other)
        blend(exp_avg, grad, h.share, out=t)
        blend_square(exp_avg_sq, grad, h.beta2, h.share_squared, out=t)
        np.sqrt(exp_avg_sq, out=root)
        np.divide(root, h.root, out=root)
        np.add(root, h.eps, out=root)
        np.multiply(grad, h.grad_size, out=other)
        np.multiply(exp_avg, h.average_size, out=t)
        np.add(t, other, out=t)
        np.divide(t, root, out=t)
        np.subtract(param, t, out=param)


def _momentum(group: Group, step: int) -> float:
    growth: float = 0.96 ** (step * group["momentum_decay"])
    return number(group["betas"][0]) * (1 - 0.5 * growth)
