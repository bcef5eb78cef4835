"""Changes in place, and what they do to the graph.

Rules:
1. An in-place op is the out-of-place op, its result written into the old memory, the version
   counted up and the tensor's place in the graph moved to the new node.
2. When the tensor is a view, its base moves: the base's new node puts the view's value into the
   old base. The view and its sisters then find their own place again from the base, the next time
   they are used (`refresh_view`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from dtrain import dtypes
from dtrain.autograd.grad_mode import grad_enabled
from dtrain.autograd.handle import HookTable
from dtrain.autograd.node import make
from dtrain.autograd.op import OPS, record
from dtrain.autograd.promotion import cast
from dtrain.autograd.value import PARTS, Value, Version, need_whole
from dtrain.ops.create import number_for
from dtrain.ops.index import Index, getitem, index_error, index_put, split_index
from dtrain.ops.shape import reshape


def bump(tensor: Value) -> None:
    """Count one change of the tensor's memory."""
    if tensor._version is None:
        tensor._version = Version()
    tensor._version.count += 1


def _recording(tensor: Value, others: tuple[Any, ...]) -> bool:
    """Whether a change of `tensor` belongs to a graph; raises where it may not be made."""
    if not grad_enabled.get():
        return False
    base = tensor._base
    if base is not None and base._requires_grad:
        if base._node is None:
            check_writable(tensor)
        if tensor._made_quietly:
            raise RuntimeError(
                "A view was created in no_grad mode and is being modified inplace with grad mode "
                "enabled. Given that this use case is ambiguous and error-prone, it is forbidden. "
                "You can clarify your code by moving both the view and the inplace either both "
                "inside the no_grad block (if you don't want the inplace to be tracked) or both "
                "outside (if you want the inplace to be tracked)."
            )
    return any(isinstance(v, Value) and v._wants_grad() for v in (tensor, *others))


def check_writable(tensor: Value, part: bool = False) -> None:
    """Refuse what autograd could not follow; torch's sentences. `part`: only some elements."""
    base = tensor._base
    leaf = tensor._requires_grad and tensor._node is None
    if leaf and base is None and not part:
        raise RuntimeError(
            "a leaf Variable that requires grad is being used in an in-place operation. "
            "Use no_grad() to change parameters."
        )
    if leaf or (base is not None and base._requires_grad and base._node is None):
        raise RuntimeError(
            "a view of a leaf Variable that requires grad is being used in an in-place operation. "
            "Use no_grad() to change parameters."
        )
    if tensor._one_of_many:
        raise RuntimeError(
            f"Output 0 of {tensor._one_of_many} is a view and is being modified inplace. This view "
            "is the output of a function that returns multiple views. Such functions do not allow "
            "the output views to be modified inplace. You should replace the inplace operation by "
            "an out-of-place one."
        )


def write(tensor: Value, data: Any) -> None:
    """Copy `data` into the tensor's memory; RuntimeError where dtype or shape do not fit."""
    target = tensor._data
    source = dtypes.from_numpy(data.dtype)
    if not dtypes.can_cast(source, dtypes.from_numpy(target.dtype)):
        raise RuntimeError(
            f"result type {source.scalar_type} can't be cast to the desired output type "
            f"{dtypes.from_numpy(target.dtype).scalar_type}"
        )
    if data.shape != target.shape:
        raise RuntimeError(
            f"output with shape {list(target.shape)} doesn't match the broadcast shape "
            f"{list(data.shape)}"
        )
    if not target.flags.writeable:
        raise read_only()
    np.copyto(target, data, casting="unsafe")
    bump(tensor)


def read_only() -> RuntimeError:
    """torch's error for writing into an expanded tensor; ours may also be somebody's constant."""
    return RuntimeError(
        "unsupported operation: more than one element of the written-to tensor refers to a single "
        "memory location. Please clone() the tensor before performing the operation. (Or its "
        "memory came read-only from NumPy.)"
    )


_UFUNCS = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.true_divide}


