"""Tensors without values: what the "meta" device holds.

Owns: `Meta`, a tensor of a shape and a dtype that takes no memory, so that a model can be described
before anybody decides where its parts are to be. Rules: 1. Its array is one zero, seen everywhere
(`ops.create.hollow`); nothing may look at it: what asks for values raises. 2. Operations give the
shape and dtype of their result, changes in place do nothing, no graph is recorded. 3. A parameter
stays the same object when it gets values (`data = `, `Module.to_empty`): it changes its class, and
so modules that share it go on to share it. Source: torch's meta device.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dtrain import dtypes
from dtrain.autograd.dispatch import Whole, broadcast_error
from dtrain.autograd.grad_mode import no_grad
from dtrain.autograd.node import make
from dtrain.autograd.op import Op
from dtrain.autograd.value import PARTS, Value
from dtrain.device import META, device
from dtrain.interop import parse_to
from dtrain.ops.create import hollow, register_meta
from dtrain.tensor import Tensor

NO_DATA = "Cannot copy out of meta tensor; no data!"
ADVICE = (
    "A tensor on the meta device has no values: give it some first, as by "
    'module.to_empty(device="cpu") and reset_parameters(), or load_state_dict(..., assign=True)'
)


class Meta(Tensor):
    """A tensor on the meta device. Made by every factory with `device="meta"`."""

    __slots__ = ()

    is_meta = True

    @property
    def device(self) -> device:
        return META

    def stride(self, dim: int | None = None) -> Any:
        """Steps between neighbours, in elements, were it contiguous."""
        steps = [1]
        for size in reversed(self._data.shape[1:]):
            steps.append(steps[-1] * max(size, 1))
        found = tuple(reversed(steps))[: self.ndim]
        return found if dim is None else found[dim]

    def is_contiguous(self) -> bool:
        return True

    def data_ptr(self) -> int:
        return 0

    def detach(self) -> Any:
        return meta_tensor(self._data)

    @property
    def data(self) -> Any:
        """Itself outside of any graph; setting it gives the tensor values, and takes it off the
        meta device. RuntimeError for another shape.
        """
        return self.detach()

    @data.setter
    def data(self, value: Any) -> None:
        if not isinstance(value, Tensor):
            raise TypeError(f"Variable data has to be a tensor, but got {type(value).__name__}")
        if value.shape != self.shape:
            raise RuntimeError(
                f"a meta tensor of shape {list(self.shape)} was given data of shape "
                f"{list(value.shape)}"
            )
        if not isinstance(value, Meta):
            self.__class__ = _PLAIN[self.__class__]
        Tensor.data.fset(self, value)  # type: ignore[attr-defined]

    # --- what would need values ---

    def _refuse(self, name: str) -> Any:
        raise NotImplementedError(f"{NO_DATA} ({name}, of shape {list(self.shape)}) {ADVICE}")

    def numpy(self, *, force: bool = False) -> Any:
        """TypeError: there is nothing."""
        raise TypeError(
            "can't convert meta device type tensor to numpy. Use Tensor.cpu() to copy the tensor "
            f"to host memory first. {ADVICE}"
        )

    def _no_number(self) -> Any:
        raise RuntimeError(f"Tensor.item() cannot be called on meta tensors. {ADVICE}")

    def item(self) -> Any:
        """RuntimeError: there is nothing."""
        return super().item() if self.numel() != 1 else self._no_number()

    def tolist(self) -> Any:
        """NotImplementedError: there is nothing."""
        return self._refuse("tolist()")

    def __bool__(self) -> bool:
        return super().__bool__() if self.numel() != 1 else self._no_number()

    def _number(self) -> Any:
        return super()._number() if self.numel() != 1 else self._no_number()

    def __index__(self) -> int:
        return super().__index__() if self.numel() != 1 else self._no_number()

    def __contains__(self, element: Any) -> bool:
        return self._no_number()  # type: ignore[no-any-return]

    def __array_wrap__(self, *args: Any, **kwargs: Any) -> Any:
        return self._refuse("a NumPy function")

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._refuse("__dlpack_device__")  # type: ignore[no-any-return]

    def __format__(self, spec: str) -> str:
        return object.__format__(self, spec)

    def __reduce__(self) -> tuple[Any, ...]:
        return self._refuse("pickling, torch.save included")  # type: ignore[no-any-return]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            memo[id(self)] = self._as_leaf(_PLAIN[self.__class__], self._requires_grad)
        return memo[id(self)]

    def __repr__(self) -> str:
        text = f"tensor(..., device='meta', size={tuple(self.shape)}"
        if self.dtype is not dtypes.get_default_dtype():
            text += f", dtype={self.dtype}"
        text += ", requires_grad=True)" if self._requires_grad else ")"
        kind = _PLAIN[self.__class__].__name__
        return text if kind == "Tensor" else f"{kind} containing:\n{text}"

    # --- where it goes ---

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """In another dtype. NotImplementedError for another device."""
        dtype, _, place = parse_to(args, kwargs)
        if place is not None and place.type != "meta":
            self._refuse(f"to({place})")
        if dtype is None or dtype is self.dtype:
            return self
        return meta_tensor(hollow(self._data.shape, dtype.numpy))

    def cpu(self) -> Any:
        """NotImplementedError: there is nothing to copy."""
        return self.to("cpu")

    def _be_data_of(self, target: Tensor) -> None:
        target.__class__ = _combined(_PLAIN.get(target.__class__, target.__class__))
        target._data = self._data

    def _as_leaf(self, cls: type[Any], requires_grad: bool) -> Any:
        """The Parameter or Buffer of this shape and dtype."""
        leaf = meta_tensor(self._data, _combined(cls))
        leaf.requires_grad = requires_grad
        return leaf

    def _adopt(self, value: Any, dtype: Any) -> Any:
        return self._refuse("loading an optimizer's state for a parameter")

    def _put(self, index: Any, value: Any, part: bool) -> None:
        """Nothing: what is written into no memory is gone, as in torch."""

    def _update(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self


# What a meta class becomes when it gets values; each has a row in PARTS from its first tensor on,
# so that programs without meta tensors pay nothing for them.
_PLAIN: dict[type, type[Any]] = {}
_classes: dict[type, type[Meta]] = {}


def _combined(cls: type[Any]) -> type[Any]:
    """The class that is both `cls`, such as Parameter or Buffer, and Meta."""
    if cls not in _classes:
        made = (
            Meta if cls is Tensor else type(f"Meta{cls.__name__}", (Meta, cls), {"__slots__": ()})
        )
        made = _classes.setdefault(cls, made)  # ranks may be threads
        _PLAIN[made], PARTS[made] = cls, infer
    return _classes[cls]


def meta_tensor(like: np.ndarray, cls: type[Any] | None = None) -> Any:
    """The meta tensor of an array's shape and dtype."""
    self = object.__new__(_combined(Tensor) if cls is None else cls)
    self._data = hollow(like.shape, like.dtype)
    self._node = self._grad = self._version = self._base = None
    self._requires_grad = False
    return self


