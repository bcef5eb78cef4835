"""Objects under the names PyTorch's files give them: tensors, storages, dtypes, sizes, devices.

Tensors that share memory share one storage, so that they share it again when loaded. Rebuilding
trusts nothing: a tensor that would reach outside its storage is refused.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np

from dtrain import dtypes
from dtrain.device import device
from dtrain.nn.parameter import Parameter
from dtrain.tensor import Size, Tensor, rebuild


class Global(NamedTuple):
    """A class or function by its module and name in PyTorch."""

    module: str
    name: str

    def __call__(self, *args: Any) -> Any:
        raise TypeError(f"{self.module}.{self.name} is only a name here")


class StorageType(NamedTuple):
    """What the elements of a storage are; None for bytes without a type."""

    dtype: dtypes.dtype | None


class Storage(NamedTuple):
    """One piece of memory: `array` is 1-d, of `dtype`'s elements (None: bytes)."""

    key: str
    array: np.ndarray
    dtype: dtypes.dtype | None


REBUILD_TENSOR = Global("torch._utils", "_rebuild_tensor_v2")
REBUILD_TYPED = Global("torch._utils", "_rebuild_tensor_v3")  # with a dtype and untyped storage
REBUILD_PARAMETER = Global("torch._utils", "_rebuild_parameter")
UNTYPED = Global("torch.storage", "UntypedStorage")
SIZE = Global("torch", "Size")
DEVICE = Global("torch", "device")
_NO_STORAGE_CLASS = (dtypes.uint16, dtypes.uint32, dtypes.uint64)
STORAGE_NAMES = {
    dt: Global("torch", f"{dt.scalar_type}Storage")
    for dt in dict.fromkeys(dtypes.BY_NAME.values())
    if dt not in _NO_STORAGE_CLASS
}


# --- taking tensors apart ------------------------------------------------------------------------


def owner_of(array: np.ndarray) -> np.ndarray | None:
    """The memory that `array` is a view of and that is saved for it; itself if it is no view.

    None where a contiguous copy must be saved: the memory has another dtype or order, or the view
    runs backwards, which PyTorch has not.
    """
    owner = array
    while isinstance(owner.base, np.ndarray):
        owner = owner.base
    fits = owner.dtype == array.dtype and owner.flags.c_contiguous
    return owner if fits and min(array.strides, default=0) >= 0 else None


def parts_of(tensor: Tensor, storage: Storage, shared: bool) -> tuple[Global, tuple[Any, ...]]:
    """What PyTorch calls to make this tensor, and with what.

    `shared`: the storage is the tensor's own memory, and not a contiguous copy of it.
    """
    array, offset = tensor._data, 0
    seen = array if shared else storage.array.reshape(array.shape)
    if shared and array.size:
        offset = _address(array) - _address(storage.array)
    size = tuple(array.shape)
    # Of an array without elements NumPy does not keep the strides; PyTorch's are these.
    strides = seen.strides if seen.size else np.empty([n or 1 for n in size], seen.dtype).strides
    stride = tuple(step // array.itemsize for step in strides)
    common = (storage, offset // array.itemsize, size, stride, tensor._requires_grad, OrderedDict())
    if tensor.dtype in _NO_STORAGE_CLASS:
        return REBUILD_TYPED, (*common, tensor.dtype)
    return REBUILD_TENSOR, common


def _address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


# --- putting them together -----------------------------------------------------------------------


def _rebuild_tensor(
    storage: Storage, offset: int, size: Any, stride: Any, requires_grad: bool, hooks: Any,
    metadata: Any = None,
) -> Tensor:  # fmt: skip
    if not isinstance(storage, Storage) or storage.dtype is None:
        raise RuntimeError(f"a tensor needs a typed storage, got {type(storage).__name__}")
    return _view(storage.array, int(offset), tuple(size), tuple(stride), bool(requires_grad))


def _rebuild_typed(
    storage: Storage, offset: int, size: Any, stride: Any, requires_grad: bool, hooks: Any,
    dtype: dtypes.dtype, metadata: Any = None,
) -> Tensor:  # fmt: skip
    flat = storage.array.view(dtype.numpy)
    return _view(flat, int(offset), tuple(size), tuple(stride), bool(requires_grad))


def _view(
    flat: np.ndarray, offset: int, size: tuple[int, ...], stride: tuple[int, ...], grad: bool
) -> Tensor:
    end = offset + 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if offset < 0 or min(size + stride, default=0) < 0 or (0 not in size and end > flat.size):
        raise RuntimeError(
            f"a tensor of sizes {list(size)}, strides {list(stride)} and offset {offset} reaches "
            f"outside its storage of {flat.size} elements: the file is damaged"
        )
    if 0 in size:
        return rebuild(Tensor, np.empty(size, flat.dtype), grad)
    steps = tuple(s * flat.itemsize for s in stride)
    # ndarray(...) checks the bounds once more, which as_strided does not.
    return rebuild(Tensor, np.ndarray(size, flat.dtype, flat, offset * flat.itemsize, steps), grad)


def _rebuild_parameter(data: Tensor, requires_grad: bool, hooks: Any) -> Parameter:
    return Parameter(data, requires_grad)


def _rebuild_parameter_with_state(
    data: Tensor, requires_grad: bool, hooks: Any, state: Any
) -> Parameter:
    return Parameter(data, requires_grad)


def _encode(text: str, encoding: str) -> bytes:
    """bytes as protocol 2 writes them."""
    if encoding != "latin1":
        raise ValueError(f"bytes are encoded as latin1, got {encoding!r}")
    return text.encode("latin1")


def _bytearray(content: bytes = b"") -> bytearray:
    """A bytearray of given bytes; not one of any size that a file asks for."""
    if not isinstance(content, bytes):
        raise TypeError(f"a bytearray is made of bytes, got {type(content).__name__}")
    return bytearray(content)


# {PyTorch's name: what it means here}: callable, a dtype, or a StorageType.
MEANINGS: dict[Global, Any] = {
    REBUILD_TENSOR: _rebuild_tensor,
    REBUILD_TYPED: _rebuild_typed,
    REBUILD_PARAMETER: _rebuild_parameter,
    Global("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter_with_state,
    SIZE: Size,
    DEVICE: device,
    Global("collections", "OrderedDict"): OrderedDict,
    Global("_codecs", "encode"): _encode,
    **{
        Global(module, kind.__name__): kind
        for module in ("builtins", "__builtin__")  # of Python 3 and 2: protocol 2 writes the latter
        for kind in (set, frozenset, complex)
    },
    Global("builtins", "bytearray"): _bytearray,
    Global("__builtin__", "bytearray"): _bytearray,
    UNTYPED: StorageType(None),
    Global("torch", "UntypedStorage"): StorageType(None),
    **{name: StorageType(dt) for dt, name in STORAGE_NAMES.items()},
    **{Global("torch", dt.name): dt for dt in dict.fromkeys(dtypes.BY_NAME.values())},
}
