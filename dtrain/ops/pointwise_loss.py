"""Losses between equal shapes: squared, absolute, Huber, binary cross-entropy, divergence.

Composed of differentiable ops, so that input and target both get gradients, to any order.
`reduction` is "none", "mean" or "sum".
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np

from dtrain.autograd.op import define
from dtrain.ops.activation import logsigmoid
from dtrain.ops.arithmetic import clamp, maximum
from dtrain.ops.compare import where
from dtrain.ops.elementwise import abs, exp, log, log1p, square
from dtrain.ops.loss import reduced
from dtrain.ops.reduce import norm, sum


def _warn_of_sizes(input: Any, target: Any) -> None:
    if target.shape != input.shape:
        warnings.warn(
            f"Using a target size ({target.shape}) that is different to the input size "
            f"({input.shape}). This will likely lead to incorrect results due to broadcasting. "
            "Please ensure they have the same size.",
            stacklevel=4,
        )


def _weighted(loss: Any, weight: Any) -> Any:
    return loss if weight is None else loss * weight


def mse_loss(input: Any, target: Any, reduction: str = "mean", weight: Any = None) -> Any:
    """(input - target)^2, times `weight`. Source: torch.nn.functional.mse_loss."""
    _warn_of_sizes(input, target)
    return reduced(_weighted(square(input - target), weight), reduction)


def l1_loss(input: Any, target: Any, reduction: str = "mean", weight: Any = None) -> Any:
    """|input - target|, times `weight`. Source: torch.nn.functional.l1_loss."""
    _warn_of_sizes(input, target)
    return reduced(_weighted(abs(input - target), weight), reduction)


def smooth_l1_loss(input: Any, target: Any, reduction: str = "mean", beta: float = 1.0) -> Any:
    """d^2 / (2 beta) for d = |input - target| < beta, else d - beta / 2.

    Source: torch.nn.functional.smooth_l1_loss.
    """
    _warn_of_sizes(input, target)
    if beta < 0:
        raise RuntimeError("smooth_l1_loss does not support negative values for beta.")
    d = abs(input - target)
    if beta == 0:
        return reduced(d, reduction)
    return reduced(where(d < beta, square(d) * (0.5 / beta), d - 0.5 * beta), reduction)


def huber_loss(
    input: Any, target: Any, reduction: str = "mean", delta: float = 1.0, weight: Any = None
) -> Any:
    """d^2 / 2 for d = |input - target| <= delta, else delta (d - delta / 2), times `weight`.

    Source: torch.nn.functional.huber_loss.
    """
    _warn_of_sizes(input, target)
    if delta <= 0:
        raise RuntimeError("huber_loss does not support non-positive values for delta.")
    d = abs(input - target)
    loss = where(d <= delta, square(d) * 0.5, (d - 0.5 * delta) * delta)
    return reduced(_weighted(loss, weight), reduction)


# --- binary cross-entropy ------------------------------------------------------------------------


def _bce_forward(x: np.ndarray, target: np.ndarray) -> np.ndarray:
    if ((x < 0) | (x > 1)).any():
        raise RuntimeError("all elements of input should be between 0 and 1")
    return -(target * np.maximum(np.log(x), -100) + (1 - target) * np.maximum(np.log1p(-x), -100))


def _clipped(logarithm: Any) -> Any:
    """No less than -100, so that a loss is finite where the input is 0 or 1."""
    return clamp(logarithm, min=-100.0)


def _bce_vjp(n: Any, g: Any) -> Any:
    dx = dt = None
    if n.needs[0]:
        dx = g * (n.x - n.target) / clamp(n.x * (1 - n.x), min=1e-12)
    if n.needs[1]:
        dt = g * (_clipped(log1p(-n.x)) - _clipped(log(n.x)))
    return dx, dt


def _bce_sample() -> list[Any]:
    r = np.random.RandomState(0)
    return [((r.uniform(0.1, 0.9, (3, 4)), r.rand(3, 4)), {})]


_bce = define(
    "binary_cross_entropy", _bce_forward, saves="x target", vjp=_bce_vjp, sample=_bce_sample
)


def binary_cross_entropy(
    input: Any, target: Any, weight: Any = None, reduction: str = "mean"
) -> Any:
    """-(target log(input) + (1 - target) log(1 - input)), logarithms at least -100.

    Source: torch.nn.functional.binary_cross_entropy.
    """
    if target.shape != input.shape:
        raise ValueError(
            f"Using a target size ({target.shape}) that is different to the input size "
            f"({input.shape}) is deprecated. Please ensure they have the same size."
        )
    return reduced(_weighted(_bce(input, target), weight), reduction)


def binary_cross_entropy_with_logits(
    input: Any, target: Any, weight: Any = None, reduction: str = "mean", pos_weight: Any = None
) -> Any:
    """`binary_cross_entropy` of sigmoid(input) without overflow; `pos_weight` weighs target 1.

    Source: torch.nn.functional.binary_cross_entropy_with_logits.
    """
    if target.shape != input.shape:
        raise ValueError(
            f"Target size ({target.shape}) must be the same as input size ({input.shape})"
        )
    log_p = logsigmoid(input)
    if pos_weight is not None:
        log_p = log_p * ((pos_weight - 1) * target + 1)
    return reduced(_weighted((1 - target) * input - log_p, weight), reduction)


# --- between distributions and directions --------------------------------------------------------


def _times_its_log(x: Any) -> Any:
    """x log(x), and 0 at 0."""
    positive = x > 0
    return where(positive, x * log(where(positive, x, 1.0)), 0.0)


def kl_div(input: Any, target: Any, reduction: str = "mean", log_target: bool = False) -> Any:
    """target (log(target) - input) for log-probabilities `input`; "batchmean" divides by the
    batch size, which is the mathematical mean. Source: torch.nn.functional.kl_div.
    """
    if reduction == "mean":
        warnings.warn(
            "reduction: 'mean' divides the total loss by both the batch size and the support size."
            "'batchmean' divides only by the batch size, and aligns with the KL div math "
            "definition.",
            stacklevel=3,
        )
    if log_target:
        loss = exp(target) * (target - input)
    else:
        loss = _times_its_log(target) - target * input
    if reduction == "batchmean":
        return sum(loss) / input.shape[0] if input.ndim else loss
    return reduced(loss, reduction)


def cosine_similarity(x1: Any, x2: Any, dim: int = 1, eps: float = 1e-8) -> Any:
    """The cosine of the angle between vectors along `dim`; norms count as at least `eps`.

    Source: torch.nn.functional.cosine_similarity.
    """
    lengths = [clamp(norm(x, 2, dim), min=eps) for x in (x1, x2)]
    return sum(x1 * x2, dim) / (lengths[0] * lengths[1])


def normalize(input: Any, p: float = 2.0, dim: int = 1, eps: float = 1e-12) -> Any:
    """Vectors along `dim` divided by their p-norm, or by `eps` where that is less.

    Source: torch.nn.functional.normalize.
    """
    return input / clamp(norm(input, p, dim, True), min=eps)


def gaussian_nll_loss(
    input: Any, target: Any, var: Any, full: bool = False, eps: float = 1e-6,
    reduction: str = "mean",
) -> Any:  # fmt: skip
    """Half of log(var) + (input - target)^2 / var, with var at least `eps`.

    The gradient takes no notice of that limit. Source: torch.nn.functional.gaussian_nll_loss.
    """
    if (var < 0).any():
        raise ValueError("var has negative entry/entries")
    var = var + clamp(eps - var.detach(), min=0.0)
    loss = (log(var) + square(input - target) / var) * 0.5
    return reduced(loss + 0.5 * math.log(2 * math.pi) if full else loss, reduction)


def margin_ranking_loss(
    input1: Any, input2: Any, target: Any, margin: float = 0, reduction: str = "mean"
) -> Any:
    """max(0, -target (input1 - input2) + margin), target 1 or -1.

    Source: torch.nn.functional.margin_ranking_loss.
    """
    return reduced(maximum(-target * (input1 - input2) + margin, 0), reduction)
