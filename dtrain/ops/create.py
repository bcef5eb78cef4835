"""Functions that make tensors: from Python data and NumPy, filled, and ranges.

All take `dtype=` (torch's default if None), `device=` (where tensors are made now, if None) and
`requires_grad=`. On the meta device nothing is computed that costs memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from dtrain import dtypes
from dtrain.autograd.node import make
from dtrain.autograd.value import Value, need_whole
from dtrain.device import on_meta
from dtrain.ops.join import stack

Array = np.ndarray

_meta: Callable[[Array], Any]


def register_meta(maker: Callable[[Array], Any]) -> None:
    """Make meta tensors by `maker`; called once, by `dtrain.meta`."""
    global _meta
    _meta = maker


def hollow(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """An array that has a shape and a dtype and no memory of its own; it cannot be written."""
    return np.broadcast_to(np.zeros((), dtype), shape)


def finish(
    array: Array, device: Any = None, requires_grad: bool = False, beside: Any = None
) -> Any:  # fmt: skip
    """A leaf tensor over `array`, or like it without values, with the options every factory takes.

    `beside`: the tensor whose elements these belong to, if there is one.
    """
    if on_meta(device):
        t = _meta(array)
    else:
        t = make(array) if beside is None else beside._kin(array)
    if requires_grad:
        t.requires_grad = True
    return t


def numpy_dtype(dtype: dtypes.dtype | None) -> np.dtype[Any]:
    """The NumPy dtype of `dtype`, or of the default dtype."""
    return (dtype or dtypes.get_default_dtype()).numpy


def _infer(data: Any, dtype: dtypes.dtype | None = None) -> Array:
    """An array of the dtype torch gives Python data: int64, the default floating one, bool.

    Numbers that are meant for `dtype` stay as exact as NumPy reads them.
    """
    if isinstance(data, (list, tuple)) and _holds_tensors(data):
        data = stack([v if isinstance(v, Value) else make(_infer(v, dtype)) for v in data])
        data = data.numpy(force=True)  # refused by what is only a part
    try:
        array = np.asarray(data)
    except ValueError:
        raise _ragged(data, 0) or ValueError("sequences of unequal length") from None
    if array.dtype == object or array.dtype.kind in "USV":
        raise _not_numbers(data)
    if dtype is not None or isinstance(data, (np.ndarray, np.generic)) or _numpy_numbers(data):
        return array
    if array.dtype == np.float64:
        return array.astype(numpy_dtype(None))
    if array.dtype == np.complex128:
        return array.astype(dtypes.get_default_dtype().to_complex().numpy)
    return array


def _holds_tensors(data: Any) -> bool:
    return any(
        isinstance(v, Value) or (isinstance(v, (list, tuple)) and _holds_tensors(v)) for v in data
    )


def _first(data: Any) -> Any:
    while isinstance(data, (list, tuple)) and data:
        data = data[0]
    return data


def _numpy_numbers(data: Any) -> bool:
    """Whether a list holds NumPy's numbers or arrays, which keep their dtype."""
    return isinstance(_first(data), (np.ndarray, np.generic))


def _not_numbers(data: Any) -> Exception:
    kind = type(_first(data)).__name__
    if kind == "NoneType":
        return RuntimeError("Could not infer dtype of NoneType")
    return TypeError(f"new(): invalid data type '{kind}'")


def _ragged(data: Any, dim: int) -> Exception | None:
    """torch's sentence for lists of different lengths: where the first difference is."""
    parts = [v for v in data if isinstance(v, (list, tuple))]
    if not parts:
        return None
    if len(parts) != len(data):
        return TypeError(f"not a sequence: an element at dim {dim + 1}, where others are")
    for part in parts:
        if len(part) != len(parts[0]):
            return ValueError(
                f"expected sequence of length {len(parts[0])} at dim {dim + 1} (got {len(part)})"
            )
    return next((e for part in parts if (e := _ragged(part, dim + 1)) is not None), None)


def _array_from(data: Any, dtype: dtypes.dtype | None) -> Array:
    need_whole("making a tensor", data)
    array = data._data if isinstance(data, Value) else _infer(data, dtype)
    dtypes.from_numpy(array.dtype if dtype is None else dtype.numpy)
    return array if dtype is None else array.astype(dtype.numpy, copy=False)


