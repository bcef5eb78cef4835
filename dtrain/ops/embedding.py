"""Rows of a table picked by index: embedding, and one-hot vectors.

The gradient adds up the rows' parts in a fixed order: the same bits every time.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dtrain.autograd.op import define
from dtrain.autograd.value import array_of
from dtrain.ops.index import sum_rows


def _rand(*shape: int) -> np.ndarray:
    return np.random.RandomState(0).rand(*shape)


def _embedding_forward(weight: np.ndarray, index: np.ndarray, *, padding_idx: int | None) -> Any:
    if index.size and (index.min() < 0 or index.max() >= weight.shape[0]):
        bad = index[(index < 0) | (index >= weight.shape[0])].reshape(-1)[0]
        raise IndexError(
            f"index out of range in self: index {bad}, but the embedding has {weight.shape[0]} rows"
        )
    return weight[index]


def _embedding_vjp(n: Any, g: Any) -> Any:
    return _embedding_grad(g, n.index, rows=n.shapes[0][0], padding_idx=n.padding_idx), None


def _embedding_grad_forward(
    g: np.ndarray, index: np.ndarray, *, rows: int, padding_idx: int | None
) -> np.ndarray:
    out = sum_rows(g.reshape(index.size, g.shape[-1]), index.reshape(-1), rows)
    if padding_idx is not None:
        out[padding_idx] = 0
    return out


def _embedding_grad_vjp(n: Any, g: Any) -> Any:
    keep = np.ones((n.rows, 1), array_of(g).dtype)
    if n.padding_idx is not None:
        keep[n.padding_idx] = 0
    return _embedding(g * keep, n.index, padding_idx=None), None


_embedding_grad = define(
    "embedding_grad", _embedding_grad_forward, inputs="g index", saves="index",
    vjp=_embedding_grad_vjp,
    sample=lambda: [((_rand(2, 3), np.array([1, 0])), {"rows": 4, "padding_idx": 0})],
)  # fmt: skip
_embedding = define(
    "embedding", _embedding_forward, inputs="weight index", saves="index", vjp=_embedding_vjp,
    sample=lambda: [((_rand(5, 3), np.array([[1, 1], [0, 4]])), {"padding_idx": None})],
)  # fmt: skip


def embedding(input: Any, weight: Any, padding_idx: int | None = None) -> Any:
    """Rows of `weight` (rows, dim) picked by the integer tensor `input`: shape (*input, dim).

    IndexError for an index out of range. `padding_idx`'s row gets no gradient.
    Source: torch.nn.functional.embedding.
    """
    if padding_idx is not None and padding_idx < 0:
        padding_idx += weight.shape[0]
    return _embedding(weight, input, padding_idx=padding_idx)


def one_hot(tensor: Any, num_classes: int = -1) -> Any:
    """int64 one-hot vectors along a new last dimension. Source: torch.nn.functional.one_hot."""
    return _one_hot(tensor, num_classes=num_classes)


def _one_hot_forward(x: np.ndarray, *, num_classes: int) -> Any:
    if x.dtype != np.int64:
        raise RuntimeError("one_hot is only applicable to index tensor of type LongTensor.")
    classes = int(x.max()) + 1 if num_classes == -1 else num_classes
    if x.size and (x.min() < 0 or x.max() >= classes):
        raise RuntimeError("Class values must be non-negative and smaller than num_classes.")
    return (x[..., None] == np.arange(classes)).astype(np.int64)


_one_hot = define("one_hot", _one_hot_forward)
