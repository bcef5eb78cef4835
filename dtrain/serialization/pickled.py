"""Pickling: how `save` writes the object, and how `load(weights_only=False)` reads it.

The one file of the package that unpickles. `TrustingUnpickler` runs whatever code a file names:
it is reached only when a caller has said `weights_only=False`.
Classes of dtrain are written under the name PyTorch has for them, and found under either.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import IO, Any

import numpy as np

from dtrain import dtypes
from dtrain.autograd.value import need_whole
from dtrain.device import device
from dtrain.nn.parameter import Parameter
from dtrain.serialization.portable import (
    DEVICE,
    MEANINGS,
    REBUILD_PARAMETER,
    SIZE,
    STORAGE_NAMES,
    UNTYPED,
    Global,
    Storage,
    owner_of,
    parts_of,
)
from dtrain.tensor import Size, Tensor, rebuild

UnpicklingError = pickle.UnpicklingError

_PROTOCOL = 2  # torch's
_SAME_PATHS = ("dtrain.nn.modules.", "dtrain.nn.parameter", "dtrain.optim.")  # as in torch


class Writer(pickle._Pickler):
    """Pickles an object; its storages are kept aside, to be written as records of their own.

    The Python pickler, because only that one can write names that cannot be imported here.
    """

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file, _PROTOCOL)
        self._storages: dict[int, tuple[np.ndarray, Storage]] = {}  # by the id of the memory

    def storages(self) -> list[Storage]:
        """The storages met, in the order of their keys."""
        return [storage for _, storage in self._storages.values()]

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        if isinstance(obj, Global):
            self._write_global(obj, obj)
        elif isinstance(obj, dtypes.dtype):
            self._write_global(obj, Global("torch", obj.name))
        else:
            super().save(obj, save_persistent_id)

    def save_global(self, obj: Any, name: str | None = None) -> None:
        module = obj.__module__ or ""
        if module.startswith(_SAME_PATHS):
            self._write_global(obj, name_in_torch(obj))
        else:
            super().save_global(obj, name)

    def _write_global(self, obj: Any, name: Global) -> None:
        """Write `obj` as a name, or as a reference to where that was written before."""
        if id(obj) in self.memo:
            self.write(self.get(self.memo[id(obj)][0]))
        else:
            self.write(pickle.GLOBAL + f"{name.module}\n{name.name}\n".encode("ascii"))
            self.memoize(obj)

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, Storage):
            return None
        kind = STORAGE_NAMES.get(obj.dtype, UNTYPED)
        count = obj.array.nbytes if kind is UNTYPED else obj.array.size
        return "storage", kind, obj.key, "cpu", count

    def reducer_override(self, obj: Any) -> Any:
        need_whole("torch.save", obj)
        if isinstance(obj, Parameter):
            data = rebuild(Tensor, obj._data, False)
            return REBUILD_PARAMETER, (data, obj._requires_grad, OrderedDict())
        if isinstance(obj, Tensor):
            owner = owner_of(obj._data)
            return parts_of(obj, self._storage(obj, owner), owner is not None)
        if isinstance(obj, Size):
            return SIZE, (tuple(obj),)
        if isinstance(obj, device):
            return DEVICE, (obj.type,) if obj.index is None else (obj.type, obj.index)
        return NotImplemented

    def _storage(self, tensor: Tensor, owner: np.ndarray | None) -> Storage:
        """The storage of `owner`, or of a contiguous copy of the tensor."""
        memory = tensor._data if owner is None else owner
        if id(memory) not in self._storages:
            flat = np.ascontiguousarray(memory).reshape(-1)
            storage = Storage(str(len(self._storages)), flat, tensor.dtype)
            self._storages[id(memory)] = (memory, storage)  # kept, so that the id stays its own
        return self._storages[id(memory)][1]


class TrustingUnpickler(pickle.Unpickler):
    """Runs a pickle, code and all. Names of torch are looked for in dtrain."""

    def __init__(self, file: IO[bytes], load_storage: Callable[[Any], Storage]) -> None:
        super().__init__(file)
        self.load_storage = load_storage

    def find_class(self, module: str, name: str) -> Any:
        meaning = MEANINGS.get(Global(module, name))
        if meaning is not None:
            return meaning
        if module == "torch" or module.startswith("torch."):
            module = "dtrain" + module.removeprefix("torch")
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> Storage:
        return self.load_storage(pid)


def name_in_torch(kind: Any) -> Global:
    """The name under which `save` writes a class or function."""
    module = kind.__module__
    if module.startswith(_SAME_PATHS):
        module = "torch" + module.removeprefix("dtrain")
    return Global(module, kind.__qualname__)
