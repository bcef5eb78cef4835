"""Functions that make tensors: from Python data and NumPy, filled, and ranges.

All take `dtype=` (torch's default if None), `device=` (the CPU) and `requires_grad=`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from dtrain import dtypes
from dtrain.autograd.node import make
from dtrain.autograd.value import Value
from dtrain.device import device as Device
from dtrain.ops.join import stack

Array = np.ndarray


def finish(array: Array, device: Any = None, requires_grad: bool = False) -> Any:
    """A leaf tensor over `array`, with the options every factory takes."""
    if device is not None and not isinstance(device, Device):
        Device(device)  # raises for anything but the CPU
    t = make(array)
    if requires_grad:
        t.requires_grad = True  # type: ignore[attr-defined]
    return t


def numpy_dtype(dtype: dtypes.dtype | None) -> np.dtype[Any]:
    """The NumPy dtype of `dtype`, or of the default dtype."""
    return (dtype or dtypes.get_default_dtype()).numpy


def _infer(data: Any, dtype: dtypes.dtype | None = None) -> Array:
    """An array of the dtype torch gives Python data: int64, the default floating one, bool.

    Numbers that are meant for `dtype` stay as exact as NumPy reads them.
    """
    if isinstance(data, (list, tuple)) and any(isinstance(v, Value) for v in data):
        parts = [v if isinstance(v, Value) else make(_infer(v, dtype)) for v in data]
        return stack(parts)._data  # type: ignore[no-any-return]
    array = np.asarray(data)
    if isinstance(data, (np.ndarray, np.generic)):
        return array
    if dtype is not None and array.dtype.kind in "biufc":
        return array
    if array.dtype == np.float64:
        return array.astype(numpy_dtype(None))
    if array.dtype == np.complex128:
        return array.astype(dtypes.get_default_dtype().to_complex().numpy)
    if array.dtype == object or array.dtype.kind in "USV":
        raise TypeError(f"new(): invalid data type '{type(_first(data)).__name__}'")
    return array


def _first(data: Any) -> Any:
    while isinstance(data, (list, tuple)) and data:
        data = data[0]
    return data


def _array_from(data: Any, dtype: dtypes.dtype | None) -> Array:
    if isinstance(data, Value):
        array = data._data
    else:
        try:
            array = _infer(data, dtype)
        except ValueError as error:
            raise ValueError(
                f"expected sequences of equal length at each dimension: {error}"
            ) from None
    dtypes.from_numpy(array.dtype if dtype is None else dtype.numpy)
    return array if dtype is None else array.astype(dtype.numpy, copy=False)  # type: ignore[no-any-return]


def tensor(
    data: Any, *, dtype: dtypes.dtype | None = None, device: Any = None,
    requires_grad: bool = False, pin_memory: bool = False,
) -> Any:  # fmt: skip
    """A new leaf with a copy of `data` (numbers, nested lists, arrays, tensors).

    `pin_memory` is accepted and changes nothing. Source: torch.tensor.
    """
    return finish(np.array(_array_from(data, dtype)), device, requires_grad)


def as_tensor(data: Any, dtype: dtypes.dtype | None = None, device: Any = None) -> Any:
    """`data` as a tensor, sharing memory where it can. Source: torch.as_tensor."""
    if isinstance(data, Value):
        return data.to(device, dtype=dtype)  # type: ignore[attr-defined]
    return finish(_array_from(data, dtype), device)


def from_numpy(ndarray: Array) -> Any:
    """A tensor that shares the array's memory. Source: torch.from_numpy."""
    if not isinstance(ndarray, np.ndarray):
        raise TypeError(f"expected np.ndarray (got {type(ndarray).__name__})")
    dtypes.from_numpy(ndarray.dtype)
    return make(ndarray)


def shape_of(size: tuple[Any, ...]) -> tuple[int, ...]:
    """Sizes given one by one or as one sequence, checked."""
    if len(size) == 1 and not isinstance(size[0], (int, np.integer)):
        size = tuple(size[0]) if not isinstance(size[0], Value) else (int(size[0]),)  # type: ignore[call-overload]
    shape = tuple([int(n) for n in size])
    if any(n < 0 for n in shape):
        raise RuntimeError(
            f"Trying to create tensor with negative dimension {min(shape)}: {list(shape)}"
        )
    return shape


