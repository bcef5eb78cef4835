"""Losses of class scores: cross_entropy as one op, nll_loss composed of ops.

Rules: scores are (C), (N, C) or (N, C, *); `reduction` is "none", "mean" or "sum"; weights of
classes are constants, which get no gradient.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dtrain import dtypes
from dtrain.autograd.dispatch import Whole, elsewhere
from dtrain.autograd.op import define, make
from dtrain.autograd.value import Value, has_part
from dtrain.ops.activation import log_softmax
from dtrain.ops.gather import take_along_dim
from dtrain.ops.reduce import mean, sum
from dtrain.ops.shape import permute, reshape, squeeze, unsqueeze


def _array(x: Any) -> Any:
    return x._data if isinstance(x, Value) else x


def check_reduction(reduction: str) -> None:
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"{reduction} is not a valid value for reduction")


def reduced(loss: Any, reduction: str) -> Any:
    """The losses themselves, their mean or their sum."""
    check_reduction(reduction)
    if reduction == "none":
        return loss
    return mean(loss) if reduction == "mean" else sum(loss)


# --- class scores and class indices --------------------------------------------------------------


def _row_weights(
    target: np.ndarray, weight: Any, ignore_index: int, classes: int, kind: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Each row's class, with 0 for the ignored ones, and its weight, 0 for those."""
    counted = target != ignore_index
    safe = np.where(counted, target, 0)
    if safe.size and (safe.min() < 0 or safe.max() >= classes):
        bad = safe[(safe < 0) | (safe >= classes)][0]
        raise IndexError(f"Target {bad} is out of bounds.")
    if weight is None:
        return safe, counted.astype(kind)
    return safe, np.where(counted, weight[safe], 0).astype(kind)


def _divisor(row_weights: np.ndarray, reduction: str) -> Any:
    return row_weights.sum() if reduction == "mean" else row_weights.dtype.type(1)


def _cross_entropy_forward(
    x: np.ndarray, target: np.ndarray, *, weight: np.ndarray | None, ignore_index: int,
    reduction: str, smoothing: float,
) -> tuple[np.ndarray, ...]:  # fmt: skip
    rows, classes = x.shape
    safe, row_weights = _row_weights(target, weight, ignore_index, classes, x.dtype)
    shifted = x - np.maximum.reduce(x, axis=1, keepdims=True, initial=-np.inf)
    picked = shifted[np.arange(rows), safe]
    spread = _smooth_part(shifted, weight) if smoothing else 0
    probabilities = np.exp(shifted, out=shifted)
    total = np.add.reduce(probabilities, axis=1)
    probabilities /= total[:, None]
    log_total = np.log(total)
    losses = row_weights * (log_total - picked)
    if smoothing:
        mass = classes if weight is None else weight.sum()
        even = (log_total * mass - spread) * (target != ignore_index)
        losses = losses * (1 - smoothing) + even * (smoothing / classes)
    divisor = _divisor(row_weights, reduction)
    loss = losses if reduction == "none" else np.asarray(losses.sum() / divisor)
    return loss, probabilities, safe, row_weights, np.asarray(divisor)


def _smooth_part(shifted: np.ndarray, weight: np.ndarray | None) -> np.ndarray:
    return np.add.reduce(shifted, axis=1) if weight is None else shifted @ weight


def _cross_entropy_vjp(n: Any, g: np.ndarray) -> Any:
    # d loss_i / dx = (weight of the row) (softmax - one_hot), mixed with the same for all classes
    scale = g / n.divisor
    hit = n.row_weights * scale * (1 - n.smoothing)
    dx: np.ndarray
    if n.smoothing:
        classes = n.probabilities.shape[1]
        mass = classes if n.weight is None else n.weight.sum()
        even = (n.target != n.ignore_index) * scale * g.dtype.type(n.smoothing / classes)
        dx = n.probabilities * (hit + even * mass)[:, None]
        dx -= even[:, None] if n.weight is None else even[:, None] * n.weight
    else:
        dx = n.probabilities * hit[:, None]
    dx[np.arange(len(dx)), n.safe] -= hit
    return dx, None


def _cross_entropy_composite(
    x: Any, target: Any, *, weight: Any, ignore_index: int, reduction: str, smoothing: float
) -> Any:
    log_p = log_softmax(x, 1)
    hard = _nll(log_p, target, weight, ignore_index, reduction)
    if not smoothing:
        return hard
    classes = x.shape[1]
    counted = _array(target) != ignore_index
    weighted = log_p if weight is None else log_p * weight
    even = -sum(weighted, 1) * counted.astype(_array(x).dtype)
    if reduction != "none":
        _, row_weights = _row_weights(
            _array(target), weight, ignore_index, classes, _array(x).dtype
        )
        even = sum(even) / _divisor(row_weights, reduction)
    return hard * (1 - smoothing) + even * (smoothing / classes)


def _cross_entropy_sample() -> list[Any]:
    r = np.random.RandomState(0)
    x, target = r.randn(4, 3), np.array([2, 0, 1, 2])
    plain = {"weight": None, "ignore_index": -100, "reduction": "mean", "smoothing": 0.0}
    weighted = {**plain, "weight": np.array([0.5, 1.0, 2.0]), "ignore_index": 1}
    return [
        ((x, target), plain),
        ((x, target), {**plain, "reduction": "none"}),
        ((x, target), {**weighted, "smoothing": 0.1}),
    ]


