"""Order: sort, argsort, topk, unique. Values are gathered by index, so gradients flow to them."""

from __future__ import annotations

from typing import Any

import numpy as np

from dtrain.autograd.node import make
from dtrain.autograd.op import define
from dtrain.ops.gather import take_along_dim
from dtrain.ops.reduce import values_and_indices
from dtrain.ops.shape import axis_of


def _order(x: np.ndarray, *, dim: int, descending: bool) -> np.ndarray:
    """Stable in both directions: equal elements keep their order."""
    if not descending:
        return np.argsort(x, axis=dim, kind="stable")
    backwards = np.argsort(np.flip(x, dim), axis=dim, kind="stable")
    return np.ascontiguousarray(np.flip(x.shape[dim] - 1 - backwards, dim))


_argsort = define("argsort", _order)


def argsort(input: Any, dim: int = -1, descending: bool = False, stable: bool = False) -> Any:
    """The indices (int64) that sort along `dim`; always stable. Source: torch.argsort."""
    if input.ndim == 0:
        return make(np.zeros((), np.int64))
    return _argsort(input, dim=axis_of(dim, input.ndim), descending=descending)


def sort(input: Any, dim: int = -1, descending: bool = False, stable: bool = False) -> Any:
    """(values, indices) in order along `dim`; always stable. Source: torch.sort."""
    index = argsort(input, dim, descending)
    if input.ndim == 0:
        return values_and_indices(input.clone(), index)
    return values_and_indices(take_along_dim(input, index, dim), index)


def topk(input: Any, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    """(values, indices) of the k largest (or smallest) along `dim`, in order.

    They are in order whatever `sorted` says. Source: torch.topk.
    """
    axis = axis_of(dim, input.ndim)
    if k > input.shape[axis]:
        raise RuntimeError("selected index k out of range")
    index = argsort(input, axis, largest).narrow(axis, 0, k).contiguous()
    return values_and_indices(take_along_dim(input, index, axis), index)


def unique(
    input: Any, sorted: bool = True, return_inverse: bool = False, return_counts: bool = False
) -> Any:
    """The distinct elements in ascending order (always), with inverse and counts if asked.

    Source: torch.unique, without `dim`.
    """
    values, inverse, counts = np.unique(input._data, return_inverse=True, return_counts=True)
    found = [make(values)]
    if return_inverse:
        found.append(make(inverse.reshape(input._data.shape)))
    if return_counts:
        found.append(make(counts))
    return found[0] if len(found) == 1 else tuple(found)