register_meta(meta_tensor)


# --- shapes and dtypes of results ---------------------------------------------------------------


def infer(op: Op | Whole, inputs: tuple[Any, ...], attrs: dict[str, Any]) -> Any:
    """What `op` makes of tensors of which one at least is on the meta device, without values.

    Of operations element by element the shape is worked out, views cost nothing; others compute
    with stand-ins, and forget. RuntimeError for a tensor with dimensions that has values.
    """
    for value in inputs:
        if isinstance(value, Value) and not isinstance(value, Meta) and value._data.ndim:
            if value.__class__ in PARTS:
                value._refuse(op.name)  # type: ignore[attr-defined]
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"meta and cpu! (in {op.name}) {ADVICE}"
            )
    with no_grad(), np.errstate(all="ignore"):
        result = _element_by_element(op, inputs) if _is_pointwise(op) else None
        if result is None:
            result = op.apply(*[_stand_in(op, v) for v in inputs], **attrs)
    many = isinstance(result, (tuple, list))
    return tuple(_emptied(r) for r in result) if many else _emptied(result)


def _stand_in(op: Any, value: Any) -> Any:
    """What an operation computes with in place of a meta tensor: zeros, which are indices of what
    has elements, and ones where somebody might divide by them.
    """
    if not isinstance(value, Meta):
        return value
    make_array = np.ones if getattr(op, "broadcasts", False) else np.zeros
    if getattr(op, "view", False):
        make_array = hollow
    return make(make_array(value._data.shape, value._data.dtype))


def _emptied(result: Any) -> Any:
    return meta_tensor(result._data) if isinstance(result, Tensor) else result


def _is_pointwise(op: Any) -> bool:
    forward = getattr(op, "forward", None)
    return isinstance(forward, np.ufunc) and forward.signature is None


def _element_by_element(op: Any, inputs: tuple[Any, ...]) -> Any:
    """The result from operands of one element each; the shapes are broadcast beside."""
    arrays = [v._data if isinstance(v, Value) else v for v in inputs]
    shapes = [np.shape(array) for array in arrays]
    try:
        shape = np.broadcast_shapes(*shapes)
    except ValueError as error:
        raise broadcast_error(*arrays[:2], error) from None
    one = op.apply(*[_one(v) for v in inputs])
    return make(hollow(shape, one._data.dtype))


def _one(value: Any) -> Any:
    """An operand with as many dimensions (which count for its dtype), of one element."""
    if not isinstance(value, Value):
        return value
    return make(np.zeros((1,) * value._data.ndim, value._data.dtype))
