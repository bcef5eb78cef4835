"""Dropout: elements zeroed at random, the others scaled up so that the mean stays.

Which are kept is drawn from the default generator exactly as PyTorch's CPU dropout draws it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dtrain.autograd.op import define
from dtrain.ops.random import source_of
from dtrain.ops.shape import axis_of

_masked = define(
    "dropout", lambda x, *, noise: x * noise, inputs="x",
    vjp=lambda n, g: (g * n.noise,),
    sample=lambda: [((np.arange(3.0),), {"noise": np.array([2.0, 0, 2])})],
)  # fmt: skip


def noise_for(shape: tuple[int, ...], dtype: Any, p: float) -> np.ndarray:
    """0 with probability p and else 1 / (1 - p): what dropout multiplies by."""
    keep = source_of(None).dropout_mask(p, shape)
    if p == 1:
        return np.zeros(shape, dtype)
    noise = keep.astype(dtype)
    noise *= 1 / (1 - p)
    return noise


def check_probability(p: float) -> None:
    if not 0 <= p <= 1:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")


def dropout(input: Any, p: float = 0.5, training: bool = True) -> Any:
    """Each element zero with probability p, else times 1 / (1 - p); nothing unless `training`.

    Source: torch.nn.functional.dropout.
    """
    check_probability(p)
    if not training or p == 0:
        return input
    return _masked(input, noise=noise_for(tuple(input.shape), input._data.dtype, p))


def feature_dropout(input: Any, p: float, training: bool) -> Any:
    """`dropout` of whole channels: one draw for each (sample, channel) of (N, C, *)."""
    check_probability(p)
    if not training or p == 0:
        return input
    axis_of(1, input.ndim)
    shape = tuple(input.shape[:2]) + (1,) * (input.ndim - 2)
    return _masked(input, noise=noise_for(shape, input._data.dtype, p))