_cross_entropy = define(
    "cross_entropy", _cross_entropy_forward, vjp=_cross_entropy_vjp,
    aux="probabilities safe row_weights divisor", composite=_cross_entropy_composite,
    sample=_cross_entropy_sample,
)  # fmt: skip


def _class_rows(input: Any, target: Any) -> tuple[Any, Any]:
    """(C), (N, C) or (N, C, *) scores as rows of classes, with one target each."""
    if target._data.dtype not in (np.int64, np.uint8):
        kind = {"float32": "Float", "float64": "Double", "int32": "Int"}
        name = dtypes.from_numpy(target._data.dtype)
        found = kind.get(str(target._data.dtype), name.scalar_type)
        raise RuntimeError(f"expected target dtype to be Long or Byte, but got {found}")
    if input.ndim == 1:
        return unsqueeze(input, 0), reshape(target, (-1,))
    if input.shape[0] != target.shape[0]:
        raise ValueError(
            f"Expected input batch_size ({input.shape[0]}) to match target batch_size "
            f"({target.shape[0]})."
        )
    if input.ndim == 2:
        if target.ndim != 1:
            raise RuntimeError("0D or 1D target tensor expected, multi-target not supported")
        return input, target
    wanted = [input.shape[0], *input.shape[2:]]
    if list(target.shape) != wanted:
        raise RuntimeError(f"Expected target size {wanted}, got {list(target.shape)}")
    order = (0, *range(2, input.ndim), 1)
    return reshape(permute(input, order), (-1, input.shape[1])), reshape(target, (-1,))


def _check_weight(weight: Any, classes: int) -> None:
    if weight is not None and tuple(weight.shape) != (classes,):
        raise RuntimeError(
            f"weight tensor should be defined either for all {classes} classes or no classes but "
            f"got weight tensor of shape: {list(weight.shape)}"
        )


def cross_entropy(
    input: Any, target: Any, weight: Any = None, ignore_index: int = -100,
    reduction: str = "mean", label_smoothing: float = 0.0,
) -> Any:  # fmt: skip
    """-log softmax(input)[target], for scores (C), (N, C) or (N, C, *).

    `target` holds class indices, or probabilities in the shape of `input`. The mean is weighted.
    Source: torch.nn.functional.cross_entropy.
    """
    check_reduction(reduction)
    if has_part(input, target, weight):
        attrs = {"ignore_index": ignore_index, "reduction": reduction}
        inputs = (input, target, weight)
        return elsewhere(_CROSS_ENTROPY, inputs, {**attrs, "label_smoothing": label_smoothing})
    if not 0 <= label_smoothing <= 1:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing:g}")
    _check_weight(weight, input.shape[0 if input.ndim == 1 else 1])
    if target.shape == input.shape and target._data.dtype.kind == "f":
        if ignore_index >= 0:
            raise RuntimeError("ignore_index is not supported for floating point target")
        return _soft_cross_entropy(input, target, weight, reduction, label_smoothing)
    if input._data.dtype.itemsize < 4:  # 16 bits are too few for sums; torch's are 32, too
        weight = None if weight is None else weight.float()
        wide = cross_entropy(
            input.float(), target, weight, ignore_index, reduction, label_smoothing
        )
        return wide.to(input.dtype)
    rows, classes = _class_rows(input, target)
    loss = _cross_entropy(
        rows, classes, weight=None if weight is None else weight._data,
        ignore_index=ignore_index, reduction=reduction, smoothing=label_smoothing,
    )  # fmt: skip
    return reshape(loss, tuple(target.shape)) if reduction == "none" else loss


_CROSS_ENTROPY = Whole("cross_entropy", cross_entropy)


def _soft_cross_entropy(
    input: Any, target: Any, weight: Any, reduction: str, smoothing: float
) -> Any:
    dim = 0 if input.ndim == 1 else 1
    classes = input.shape[dim]
    if smoothing:
        target = target * (1 - smoothing) + smoothing / classes
    terms = log_softmax(input, dim) * target
    if weight is not None:
        terms = terms * reshape(weight, (classes,) + (1,) * (input.ndim - 1 - dim))
    losses = -sum(terms, dim)
    if reduction == "mean":
        return sum(losses) / max(1, losses.numel())
    return reduced(losses, reduction)


def _nll(log_p: Any, target: Any, weight: Any, ignore_index: int, reduction: str) -> Any:
    safe, row_weights = _row_weights(
        _array(target), _array(weight), ignore_index, log_p.shape[1], _array(log_p).dtype
    )
    picked = take_along_dim(log_p, make(safe[:, None]), 1)
    losses = squeeze(picked, 1) * make(-row_weights)
    if reduction == "none":
        return losses
    return sum(losses) / make(np.asarray(_divisor(row_weights, reduction)))


def nll_loss(
    input: Any, target: Any, weight: Any = None, ignore_index: int = -100, reduction: str = "mean"
) -> Any:
    """-input[target] for log-probabilities (C), (N, C) or (N, C, *) and class indices.

    Source: torch.nn.functional.nll_loss.
    """
    check_reduction(reduction)
    _check_weight(weight, input.shape[0 if input.ndim == 1 else 1])
    rows, classes = _class_rows(input, target)
    loss = _nll(rows, classes, weight, ignore_index, reduction)
    return reshape(loss, tuple(target.shape)) if reduction == "none" else loss