def _directly(tensor: Value, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Arithmetic of floats of one dtype is done in the memory itself: one pass instead of two."""
    ufunc = _UFUNCS.get(op.name) if op is not None else None
    x = tensor._data
    if ufunc is None or kwargs or len(args) != 1 or x.dtype.kind != "f" or not x.flags.writeable:
        return False
    other = args[0]
    if isinstance(other, Value):
        other = other._data
        if other.dtype != x.dtype or (other.shape != x.shape and other.size != 1):
            return False
    if not isinstance(other, (int, float, np.ndarray)) or np.ndim(other) > x.ndim:
        return False
    ufunc(x, other, out=x)
    bump(tensor)
    return True


def update(tensor: Value, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`function(tensor, ...)` written into `tensor`, which is returned."""
    if PARTS and tensor.__class__ in PARTS:
        return tensor._update(function, args, kwargs)  # type: ignore[attr-defined]
    need_whole("a change in place of a plain tensor", *args, *kwargs.values())
    op = getattr(function, "op", None)
    if not _recording(tensor, args):
        if not _directly(tensor, op, args, kwargs):
            write(tensor, function(tensor, *args, **kwargs)._data)
        return tensor
    check_writable(tensor)
    if tensor._base is not None:
        tensor._refresh_view()
    old = make(tensor._data, tensor._node)
    if op is None or 0 in op.keep:
        old._data = tensor._data.copy()  # the rule wants the value that is about to go
    result = function(old, *args, **kwargs)
    write(tensor, result._data)
    move(tensor, result)
    return tensor


def put(tensor: Value, index: Any, value: Any, *, part: bool = True) -> None:
    """`tensor[index] = value`; `part` is False when the index means all of it."""
    if PARTS and tensor.__class__ in PARTS:
        tensor._put(index, value, part)  # type: ignore[attr-defined]
        return
    need_whole("assignment to a plain tensor", value)
    first, then = split_index(index)
    if first and then:  # the ints and slices choose a view, the index arrays write into it
        tensor, first = getitem(tensor, first), ()
    plain = then or first
    if not isinstance(value, (Value, np.ndarray)):
        value = number_for(value, tensor._data.dtype)
    recording = _recording(tensor, (value,))
    if recording:
        check_writable(tensor, part)
    _assign(tensor._data, plain, value._data if isinstance(value, Value) else value)
    bump(tensor)
    if recording:
        _record_put(tensor, plain, value)


def _assign(target: np.ndarray, index: Index, array: Any) -> None:
    if not target.flags.writeable:
        raise read_only()
    try:
        target[index] = array
    except IndexError as error:
        raise index_error(target, index, error) from None
    except ValueError:
        have, want = list(np.shape(array)), list(target[index].shape)
        raise RuntimeError(
            f"shape mismatch: value tensor of shape {have} cannot be broadcast to indexing result "
            f"of shape {want}"
        ) from None


def _record_put(tensor: Value, index: Index, value: Any) -> None:
    """Move the tensor to a node that stands for the writing that has just been done."""
    if tensor._base is not None:
        tensor._refresh_view()
    data = tensor._data
    old, result = make(data, tensor._node), make(data)
    boxed = value if isinstance(value, Value) else make(np.asarray(value, data.dtype))
    boxed = cast(boxed, dtype=dtypes.from_numpy(data.dtype))
    selected = data[index].ndim
    if boxed._data.ndim > selected:  # leading dimensions of size 1, which assignment drops
        boxed = boxed.reshape(boxed._data.shape[boxed._data.ndim - selected :])
    index = tuple(part.copy() if isinstance(part, np.ndarray) else part for part in index)
    node = record(OPS["index_put"], (old, boxed), result, {"index": index})
    node.shapes = (data.shape, boxed._data.shape)
    move(tensor, result)


def move(tensor: Value, result: Value) -> None:
    """Give `tensor` (or its base) the place in the graph that `result` has."""
    base = tensor._base
    if base is None:
        _keep_retained(tensor._node, result._node)
        tensor._node, tensor._requires_grad = result._node, result._requires_grad
        if tensor._version is not None:
            tensor._version.regraphed = tensor._version.count
        return
    places = positions(tensor, base)
    flat = reshape(make(base._data, base._node), (-1,))
    values = reshape(result, (-1,))
    whole = reshape(index_put(flat, values, index=(places.reshape(-1),)), base._data.shape)
    _keep_retained(base._node, whole._node)
    base._node, base._requires_grad = whole._node, True
    base._version.regraphed = base._version.count
    refresh_view(tensor)


def _keep_retained(before: Any, after: Any) -> None:
    """`retain_grad` asks for the gradient of the tensor as it is now: its hook moves along."""
    hook = before.hooks.pop(HookTable.LAST, None) if before is not None and before.hooks else None
    if hook is not None:
        after.hooks = HookTable()
        after.hooks[HookTable.LAST] = hook


def refresh_view(view: Value) -> None:
    """Let a view follow its base after the base's graph moved."""
    version, base = view._version, view._base
    if version is None or version.regraphed <= view._view_count:
        return
    view._view_count = version.count
    if not base._requires_grad:
        return
    places = positions(view, base)
    mode = grad_enabled.set(True)  # the place in the graph does not depend on who looks
    try:
        flat = reshape(make(base._data, base._node), (-1,))
        seen = getitem(flat, (places,))
    finally:
        grad_enabled.reset(mode)
    view._node, view._requires_grad = seen._node, True


def positions(view: Value, base: Value) -> np.ndarray:
    """For each element of `view`, its row-major position in `base` (int64)."""
    v, b = view._data, base._data
    low, high = np.lib.array_utils.byte_bounds(b)
    cells = np.full((high - low) // b.itemsize, -1, np.int64)
    _lay(cells, b, low)[...] = np.arange(b.size).reshape(b.shape)
    return _lay(cells, v, low).copy()


def _lay(cells: np.ndarray, array: np.ndarray, low: int) -> np.ndarray:
    """`cells` seen through the strides and offset of `array`."""
    offset = (array.__array_interface__["data"][0] - low) // array.itemsize
    strides = [s // array.itemsize * cells.itemsize for s in array.strides]
    return np.lib.stride_tricks.as_strided(cells[offset:], array.shape, strides)
