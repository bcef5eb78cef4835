"""Order: sort, topk, median, unique, counts. Values are gathered by index: gradients flow to them.

Sorting is stable, nan is the largest value, and equal elements keep their order in both directions.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dtrain.autograd.node import make
from dtrain.autograd.op import define
from dtrain.autograd.value import array_of, need_whole
from dtrain.ops.gather import take_along_dim
from dtrain.ops.join import narrow
from dtrain.ops.order import contiguous
from dtrain.ops.reduce import values_and_indices
from dtrain.ops.shape import axis_of, numpy_names, reshape, squeeze


def _order(x: np.ndarray, *, dim: int, descending: bool) -> np.ndarray:
    if x.ndim == 0:
        return np.zeros((), np.int64)
    if not descending:
        return np.argsort(x, axis=dim, kind="stable")
    backwards = np.argsort(np.flip(x, dim), axis=dim, kind="stable")
    return np.ascontiguousarray(np.flip(x.shape[dim] - 1 - backwards, dim))


_argsort = define("argsort", _order)


@numpy_names
def argsort(input: Any, dim: int = -1, descending: bool = False, stable: bool = False) -> Any:
    """The indices (int64) that sort along `dim`; always stable. Source: torch.argsort."""
    return _argsort(input, dim=axis_of(dim, input.ndim), descending=descending)


@numpy_names
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
    if not 0 <= k <= (input.shape[axis] if input.ndim else 1):
        raise RuntimeError("selected index k out of range")
    values, index = sort(input, axis, largest)
    if input.ndim == 0:
        return values_and_indices(values, index)
    index = contiguous(narrow(index, axis, 0, k))
    return values_and_indices(take_along_dim(input, index, axis), index)


def kthvalue(input: Any, k: int, dim: int = -1, keepdim: bool = False) -> Any:
    """(value, index) of the k-th smallest along `dim`, counted from 1. Source: torch.kthvalue."""
    axis = axis_of(dim, input.ndim)
    if not 1 <= k <= input.shape[axis]:
        raise RuntimeError(f"kthvalue(): selected number k out of range for dimension {axis}")
    index = contiguous(narrow(argsort(input, axis), axis, k - 1, 1))
    values = take_along_dim(input, index, axis)
    if not keepdim:
        values, index = squeeze(values, axis), squeeze(index, axis)
    return values_and_indices(values, index)


def median(input: Any, dim: int | None = None, keepdim: bool = False) -> Any:
    """The lower middle value: of all elements, or (values, indices) along `dim`; nan if any is.

    Source: torch.median.
    """
    if dim is None:
        return median(reshape(input, (-1,)), 0).values
    need_whole("median", input)
    x = array_of(input)
    axis = axis_of(dim, x.ndim)
    size = x.shape[axis]
    index = np.take(_order(x, dim=axis, descending=False), [(size - 1) // 2], axis)
    if x.dtype.kind == "f":
        gone = np.isnan(x)
        index = np.where(gone.any(axis, keepdims=True), gone.argmax(axis, keepdims=True), index)
    places = make(index)
    values = take_along_dim(input, places, axis)
    if not keepdim:
        values, places = squeeze(values, axis), squeeze(places, axis)
    return values_and_indices(values, places)


def unique(
    input: Any, sorted: bool = True, return_inverse: bool = False, return_counts: bool = False,
    dim: int | None = None,
) -> Any:  # fmt: skip
    """The distinct elements (or slices along `dim`) in ascending order, whatever `sorted` says.

    With inverse and counts if asked. Source: torch.unique.
    """
    need_whole("unique", input)
    values, inverse, counts = np.unique(
        input._data, return_inverse=True, return_counts=True, axis=dim
    )
    found = [make(values)]
    if return_inverse:
        found.append(make(inverse.reshape(input._data.shape if dim is None else (-1,))))
    if return_counts:
        found.append(make(counts))
    return found[0] if len(found) == 1 else tuple(found)


def unique_consecutive(
    input: Any, return_inverse: bool = False, return_counts: bool = False
) -> Any:
    """The flattened elements without repetitions of neighbours. Source: torch, without `dim`."""
    need_whole("unique_consecutive", input)
    flat = input._data.reshape(-1)
    first = np.concatenate((np.ones(min(flat.size, 1), bool), flat[1:] != flat[:-1]))
    found = [make(flat[first])]
    if return_inverse:
        found.append(make((np.cumsum(first) - 1).reshape(input._data.shape)))
    if return_counts:
        found.append(make(np.diff(np.append(np.flatnonzero(first), flat.size))))
    return found[0] if len(found) == 1 else tuple(found)


# --- counting and placing ------------------------------------------------------------------------


def bincount(input: Any, weights: Any = None, minlength: int = 0) -> Any:
    """How often each value 0..max occurs in a vector, or the sum of its weights. Source: torch."""
    need_whole("bincount", input, weights)
    x = input._data
    if x.ndim != 1 or x.dtype.kind not in "iu" or (x.size and x.min() < 0):
        raise RuntimeError("bincount only supports 1-d non-negative integral inputs.")
    if weights is None:
        return make(np.bincount(x, minlength=minlength))
    counts = np.bincount(x, weights._data, minlength)
    return make(counts.astype(np.float32 if weights._data.dtype == np.float32 else np.float64))


def searchsorted(
    sorted_sequence: Any, values: Any, *, right: bool = False, side: str | None = None
) -> Any:
    """Where values belong in a sorted vector (before equal ones unless `right`).

    Source: torch.searchsorted, for 1-D sequences.
    """
    need_whole("searchsorted", sorted_sequence, values)
    if sorted_sequence.ndim != 1:
        raise NotImplementedError("searchsorted: only 1-D sorted sequences are supported")
    found = np.searchsorted(
        sorted_sequence._data, array_of(values), "right" if right or side == "right" else "left"
    )
    return make(np.asarray(found))


def bucketize(input: Any, boundaries: Any, *, right: bool = False) -> Any:
    """The number of the interval each value falls into. Source: torch.bucketize."""
    return searchsorted(boundaries, input, right=right)


def isin(elements: Any, test_elements: Any, *, invert: bool = False) -> Any:
    """Which elements are among `test_elements`. Source: torch.isin."""
    need_whole("isin", elements, test_elements)
    return make(np.isin(array_of(elements), array_of(test_elements), invert=invert))