def legacy_array(args: tuple[Any, ...], kind: np.dtype[Any]) -> Array:
    """What `Tensor(...)` and `LongTensor(...)` hold: sizes, or data cast to the dtype.

    TypeError for a single float: it is neither.
    """
    if len(args) == 1 and not isinstance(args[0], (int, np.integer)):
        data = args[0]
        if isinstance(data, Value):
            need_whole("making a tensor", data)
            return data._data.astype(kind, copy=False)  # type: ignore[no-any-return]
        if isinstance(data, tuple) and hasattr(data, "numel"):  # a Size
            return np.empty(data, kind)
        if not isinstance(data, (list, tuple, range, np.ndarray)):
            raise TypeError(f"new(): data must be a sequence (got {type(data).__name__})")
        return _array_from(data, None).astype(kind)
    return np.empty(shape_of(args) if args else (0,), kind)


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
        only: Any = size[0]
        size = (int(only._data),) if isinstance(only, Value) else tuple(only)
    shape = tuple([int(n) for n in size])
    if any(n < 0 for n in shape):
        raise RuntimeError(f"Dimension size must be non-negative, got {list(shape)}.")
    return shape


def _filled(name: str, fill: Callable[..., Array]) -> tuple[Callable[..., Any], ...]:
    """The factory `name(*size)`, and its `_like` and `new_` forms."""

    def factory(
        *sizes: Any, size: Any = None, dtype: dtypes.dtype | None = None, device: Any = None,
        requires_grad: bool = False,
    ) -> Any:  # fmt: skip
        size = sizes if size is None else size
        found = hollow if on_meta(device) else fill
        return finish(found(shape_of(size), numpy_dtype(dtype)), device, requires_grad)

    def like(
        input: Any, *, dtype: dtypes.dtype | None = None, device: Any = None,
        requires_grad: bool = False,
    ) -> Any:  # fmt: skip
        device = input.device if device is None else device
        kind = input._data.dtype if dtype is None else dtype.numpy
        found = hollow if on_meta(device) else fill
        return finish(found(input._data.shape, kind), device, requires_grad, input)

    def new(
        self: Any, *size: Any, dtype: dtypes.dtype | None = None, device: Any = None,
        requires_grad: bool = False,
    ) -> Any:  # fmt: skip
        device = self.device if device is None else device
        kind = self._data.dtype if dtype is None else dtype.numpy
        found = hollow if on_meta(device) else fill
        return finish(found(shape_of(size), kind), device, requires_grad)

    for function, called in ((factory, name), (like, f"{name}_like"), (new, f"new_{name}")):
        function.__name__ = function.__qualname__ = called
        function.__doc__ = f"A tensor of the given shape: `{name}`. Source: torch.{called}."
    return factory, like, new


zeros, zeros_like, new_zeros = _filled("zeros", np.zeros)
ones, ones_like, new_ones = _filled("ones", np.ones)
empty, empty_like, new_empty = _filled("empty", np.empty)


def number_for(value: Any, dtype: np.dtype[Any]) -> Any:
    """A number to be stored as `dtype`: negative ones wrap around, too large ones are refused."""
    if value.__class__ is not int or dtype.kind not in "iu":
        return value
    top = np.iinfo(dtype).max
    if not -top - 1 <= value <= top:
        raise RuntimeError(f"value cannot be converted to type {dtype.name}_t without overflow")
    return np.asarray(value).astype(dtype)


def full(
    size: Any, fill_value: Any, *, dtype: dtypes.dtype | None = None, device: Any = None,
    requires_grad: bool = False,
) -> Any:  # fmt: skip
    """A tensor filled with one number, of the dtype the number implies. Source: torch.full."""
    if isinstance(fill_value, Value):
        fill_value = fill_value.item()  # type: ignore[attr-defined]
    kind = (dtype or dtypes.scalar_dtype(fill_value)).numpy
    value, shape = number_for(fill_value, kind), shape_of((size,))
    array = hollow(shape, kind) if on_meta(device) else np.full(shape, value, kind)
    return finish(array, device, requires_grad)


def full_like(
    input: Any, fill_value: Any, *, dtype: dtypes.dtype | None = None, device: Any = None,
    requires_grad: bool = False,
) -> Any:  # fmt: skip
    """`full` with the shape and dtype of `input`. Source: torch.full_like."""
    device = input.device if device is None else device
    own = full(input._data.shape, fill_value, dtype=dtype or input.dtype, device=device)
    return finish(own._data, device, requires_grad, input)