def _filled(name: str, fill: Callable[..., Array]) -> tuple[Callable[..., Any], ...]:
    """The factory `name(*size)`, and its `_like` and `new_` forms."""

    def factory(
        *size: Any, dtype: dtypes.dtype | None = None, device: Any = None,
        requires_grad: bool = False,
    ) -> Any:  # fmt: skip
        return finish(fill(shape_of(size), numpy_dtype(dtype)), device, requires_grad)

    def like(
        input: Any, *, dtype: dtypes.dtype | None = None, device: Any = None,
        requires_grad: bool = False,
    ) -> Any:  # fmt: skip
        kind = input._data.dtype if dtype is None else dtype.numpy
        return finish(fill(input._data.shape, kind), device, requires_grad)

    def new(
        self: Any, *size: Any, dtype: dtypes.dtype | None = None, device: Any = None,
        requires_grad: bool = False,
    ) -> Any:  # fmt: skip
        kind = self._data.dtype if dtype is None else dtype.numpy
        return finish(fill(shape_of(size), kind), device, requires_grad)

    for function, called in ((factory, name), (like, f"{name}_like"), (new, f"new_{name}")):
        function.__name__ = function.__qualname__ = called
        function.__doc__ = f"A tensor of the given shape: `{name}`. Source: torch.{called}."
    return factory, like, new


zeros, zeros_like, new_zeros = _filled("zeros", np.zeros)
ones, ones_like, new_ones = _filled("ones", np.ones)
empty, empty_like, new_empty = _filled("empty", np.empty)


def full(
    size: Any, fill_value: Any, *, dtype: dtypes.dtype | None = None, device: Any = None,
    requires_grad: bool = False,
) -> Any:  # fmt: skip
    """A tensor filled with one number, of the dtype the number implies. Source: torch.full."""
    kind = dtype or dtypes.scalar_dtype(fill_value)
    return finish(np.full(shape_of((size,)), fill_value, kind.numpy), device, requires_grad)


def full_like(
    input: Any, fill_value: Any, *, dtype: dtypes.dtype | None = None, device: Any = None,
    requires_grad: bool = False,
) -> Any:  # fmt: skip
    """`full` with the shape and dtype of `input`. Source: torch.full_like."""
    return full(
        input.shape, fill_value, dtype=dtype or input.dtype, device=device,
        requires_grad=requires_grad,
    )  # fmt: skip


def new_full(
    self: Any, size: Any, fill_value: Any, *, dtype: dtypes.dtype | None = None,
    device: Any = None, requires_grad: bool = False,
) -> Any:  # fmt: skip
    """`full` with the dtype of this tensor. Source: torch.Tensor.new_full."""
    return full(
        size, fill_value, dtype=dtype or self.dtype, device=device, requires_grad=requires_grad
    )


def new_tensor(
    self: Any, data: Any, *, dtype: dtypes.dtype | None = None, device: Any = None,
    requires_grad: bool = False,
) -> Any:  # fmt: skip
    """`tensor(data)` with the dtype of this tensor. Source: torch.Tensor.new_tensor."""
    return tensor(data, dtype=dtype or self.dtype, device=device, requires_grad=requires_grad)


def arange(
    start: Any, end: Any = None, step: Any = 1, *, dtype: dtypes.dtype | None = None,
    device: Any = None, requires_grad: bool = False,
) -> Any:  # fmt: skip
    """start, start + step, ... below `end`; int64 unless a number is floating.

    Source: torch.arange.
    """
    if end is None:
        start, end = 0, start
    start, end, step = (v.item() if isinstance(v, Value) else v for v in (start, end, step))  # type: ignore[attr-defined]
    if step == 0:
        raise RuntimeError("step must be nonzero")
    if (end - start) * step < 0:
        raise RuntimeError("upper bound and lower bound inconsistent with step sign")
    if dtype is None:
        whole = all(isinstance(v, (int, np.integer)) for v in (start, end, step))
        dtype = dtypes.int64 if whole else dtypes.get_default_dtype()
    count = math.ceil((end - start) / step)
    values = start + np.arange(count) * step  # float64 or int64, rounded once
    return finish(values.astype(dtype.numpy), device, requires_grad)


def linspace(
    start: float, end: float, steps: int, *, dtype: dtypes.dtype | None = None,
    device: Any = None, requires_grad: bool = False,
) -> Any:  # fmt: skip
    """`steps` numbers from start to end, both included. Source: torch.linspace."""
    values = np.linspace(start, end, steps).astype(numpy_dtype(dtype))
    return finish(values, device, requires_grad)


def eye(
    n: int, m: int | None = None, *, dtype: dtypes.dtype | None = None, device: Any = None,
    requires_grad: bool = False,
) -> Any:  # fmt: skip
    """The identity matrix (n, m). Source: torch.eye."""
    return finish(np.eye(n, m, dtype=numpy_dtype(dtype)), device, requires_grad)


def meshgrid(*tensors: Any, indexing: str = "ij") -> tuple[Any, ...]:
    """Coordinate grids of 1-D tensors. Source: torch.meshgrid."""
    if len(tensors) == 1 and isinstance(tensors[0], (list, tuple)):
        tensors = tuple(tensors[0])
    if indexing not in ("ij", "xy"):
        raise RuntimeError(
            f"torch.meshgrid: indexing must be one of 'xy' or 'ij', but received: {indexing}"
        )
    grids = np.meshgrid(*[t._data for t in tensors], indexing=indexing)  # type: ignore[call-overload]
    return tuple(make(np.ascontiguousarray(g)) for g in grids)
