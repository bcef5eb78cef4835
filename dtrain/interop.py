"""A tensor and the rest of Python: NumPy, numbers, printing, copies, pickles, dtypes and devices.

`Interop` is the base of Tensor that holds these methods; none of them but `to` and its kin is
followed by autograd. Memory is shared with NumPy where the method says so. Beside it the state of
the default generator, as a tensor.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np

from dtrain import dtypes, random
from dtrain.autograd.grad_mode import grad_enabled
from dtrain.autograd.node import make
from dtrain.autograd.promotion import cast
from dtrain.autograd.value import Value, array_of
from dtrain.device import device, on_meta
from dtrain.ops.create import finish, hollow
from dtrain.ops.join import unbind
from dtrain.ops.order import clone
from dtrain.printing import tensor_repr


class Interop(Value):
    """The methods of Tensor that lead out of it. Source: torch.Tensor."""

    __slots__ = ()
    __array_priority__ = 1000  # ndarray + Tensor is decided by the Tensor

    # --- NumPy and Python ---

    def numpy(self, *, force: bool = False) -> np.ndarray:
        """The array itself, sharing memory.

        RuntimeError when it requires grad, unless `force` or nothing is being recorded.
        """
        if not force and self._wants_grad() and grad_enabled.get():
            raise RuntimeError(
                "Can't call numpy() on Tensor that requires grad. Use tensor.detach().numpy() "
                "instead."
            )
        return self._data  # type: ignore[no-any-return]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = self.numpy()
        if copy:
            return array.astype(dtype or array.dtype)
        return array if dtype is None else array.astype(dtype, copy=False)

    def __array_wrap__(
        self, array: np.ndarray, context: Any = None, return_scalar: bool = False
    ) -> Any:
        """NumPy's functions of a tensor (`np.exp(t)`) give a tensor."""
        return make(array)

    def __dlpack__(self, **kwargs: Any) -> Any:
        return self.numpy().__dlpack__(**kwargs)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._data.__dlpack_device__()  # type: ignore[no-any-return]

    def item(self) -> Any:
        """The one element as a Python number."""
        if self._data.size != 1:
            raise RuntimeError(
                f"a Tensor with {self._data.size} elements cannot be converted to Scalar"
            )
        return self._data.item()

    def tolist(self) -> Any:
        """Nested lists of Python numbers (a number for a 0-d tensor)."""
        return self._data.tolist()

    def __bool__(self) -> bool:
        if self._data.size != 1:
            what = "more than one value" if self._data.size else "no values"
            raise RuntimeError(f"Boolean value of Tensor with {what} is ambiguous")
        return bool(self._data.item())

    def _number(self) -> Any:
        if self._data.size != 1:
            raise ValueError("only one element tensors can be converted to Python scalars")
        return self._data.item()

    def __float__(self) -> float:
        return float(self._number())

    def __int__(self) -> int:
        return int(self._number())

    def __complex__(self) -> complex:
        return complex(self._number())

    def __index__(self) -> int:
        if self._data.size != 1 or self._data.dtype.kind not in "iub":
            raise TypeError("only integer tensors of a single element can be converted to an index")
        return int(self._data.item())

    def __len__(self) -> int:
        if not self._data.ndim:
            raise TypeError("len() of a 0-d tensor")
        return len(self._data)

    def __iter__(self) -> Iterator[Any]:
        if not self._data.ndim:
            raise TypeError("iteration over a 0-d tensor")
        return iter(unbind(self, 0))

    def __contains__(self, element: Any) -> bool:
        if not isinstance(element, (Value, int, float, complex)):
            raise RuntimeError(
                "Tensor.__contains__ only supports Tensor or scalar, but you passed in a "
                f"{type(element)}."
            )
        return bool(np.any(self._data == array_of(element)))

    def __repr__(self) -> str:
        return tensor_repr(self)

    def __format__(self, spec: str) -> str:
        """A 0-d tensor is formatted as its number, as in `f"{loss:.3f}"` or `f"{loss}"`."""
        if self._data.ndim:
            return object.__format__(self, spec)
        return format(self._data.item(), spec)

    __hash__ = object.__hash__

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if self._node is not None:
            raise RuntimeError(
                "Only Tensors created explicitly by the user (graph leaves) support the deepcopy "
                "protocol at the moment. If you were attempting to deepcopy a module, this may be "
                "because of a tensor attribute that was computed; detach() it first."
            )
        if id(self) in memo:
            return memo[id(self)]
        other = object.__new__(type(self))
        other._data = self._data.copy()
        other._node = other._version = other._base = None
        other._requires_grad = self._requires_grad
        other._grad = None if self._grad is None else self._grad.__deepcopy__(memo)
        memo[id(self)] = other
        for name, value in self.__dict__.items():  # the user's; what begins with _ is ours
            if not name.startswith("_"):
                setattr(other, name, copy.deepcopy(value, memo))
        return other

    def __reduce__(self) -> tuple[Any, ...]:
        """Values and `requires_grad`; the graph and `.grad` stay behind."""
        return rebuild, (type(self), self._data, self._requires_grad)

    # --- dtype and device ---

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """In another dtype, or without values on the meta device. Source: torch.Tensor.to."""
        dtype, copy, place = parse_to(args, kwargs)
        if place is not None and on_meta(place):
            shape = tuple(self.shape)  # type: ignore[attr-defined]  # of the whole, if it is a part
            kind = self._data.dtype if dtype is None else dtype.numpy
            return finish(hollow(shape, kind), place)
        if dtype is not None and dtype is not dtypes.from_numpy(self._data.dtype):
            return cast(self, dtype=dtype)
        return clone(self) if copy else self

    def type(self, dtype: Any = None) -> Any:
        """The name of the type, or the tensor in another dtype.

        `dtype` is one, or a legacy class such as LongTensor, or its name. Source: torch.
        """
        if dtype is None:
            return f"dtrain.{dtypes.from_numpy(self._data.dtype).scalar_type}Tensor"
        return self.to(dtype_named(dtype))

    def type_as(self, other: Value) -> Any:
        return self.to(other.dtype)  # type: ignore[attr-defined]

    def cpu(self) -> Any:
        return self

    def cuda(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError(
            "Torch not compiled with CUDA enabled: dtrain runs on the CPU; leave out .cuda()"
        )

    def pin_memory(self) -> Any:
        """The tensor itself: there is no device to copy to."""
        return self


def rebuild(cls: type[Any], data: np.ndarray, requires_grad: bool) -> Any:
    """A tensor from its pickled parts."""
    self = object.__new__(cls)
    self._data = data
    self._node = self._grad = self._version = self._base = None
    self._requires_grad = requires_grad
    return self


def parse_to(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[dtypes.dtype | None, bool, device | None]:
    """The dtype (or None), `copy` and device (or None) that arguments of `.to()` ask for."""
    dtype, copy, place = kwargs.get("dtype"), kwargs.get("copy", False), None
    for arg in (*args, kwargs.get("device"), kwargs.get("other")):
        if isinstance(arg, dtypes.dtype):
            dtype = arg
        elif isinstance(arg, Value):
            dtype, place = arg.dtype, arg.device  # type: ignore[attr-defined]
        elif isinstance(arg, (str, device)) or (isinstance(arg, int) and not isinstance(arg, bool)):
            place = device(arg)  # raises for what is none
    return dtype, copy, place


def dtype_named(kind: Any) -> dtypes.dtype:
    """The dtype meant by a dtype, a legacy class or a name like "torch.FloatTensor"."""
    if isinstance(kind, dtypes.dtype):
        return kind
    found = getattr(kind, "dtype", None)
    if isinstance(found, dtypes.dtype):
        return found
    name = str(kind).rpartition(".")[2].removesuffix("Tensor")
    for dtype in dtypes.BY_NAME.values():
        if dtype.scalar_type == name:
            return dtype
    raise ValueError(f"invalid type: {str(kind)!r}")


def get_rng_state() -> Any:
    """The state of the default generator, a uint8 Tensor of 5056 bytes, as torch lays it out."""
    return make(random.get_rng_state())


def set_rng_state(new_state: Any) -> None:
    """Go on from a state of `get_rng_state`, here or in PyTorch: a uint8 Tensor, array, or bytes.

    TypeError unless uint8 or bytes; RuntimeError on a wrong size or an impossible state.
    """
    random.set_rng_state(array_of(new_state))
