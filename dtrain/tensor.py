"""Class Tensor: an array with a place in the graph. Its methods are calls into `dtrain.ops`.

Owns: the class, conversion to and from Python and NumPy, hooks, and the table of which op is
which method. Arithmetic lives in `ops`, the rules of in-place changes in `autograd/inplace.py`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from dtrain import dtypes
from dtrain.autograd import engine
from dtrain.autograd.handle import HookTable, RemovableHandle
from dtrain.autograd.node import make, register_tensor_class
from dtrain.autograd.promotion import cast
from dtrain.autograd.value import Value, Version
from dtrain.device import device
from dtrain.ops import index as ix, shape as sh
from dtrain.ops.join import unbind
from dtrain.ops.order import clone
from dtrain.ops.inplace import bump, put, refresh_view, update, write
from dtrain.printing import tensor_repr

_CPU = device("cpu")


class Size(tuple[int, ...]):
    """A shape: a tuple of ints with `numel()`. Source: torch.Size."""

    __slots__ = ()

    def numel(self) -> int:
        n = 1
        for size in self:
            n *= size
        return n

    def __repr__(self) -> str:
        return f"dtrain.Size({list(self)})"


class Tensor(Value):
    """A multi-dimensional array that autograd can follow. Source: torch.Tensor.

    Made by `dtrain.tensor`, `zeros`, `randn` ...; `Tensor(sizes)` or `Tensor(list)` gives the
    default dtype, as in torch. Memory is a NumPy array: `numpy()` and `from_numpy` share it.
    """

    __slots__ = ()
    __array_priority__ = 1000  # ndarray + Tensor is decided by the Tensor

    def __new__(cls, *args: Any, requires_grad: bool = False) -> Any:
        self = object.__new__(cls)
        dtype = dtypes.get_default_dtype().numpy
        if len(args) == 1 and not isinstance(args[0], int):
            source = args[0]._data if isinstance(args[0], Value) else args[0]
            self._data = np.asarray(source, dtype)
        else:
            self._data = np.empty(args or (0,), dtype)
        self._node = self._grad = self._version = self._base = None
        self._requires_grad = requires_grad
        return self

    # --- what it is ---

    @property
    def shape(self) -> Size:
        return Size(self._data.shape)

    def size(self, dim: int | None = None) -> Any:
        """The shape, or the size of one dimension."""
        if dim is None:
            return Size(self._data.shape)
        return self._data.shape[sh.axis_of(dim, self._data.ndim)]

    @property
    def ndim(self) -> int:
        return self._data.ndim  # type: ignore[no-any-return]

    def dim(self) -> int:
        return self._data.ndim  # type: ignore[no-any-return]

    @property
    def dtype(self) -> dtypes.dtype:
        return dtypes.DTYPE_OF[self._data.dtype]

    @property
    def device(self) -> device:
        return _CPU

    @property
    def is_leaf(self) -> bool:
        """True when no recorded op made it."""
        return self._node is None

    @property
    def grad_fn(self) -> Any:
        """The Node that made it, or None for a leaf."""
        if self._base is not None:
            self._refresh_view()
        return self._node

    @property
    def _is_view(self) -> bool:
        return self._base is not None

    def numel(self) -> int:
        return self._data.size  # type: ignore[no-any-return]

    nelement = numel

    def element_size(self) -> int:
        """Bytes per element."""
        return self._data.itemsize  # type: ignore[no-any-return]

    @property
    def nbytes(self) -> int:
        return self._data.nbytes  # type: ignore[no-any-return]

    def stride(self, dim: int | None = None) -> Any:
        """Steps between neighbours, in elements."""
        steps = tuple(s // self._data.itemsize for s in self._data.strides)
        return steps if dim is None else steps[sh.axis_of(dim, self._data.ndim)]

    def is_contiguous(self) -> bool:
        return self._data.flags.c_contiguous  # type: ignore[no-any-return]

    def data_ptr(self) -> int:
        """The address of the first element."""
        return self._data.ctypes.data  # type: ignore[no-any-return]

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def is_complex(self) -> bool:
        return self.dtype.is_complex

    is_cuda = False
    is_sparse = False
    is_meta = False
    layout = "strided"

    # --- gradients ---

    @property
    def requires_grad(self) -> bool:
        return self._requires_grad

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        if self._node is not None:
            if not value:
                raise RuntimeError(
                    "you can only change requires_grad flags of leaf variables. If you want to use "
                    "a computed variable in a subgraph that doesn't require differentiation use "
                    "var_no_grad = var.detach()."
                )
            return
        if value and self._data.dtype.kind in "iub":
            raise RuntimeError(
                "only Tensors of floating point and complex dtype can require gradients"
            )
        self._requires_grad = bool(value)

    def requires_grad_(self, requires_grad: bool = True) -> Tensor:
        """Set `requires_grad` and return the tensor itself."""
        self.requires_grad = requires_grad
        return self

    @property
    def grad(self) -> Any:
        """The gradient accumulated by `backward`, of this shape and dtype, or None."""
        return self._grad

    @grad.setter
    def grad(self, value: Any) -> None:
        if value is not None:
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"assigned grad expected to be a Tensor or None but got grad of type {type(value)}"
                )
            if value._data.shape != self._data.shape:
                raise RuntimeError(
                    f"assigned grad has data of a different size: {list(value._data.shape)}, "
                    f"expected {list(self._data.shape)}"
                )
            if value._data.dtype != self._data.dtype:
                raise RuntimeError(
                    f"attempting to assign a gradient with dtype {value.dtype} to a tensor with "
                    f"dtype {self.dtype}. Please ensure that the gradient and the tensor have the "
                    "same dtype"
                )
        self._grad = value

    def backward(
        self,
        gradient: Tensor | None = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: Sequence[Tensor] | None = None,
    ) -> None:
        """Accumulate the gradient of this tensor into the leaves. Source: torch.Tensor.backward."""
        keep = create_graph if retain_graph is None else retain_graph
        engine.backward((self,), (gradient,), keep, create_graph, inputs)

    def detach(self) -> Tensor:
        """The same memory outside the graph; changes in place are counted together."""
        if self._version is None:
            self._version = Version()
        other = make(self._data)
        other._version = self._version
        return other  # type: ignore[return-value]

    def detach_(self) -> Tensor:
        """Leave the graph; not for views."""
        if self._base is not None:
            raise RuntimeError("Can't detach views in-place. Use detach() instead.")
        self._node, self._requires_grad = None, False
        return self

    @property
    def data(self) -> Tensor:
        """The same memory outside the graph; changes through it are not noticed by autograd."""
        return make(self._data)  # type: ignore[return-value]

    @data.setter
    def data(self, value: Tensor) -> None:
        if not isinstance(value, Tensor):
            raise TypeError(f"Variable data has to be a tensor, but got {type(value).__name__}")
        self._data = value._data

    def register_hook(self, hook: Callable[[Tensor], Any]) -> RemovableHandle:
        """Call `hook(grad)` when the gradient of this tensor is computed; it may replace it."""
        if not self._requires_grad:
            raise RuntimeError("cannot register a hook on a tensor that doesn't require gradient")
        place = self if self._node is None else self.grad_fn
        name = "_hooks" if place is self else "hooks"
        table = getattr(place, name)
        if table is None:
            table = HookTable()
            setattr(place, name, table)
        return table.add(hook)  # type: ignore[no-any-return]

    def register_post_accumulate_grad_hook(self, hook: Callable[[Tensor], None]) -> RemovableHandle:
        """Call `hook(self)` when all of a backward pass's gradient is in `.grad`. Leaves only."""
        if not self._requires_grad:
            raise RuntimeError("cannot register a hook on a tensor that doesn't require gradient")
        if self._node is not None:
            raise RuntimeError(
                "post accumulate grad hooks cannot be registered on non-leaf tensors"
            )
        if self._post_accumulate is None:
            self._post_accumulate = HookTable()
        return self._post_accumulate.add(hook)  # type: ignore[no-any-return]

    def retain_grad(self) -> None:
        """Keep the gradient of a non-leaf in `.grad`."""
        if not self._requires_grad:
            raise RuntimeError("can't retain_grad on Tensor that has requires_grad=False")
        if self._node is None or getattr(self, "retains_grad", False):
            return
        self.retains_grad = True
        owner = weakref.ref(self)

        def keep(grad: Tensor) -> None:
            tensor = owner()
            if tensor is not None:
                before = tensor._grad
                tensor._grad = grad.clone() if before is None else before + grad

        self.register_hook(keep)

    def _refresh_view(self) -> None:
        refresh_view(self)

    def _bump_version(self) -> None:
        bump(self)

    # the name is torch's and there is no other
    @property
    def _version_count(self) -> int:
        return 0 if self._version is None else self._version.count

    # --- to Python and NumPy ---

    def numpy(self, *, force: bool = False) -> np.ndarray:
        """The array itself, sharing memory. RuntimeError when it requires grad, unless `force`."""
        if self._requires_grad and not force:
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

    def __float__(self) -> float:
        return float(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __complex__(self) -> complex:
        return complex(self.item())

    def __index__(self) -> int:
        if self._data.size != 1 or self._data.dtype.kind not in "iub":
            raise TypeError("only integer tensors of a single element can be converted to an index")
        return int(self._data.item())

    def __len__(self) -> int:
        if not self._data.ndim:
            raise TypeError("len() of a 0-d tensor")
        return len(self._data)

    def __iter__(self) -> Iterator[Tensor]:
        if not self._data.ndim:
            raise TypeError("iteration over a 0-d tensor")
        return iter(unbind(self, 0))

    def __contains__(self, element: Any) -> bool:
        return bool((self == element).any())

    def __repr__(self) -> str:
        return tensor_repr(self)

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if self._data.ndim == 0 and spec else str(self)

    __hash__ = object.__hash__

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if self._node is not None:
            raise RuntimeError(
                "Only Tensors created explicitly by the user (graph leaves) support the deepcopy "
                "protocol at the moment. If you were attempting to deepcopy a module, this may be "
                "because of a tensor attribute that was computed; detach() it first."
            )
        if id(self) in memo:
            return memo[id(self)]  # type: ignore[no-any-return]
        other = object.__new__(type(self))
        other._data = self._data.copy()
        other._node = other._version = other._base = None
        other._requires_grad = self._requires_grad
        other._grad = None if self._grad is None else self._grad.__deepcopy__(memo)
        memo[id(self)] = other
        return other

    def __reduce__(self) -> tuple[Any, ...]:
        if self._node is not None:
            raise RuntimeError(
                "a Tensor that is part of a graph cannot be pickled; detach() it first"
            )
        return rebuild, (type(self), self._data, self._requires_grad)

    # --- indexing, dtype, memory ---

    def __getitem__(self, index: Any) -> Tensor:
        return ix.getitem(self, index)  # type: ignore[no-any-return]

    def __setitem__(self, index: Any, value: Any) -> None:
        put(self, index, value)

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        """In another dtype; devices are checked and change nothing. Source: torch.Tensor.to."""
        dtype, copy = parse_to(args, kwargs)
        if dtype is not None and dtype is not self.dtype:
            return cast(self, dtype=dtype)  # type: ignore[no-any-return]
        return clone(self) if copy else self  # type: ignore[no-any-return]

    def type(self, dtype: Any = None) -> Any:
        """The name of the type, or the tensor in another dtype."""
        if dtype is None:
            return f"dtrain.{self.dtype.scalar_type}Tensor"
        return self.to(dtype)

    def type_as(self, other: Tensor) -> Tensor:
        return self.to(other.dtype)

    def cpu(self) -> Tensor:
        return self

    def cuda(self, *args: Any, **kwargs: Any) -> Tensor:
        raise AssertionError(
            "Torch not compiled with CUDA enabled: dtrain runs on the CPU; leave out .cuda()"
        )

    def pin_memory(self) -> Tensor:
        """The tensor itself: there is no device to copy to."""
        return self

    def copy_(self, src: Any, non_blocking: bool = False) -> Tensor:
        """Write `src` (broadcast, cast) into this tensor's memory."""
        source = src if isinstance(src, Tensor) else make(np.asarray(src))

        def replaced(_: Any, new: Any) -> Any:
            return sh.expand(cast(new, dtype=self.dtype), self._data.shape)

        return update(self, replaced, source)  # type: ignore[no-any-return]

    def fill_(self, value: Any) -> Tensor:
        """Set every element to one number."""
        return update(self, lambda x: make(np.full(x._data.shape, value, x._data.dtype)))  # type: ignore[no-any-return]

    def zero_(self) -> Tensor:
        return self.fill_(0)

    def set_array(self, array: np.ndarray) -> None:
        """Write an array of this shape into the memory, counted as a change in place."""
        write(self, array)


register_tensor_class(Tensor)


def rebuild(cls: type[Tensor], data: np.ndarray, requires_grad: bool) -> Tensor:
    """A tensor from its pickled parts."""
    self = object.__new__(cls)
    self._data = data
    self._node = self._grad = self._version = self._base = None
    self._requires_grad = requires_grad
    return self


def parse_to(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[dtypes.dtype | None, bool]:
    """The dtype (or None) and `copy` that arguments of `.to()` ask for; devices are checked."""
    dtype, copy = kwargs.get("dtype"), kwargs.get("copy", False)
    for arg in (*args, kwargs.get("device"), kwargs.get("other")):
        if isinstance(arg, dtypes.dtype):
            dtype = arg
        elif isinstance(arg, Tensor):
            dtype = arg.dtype
        elif isinstance(arg, (str, device)) or (isinstance(arg, int) and not isinstance(arg, bool)):
            device(arg)  # raises for anything but the CPU
    return dtype, copy