def new_full(
    self: Any, size: Any, fill_value: Any, *, dtype: dtypes.dtype | None = None,
    device: Any = None, requires_grad: bool = False,
) -> Any:  # fmt: skip
    """`full` with the dtype of this tensor. Source: torch.Tensor.new_full."""
    device = self.device if device is None else device
    return full(
        size, fill_value, dtype=dtype or self.dtype, device=device, requires_grad=requires_grad
    )


def new_tensor(
    self: Any, data: Any, *, dtype: dtypes.dtype | None = None, device: Any = None,
    requires_grad: bool = False,
) -> Any:  # fmt: skip
    """`tensor(data)` with the dtype of this tensor. Source: torch.Tensor.new_tensor."""
    device = self.device if device is None else device
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
    start, end, step = (v._data.item() if isinstance(v, Value) else v for v in (start, end, step))
    if step == 0:
        raise RuntimeError("step must be nonzero")
    if (end - start) * step < 0:
        raise RuntimeError("upper bound and lower bound inconsistent with step sign")
    whole = all(isinstance(v, (int, np.integer)) for v in (start, end, step))
    if dtype is None:
        dtype = dtypes.int64 if whole else dtypes.get_default_dtype()
    count = -((start - end) // step) if whole else math.ceil((end - start) / step)
    values = start + np.arange(count) * step  # int64 or float64, rounded once
    return finish(values.astype(dtype.numpy, copy=False), device, requires_grad)


def linspace(
    start: float, end: float, steps: int, *, dtype: dtypes.dtype | None = None,
    device: Any = None, requires_grad: bool = False,
) -> Any:  # fmt: skip
    """`steps` numbers from start to end, both included. Source: torch.linspace."""
    if steps < 0:
        raise RuntimeError("number of steps must be non-negative")
    start, end = float(start), float(end)
    kind = numpy_dtype(dtype)
    return finish(_evenly(start, end, steps, kind).astype(kind), device, requires_grad)


def _evenly(start: float, end: float, steps: int, kind: np.dtype[Any]) -> Array:
    """From both ends to the middle, with a step in the dtype itself, as torch computes it."""
    real = kind if kind.kind == "f" else np.dtype(np.float64)
    if steps < 2:
        return np.full(steps, start, real)
    step = real.type((end - start) / (steps - 1))
    count = np.arange(steps)
    rising = real.type(start) + step * count.astype(real)
    falling = real.type(end) - step * (steps - 1 - count).astype(real)
    return np.where(count < steps // 2, rising, falling)


def logspace(
    start: float, end: float, steps: int, base: float = 10.0, *,
    dtype: dtypes.dtype | None = None, device: Any = None, requires_grad: bool = False,
) -> Any:  # fmt: skip
    """base**start ... base**end, `steps` of them. Source: torch.logspace."""
    exponents = np.linspace(float(start), float(end), steps)
    values = np.power(base, exponents).astype(numpy_dtype(dtype))
    return finish(values, device, requires_grad)


def eye(
    n: int, m: int | None = None, *, dtype: dtypes.dtype | None = None, device: Any = None,
    requires_grad: bool = False,
) -> Any:  # fmt: skip
    """The identity matrix (n, m). Source: torch.eye."""
    kind = numpy_dtype(dtype)
    array = (
        hollow((n, n if m is None else m), kind) if on_meta(device) else np.eye(n, m, dtype=kind)
    )
    return finish(array, device, requires_grad)


def is_tensor(obj: Any) -> bool:
    """Whether `obj` is a Tensor. Source: torch.is_tensor."""
    return isinstance(obj, Value)


def scalar_tensor(s: Any, *, dtype: dtypes.dtype | None = None, device: Any = None) -> Any:
    """A 0-d tensor of the default dtype. Source: torch.scalar_tensor."""
    return finish(np.asarray(s, numpy_dtype(dtype)), device)


def meshgrid(*tensors: Any, indexing: str = "ij") -> tuple[Any, ...]:
    """Coordinate grids of 1-D tensors. Source: torch.meshgrid."""
    if len(tensors) == 1 and isinstance(tensors[0], (list, tuple)):
        tensors = tuple(tensors[0])
    if indexing not in ("ij", "xy"):
        raise RuntimeError(
            f"torch.meshgrid: indexing must be one of 'xy' or 'ij', but received: {indexing}"
        )
    need_whole("meshgrid", *tensors)
    order: Any = indexing
    grids = np.meshgrid(*[t._data for t in tensors], indexing=order)
    return tuple(make(np.ascontiguousarray(g)) for g in grids)
