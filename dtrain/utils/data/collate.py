"""From samples to a batch: `default_collate` stacks them, `default_convert` makes tensors only.

Both walk through dicts, tuples, namedtuples and lists and keep their types where these can be made
again. Source: torch.utils.data.default_collate, default_convert.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, MutableMapping, MutableSequence, Sequence
from typing import Any

import numpy as np

from dtrain.dtypes import float64
from dtrain.ops.create import as_tensor, from_numpy, tensor
from dtrain.ops.join import stack
from dtrain.tensor import Tensor

REFUSED = (
    "default_collate: batch must contain tensors, numpy arrays, numbers, dicts or lists; found {}"
)


def default_collate(batch: Sequence[Any]) -> Any:
    """The samples as one: tensors, arrays and numbers get a new first dimension of len(batch).

    Python floats become float64, ints int64; strings and bytes stay a list. A tuple becomes a list
    of its collated fields. TypeError for other types, RuntimeError for lists of unequal length.
    """
    first = batch[0]
    if isinstance(first, Tensor):
        recorded = any(sample._requires_grad for sample in batch)
        return stack(batch) if recorded else _stack_arrays([sample._data for sample in batch])
    if isinstance(first, np.ndarray):
        _refuse_text(first)
        return _stack_arrays(batch)
    if isinstance(first, (np.bool_, np.number)):
        return as_tensor(np.asarray(batch))
    if isinstance(first, float):
        return tensor(batch, dtype=float64)
    if isinstance(first, int):
        return tensor(batch)
    if isinstance(first, (str, bytes)):
        return batch
    if isinstance(first, Mapping):
        return _like(first, {key: default_collate([d[key] for d in batch]) for key in first})
    if isinstance(first, Sequence):
        return _collate_fields(batch, first)
    raise TypeError(REFUSED.format(type(first)))


def _refuse_text(array: np.ndarray) -> None:
    if array.dtype.kind in "SUO":
        raise TypeError(REFUSED.format(array.dtype))


def _stack_arrays(arrays: Sequence[np.ndarray]) -> Any:
    """`stack` of arrays; without the cost of a tensor for each where they are all alike."""
    first = arrays[0]
    if all(a.shape == first.shape and a.dtype == first.dtype for a in arrays):
        return from_numpy(np.stack(arrays))
    return stack([as_tensor(a) for a in arrays])  # promotes, or says what differs


def _collate_fields(batch: Sequence[Any], first: Any) -> Any:
    if any(len(sample) != len(first) for sample in batch):
        raise RuntimeError("each element in list of batch should be of equal size")
    fields = [default_collate(field) for field in zip(*batch, strict=True)]
    plain_tuple = isinstance(first, tuple) and not hasattr(first, "_fields")
    return fields if plain_tuple else _like(first, fields)


def default_convert(data: Any) -> Any:
    """Arrays and NumPy numbers as tensors, through all containers; everything else as it is."""
    if isinstance(data, (Tensor, str, bytes)):
        return data
    if isinstance(data, np.ndarray):
        return data if data.dtype.kind in "SUO" else as_tensor(data)
    if isinstance(data, (np.bool_, np.number)):
        return as_tensor(data)
    if isinstance(data, Mapping):
        return _like(data, {key: default_convert(value) for key, value in data.items()})
    if isinstance(data, Sequence):
        values = [default_convert(value) for value in data]
        plain_tuple = isinstance(data, tuple) and not hasattr(data, "_fields")
        return values if plain_tuple else _like(data, values)
    return data


def _like(original: Any, values: Any) -> Any:
    """`values` in a container of the original's type, or as they are where it cannot be made."""
    make: Callable[[Any], Any] = type(original)
    try:
        if hasattr(original, "_fields"):
            return make(*values)
        if isinstance(original, (MutableMapping, MutableSequence)):
            filled = copy.copy(original)  # keeps what a subclass adds
            for key, value in values.items() if isinstance(values, dict) else enumerate(values):
                filled[key] = value
            return filled
        return make(values)
    except TypeError:
        return values
