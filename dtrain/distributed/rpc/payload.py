"""Arguments and results as bytes: plain data by `codec`, larger arrays beside it as they are.

Owns: `pack` and `unpack`. Beyond plain data travel functions and classes (by name), bound methods,
instances of dataclasses that may be called, and remote references. Anything else travels by
cloudpickle, to a worker that said `accept_code=True`, or is a TypeError that names its path. Rule:
a worker that did not say so unpickles nothing, whatever arrives.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgpack
import numpy as np

from dtrain import dtypes
from dtrain.autograd.node import make
from dtrain.autograd.value import need_whole
from dtrain.comm.work import Future
from dtrain.distributed.codec import (
    MAX_DEPTH,
    READERS,
    decode,
    encode,
    extension,
    plain,
    plain_leaf,
)
from dtrain.distributed.rpc.code import opened, sealed
from dtrain.distributed.rpc.ledger import Name
from dtrain.distributed.rpc.names import name_of, resolve
from dtrain.tensor import Tensor

__all__ = ["Packed", "pack", "unpack"]

BESIDE_TENSOR, BESIDE_ARRAY, REFERENCE, RECORD, FUNCTION, METHOD, CODE = range(32, 39)

# Below, one message costs less than two.
_BESIDE = 8 * 1024

Array = np.ndarray[Any, Any]
Functions = (types.FunctionType, types.BuiltinFunctionType, type)


class _RefusedError(TypeError):
    """What cannot travel, with advice."""


def _advice(value: Any) -> str:
    """What to do about `value`, which cannot travel."""
    if isinstance(value, types.GeneratorType):
        return "rpc.stream iterates over it from another worker"
    if isinstance(value, Future):
        return "A function that answers later is decorated with rpc.functions.async_execution"
    code = "pickled, it travels to a worker that called init_rpc(..., accept_code=True)"
    if isinstance(value, Functions):
        return f"As code, {code}"
    here = "Leave it where it is and pass an RRef (remote makes it there)"
    if hasattr(value, "state_dict"):
        return f"{here}, or send its state_dict(); {code}"
    return f"{here}, or make it a dataclass; {code}"


class Packed(NamedTuple):
    """A value to send: its bytes, the arrays that go beside them, the references in it."""

    body: bytes
    arrays: list[Array]
    references: list[Any]


class _Packer:
    def __init__(self, code: bool, reference: type[Any]) -> None:
        self.code, self.reference = code, reference
        self.arrays: list[Array] = []
        self.references: list[Any] = []
        self.depth = 0

    def leaf(self, value: Any, path: str) -> msgpack.ExtType:
        if isinstance(value, Tensor | np.ndarray) and value.nbytes >= _BESIDE:
            return self._beside(value, path)
        if isinstance(value, self.reference):
            self.references.append(value)
            return extension(REFERENCE, list(value.name))
        try:
            return self._by_name(value, path) or plain_leaf(value, path)
        except TypeError as error:
            if isinstance(error, _RefusedError):  # of what is inside of `value`
                raise
            if not self.code:
                where = "" if str(error).startswith(path) else f"{path}: "
                raise _RefusedError(f"{where}{error}. {_advice(value)}") from None
        return extension(CODE, sealed(value, path))

    def _beside(self, value: Any, path: str) -> msgpack.ExtType:
        need_whole("sending it", value)
        array = value._data if isinstance(value, Tensor) else value
        if array.dtype.hasobject or not array.dtype.isnative:
            raise TypeError(f"{path}: arrays of dtype {array.dtype} cannot be sent")
        self.arrays.append(np.ascontiguousarray(array))
        kind = BESIDE_TENSOR if isinstance(value, Tensor) else BESIDE_ARRAY
        place = [len(self.arrays) - 1, dtypes.from_numpy(array.dtype).name, list(array.shape)]
        return extension(kind, place)

    def _by_name(self, value: Any, path: str) -> msgpack.ExtType | None:
        if isinstance(value, types.MethodType):
            return extension(METHOD, self._inside([value.__self__, value.__name__], path))
        if isinstance(value, Functions):
            return extension(FUNCTION, name_of(value))
        if dataclasses.is_dataclass(value):
            fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
            return extension(RECORD, self._inside([type(value), fields], path))
        names = getattr(type(value), "_travels_as", None)
        if names is not None:
            handed = {name: getattr(value, name) for name in names}
            return extension(RECORD, self._inside([type(value), handed], path))
        return None

    def _inside(self, parts: list[Any], path: str) -> Any:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise TypeError(f"{path}: nested deeper than {MAX_DEPTH} (or a cycle)")
        packed = plain(parts, path, 0, self.leaf)
        self.depth -= 1
        return packed


def pack(value: Any, what: str, *, code: bool, reference: type[Any]) -> Packed:
    """`value`, called `what` in errors, fit to be sent; `code`: the receiver accepts code.

    `reference` is the class of remote references.
    """
    packer = _Packer(code, reference)
    try:
        body = encode(value, packer.leaf, what)
    except _RefusedError as error:
        raise TypeError(str(error)) from None
    return Packed(body, packer.arrays, packer.references)


def unpack(body: Any, arrays: Sequence[Any], find: Callable[[Name], Any], *, code: bool) -> Any:
    """The value of `pack`; `find` gives the handle of a reference.

    TypeError for what may not be called or made here, ValueError on anything malformed.
    """
    refusals: list[TypeError] = []

    def beside(place: list[Any]) -> Array:
        number, name, shape = place
        flat = np.frombuffer(arrays[number], np.uint8)
        return flat.view(dtypes.BY_NAME[name].numpy).reshape(shape)

    def allowed(name: list[str]) -> Any:
        try:
            return resolve(*name)
        except TypeError as error:
            refusals.append(error)
            raise

    def unpickled(data: bytes) -> Any:
        if not code:
            refusals.append(TypeError("code came to a worker that did not say accept_code=True"))
            raise refusals[0]
        return opened(data)

    readers: dict[int, Callable[[Any], Any]] = {
        **READERS,
        BESIDE_TENSOR: lambda place: make(beside(place)),
        BESIDE_ARRAY: beside,
        REFERENCE: lambda name: find(Name(*name)),
        RECORD: _record,
        FUNCTION: allowed,
        METHOD: _method,
        CODE: unpickled,
    }
    try:
        return decode(body, readers)
    except ValueError:
        if refusals:
            raise refusals[0] from None
        raise


def _record(parts: list[Any]) -> Any:
    """An instance of a dataclass, made without its `__init__`, or of a class that `_travels_as`
    some attributes, made by its `_arrived`.
    """
    cls, fields = parts
    if set(fields) == set(getattr(cls, "_travels_as", ())) and fields:
        return cls._arrived(**fields)
    if not isinstance(cls, type) or set(fields) != {f.name for f in dataclasses.fields(cls)}:
        raise TypeError(f"not the fields of {cls!r}")
    made: Any = cls.__new__(cls)  # type: ignore[call-overload]
    for name, value in fields.items():
        object.__setattr__(made, name, value)
    return made


def _method(parts: list[Any]) -> Any:
    owner, name = parts
    if name.startswith("__") and name != "__call__":
        raise TypeError(f"{name} may not be called by other workers")
    return getattr(owner, name)
