"""Class Tensor: an array with a place in the graph.

Owns: the class, its shape and its gradient with hooks. What leads to NumPy and Python is in
`interop.py`; which op is which method is a table in `methods.py`, which completes the class.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dtrain import dtypes
from dtrain.autograd import engine
from dtrain.autograd.handle import HookTable, RemovableHandle
from dtrain.autograd.node import make, register_tensor_class
from dtrain.autograd.value import PARTS, Value, Version, need_whole
from dtrain.device import device
from dtrain.interop import Interop, parse_to as parse_to, rebuild as rebuild
from dtrain.ops import index as ix, shape as sh
from dtrain.ops.create import legacy_array
from dtrain.ops.inplace import bump, check_writable, move, put, refresh_view, write

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


class Tensor(Interop):
    """A multi-dimensional array that autograd can follow. Source: torch.Tensor.

    Made by `dtrain.tensor`, `zeros`, `randn` ...; `Tensor(sizes)` or `Tensor(list)` gives the
    default dtype, as in torch. Memory is a NumPy array: `numpy()` and `from_numpy` share it.
    """

    __slots__ = ()

    def __new__(cls, *args: Any, requires_grad: bool = False) -> Any:
        self = object.__new__(cls)
        self._data = legacy_array(args, dtypes.get_default_dtype().numpy)
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
        return self.grad_fn is None

    @property
    def grad_fn(self) -> Any:
        """The Node that made it, or None for a leaf."""
        if self._base is not None:
            self._refresh_view()
        return self._node

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
        return self._wants_grad()

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
                "only Tensors of floating point and complex dtype can require gradients, this one "
                f"is {self.dtype}"
            )
        self._requires_grad = bool(value)

    def requires_grad_(self, requires_grad: bool = True) -> Tensor:
        """Set `requires_grad` and return the tensor itself."""
        self.requires_grad = requires_grad
        return self

    @property
    def grad(self) -> Any:
        """The gradient accumulated by `backward`, of this shape and dtype, or None."""
        if self._grad is None and self._node is not None and "retains_grad" not in self.__dict__:
            warnings.warn(
                "The .grad attribute of a Tensor that is not a leaf Tensor is being accessed. Its "
                ".grad attribute won't be populated during autograd.backward(). If you indeed want "
                "the .grad field to be populated for a non-leaf Tensor, use .retain_grad() on the "
                "non-leaf Tensor.",
                UserWarning,
                stacklevel=2,
            )
        return self._grad

    @grad.setter
    def grad(self, value: Any) -> None:
        if value is not None:
            if not isinstance(value, Tensor):
                raise TypeError(
                    "assigned grad expected to be a Tensor or None but got grad of type "
                    f"{type(value).__name__}"
                )
            if value._data.shape != self._data.shape:
                raise RuntimeError(
                    f"attempting to assign a gradient of size '{list(value._data.shape)}' to a "
                    f"tensor of size '{list(self._data.shape)}'. Please ensure that the gradient "
                    "and the tensor are the same size"
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

    def detach(self) -> Any:
        """The same memory outside the graph; changes in place are counted together."""
        if self._version is None:
            self._version = Version()
        other = make(self._data)
        other._version = self._version
        return other

    def detach_(self) -> Tensor:
        """Leave the graph; not for views."""
        if self._base is not None:
            raise RuntimeError("Can't detach views in-place. Use detach() instead.")
        self._node, self._requires_grad = None, False
        return self

    @property
    def data(self) -> Any:
        """The same memory outside the graph; changes through it are not noticed by autograd."""
        return make(self._data)

    @data.setter
    def data(self, value: Tensor) -> None:
        if not isinstance(value, Tensor):
            raise TypeError(f"Variable data has to be a tensor, but got {type(value).__name__}")
        if PARTS and value.__class__ in PARTS:
            value._be_data_of(self)
        else:
            self._data = value._data

    def register_hook(self, hook: Callable[[Tensor], Any]) -> RemovableHandle:
        """Call `hook(grad)` when the gradient of this tensor is computed; it may replace it."""
        if not self._requires_grad:
            raise RuntimeError("cannot register a hook on a tensor that doesn't require gradient")
        return self._hook_table().add(hook)

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

        def keep(grad: Any) -> None:
            tensor = owner()
            if tensor is not None:
                before = tensor._grad
                tensor._grad = grad.clone() if before is None else before + grad

        table = self._hook_table()
        table[HookTable.LAST] = table.pop(HookTable.LAST, keep)

    def _hook_table(self) -> HookTable:
        """The hooks on this tensor's gradient: a leaf's own, or those of the node that made it."""
        place, name = (self, "_hooks") if self._node is None else (self.grad_fn, "hooks")
        table = getattr(place, name)
        if table is None:
            table = HookTable()
            setattr(place, name, table)
        return table  # type: ignore[no-any-return]

    def _refresh_view(self) -> None:
        refresh_view(self)

    def _bump_version(self) -> None:
        bump(self)

    def _check_writable(self) -> None:
        check_writable(self)

    def _move(self, result: Value) -> None:
        move(self, result)

    # --- what differs for a tensor that is a part of a larger one (value.PARTS) ---

    _stays = False  # whether `load_state_dict` copies into it, with `assign`, too

    def _kin(self, data: np.ndarray) -> Any:
        """A tensor over an array that belongs to this one's memory element by element."""
        return make(data)

    def _be_data_of(self, target: Tensor) -> None:
        """Become what a tensor that is no part, `target`, holds."""
        need_whole("the data of a plain tensor", self)

    def _adopt(self, value: Any, dtype: Any) -> Any:
        """A copy of a loaded tensor that belongs to this one, in a NumPy dtype."""
        need_whole("load_state_dict into a plain tensor", value)
        return make(value._data.astype(dtype))

    # --- indexing and memory ---

    def __getitem__(self, index: Any) -> Tensor:
        return ix.getitem(self, index)  # type: ignore[no-any-return]

    def __setitem__(self, index: Any, value: Any) -> None:
        put(self, index, value)

    def copy_(self, src: Any, non_blocking: bool = False) -> Tensor:
        """Write `src` (broadcast, cast) into this tensor's memory."""
        put(self, ..., src, part=False)
        return self

    def fill_(self, value: Any) -> Tensor:
        """Set every element to one number."""
        put(self, ..., value, part=False)
        return self

    def zero_(self) -> Tensor:
        return self.fill_(0)

    def set_array(self, array: np.ndarray) -> None:
        """Write an array of this shape into the memory, counted as a change in place."""
        write(self, array)


register_tensor_class(Tensor)
