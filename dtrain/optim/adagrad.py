"""Adagrad: gradients divided by the root of the sum of all their squares so far.

Source: torch.optim.Adagrad; Duchi, Hazan and Singer, JMLR 12, 2011.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from dtrain.optim.optimizer import Group, number
from dtrain.optim.update import (
    Array,
    UpdateRule,
    gradient,
    new_step,
    number_or_none,
    require,
    require_options,
)


class Numbers(NamedTuple):
    """What one step multiplies by; None leaves a term out."""

    lr: Any  # after its decay
    eps: Any
    weight_decay: Any
    maximize: bool


class Adagrad(UpdateRule):
    """`param -= lr / (1 + (step - 1) * lr_decay) * grad / (sqrt(sum) + eps)`.

    The sums start at `initial_accumulator_value`, and exist from construction on. See UpdateRule
    for foreach and the others.
    """

    temporaries = 2

    def __init__(
        self,
        params: Iterable[Any],
        lr: Any = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        require_options(lr, weight_decay, eps)
        require(lr_decay >= 0, "lr_decay value", lr_decay)
        require(
            initial_accumulator_value >= 0,
            "initial_accumulator_value value",
            initial_accumulator_value,
        )
        defaults = {
            "lr": lr,
            "lr_decay": lr_decay,
            "eps": eps,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: Group) -> None:
        super().add_param_group(param_group)
        start = param_group["initial_accumulator_value"]
        for param in param_group["params"]:
            value = complex(start, start) if param.is_complex() else start
            data = param._data
            self.state[param] = {
                "step": new_step(),
                "sum": param._kin(np.full(data.shape, value, data.dtype)),
            }

    def arrays(self, group: Group) -> tuple[str, ...]:
        return ("sum",)

    def numbers(self, group: Group, clock: int) -> Numbers:
        return Numbers(
            lr=number(group["lr"]) / (1 + (clock - 1) * group["lr_decay"]),
            eps=number(group["eps"]),
            weight_decay=number_or_none(group["weight_decay"]),
            maximize=group["maximize"],
        )

    @staticmethod
    def rule(h: Numbers, temps: Sequence[Array], param: Array, grad: Array, *state: Array) -> None:
        (total,) = state
        t, other = temps
        grad = gradient(h, param, grad, out=other)
        np.multiply(grad, grad, out=t)
        np.add(total, t, out=total)
        np.sqrt(total, out=t)
        np.add(t, h.eps, out=t)
        np.divide(grad, t, out=t)
        np.multiply(t, h.lr, out=t)
        np.subtract(param, t, out=param)
