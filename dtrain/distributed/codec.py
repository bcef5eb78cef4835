"""Python objects as bytes without pickle: what object collectives send.

Plain data only: None, bool, int, float, complex, str, bytes, list, tuple, Size, dict and
OrderedDict (any of these as keys that msgpack can hash), set, frozenset, NumPy arrays and scalars,
Tensors, dtypes and devices. Reading bytes from another rank can therefore never run code. Anything
else raises TypeError with the path to it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import msgpack
import numpy as np

from dtrain import dtypes
from dtrain.autograd.node import make
from dtrain.autograd.value import need_whole
from dtrain.device import device
from dtrain.tensor import Size, Tensor

TUPLE, SET, ARRAY, TENSOR, COMPLEX, BIG_INT = range(6)
FROZENSET, SIZE, ORDERED, DTYPE, DEVICE, SCALAR = range(6, 12)
MAX_DEPTH = 64
_MALFORMED = (ValueError, TypeError, KeyError, RuntimeError, OverflowError, msgpack.UnpackException)


# leaf(value, path): the extension of what is no container, or an error that names the path.
Leaf = Callable[[Any, str], msgpack.ExtType]
Readers = Mapping[int, Callable[[Any], Any]]  # {code of an extension: what makes its value}


def encode(value: Any, leaf: Leaf | None = None, path: str = "object") -> bytes:
    """The bytes of `value`; TypeError names the part, below `path`, that is not plain data.

    `leaf` takes the place of `plain_leaf`, for those who send more than plain data.
    """
    packed: bytes = msgpack.packb(plain(value, path, 0, leaf or plain_leaf), use_bin_type=True)
    return packed


def decode(data: Any, readers: Readers | None = None) -> Any:
    """The value of `encode`'s bytes; ValueError on anything malformed.

    `readers`: what reads the extensions, those of plain data unless told otherwise.
    """
    hook = partial(_unpack_extension, READERS if readers is None else readers)
    try:
        return msgpack.unpackb(data, raw=False, strict_map_key=False, ext_hook=hook)
    except _MALFORMED as error:
        raise ValueError(f"malformed object from another rank: {error}") from None


def extension(code: int, value: Any) -> msgpack.ExtType:
    return msgpack.ExtType(code, msgpack.packb(value, use_bin_type=True))


def plain(value: Any, path: str, depth: int, leaf: Leaf) -> Any:
    """`value`, which is at `path`, in what msgpack knows, extensions for the rest."""
    if depth > MAX_DEPTH:
        raise TypeError(f"{path}: nested deeper than {MAX_DEPTH} (or a cycle)")
    kind = type(value)
    if value is None or kind in (bool, float, str, bytes):
        return value
    if kind is int:
        return value if -(2**63) <= value < 2**64 else extension(BIG_INT, str(value))
    if kind is list:
        return _items(value, path, depth, leaf)
    if kind is dict:
        return {
            plain(k, f"{path} key {k!r}", depth + 1, leaf): plain(
                v, f"{path}[{k!r}]", depth + 1, leaf
            )
            for k, v in value.items()
        }
    if kind in _SEQUENCES:
        return extension(_SEQUENCES[kind], _items(value, path, depth, leaf))
    if kind in _SETS:
        return extension(_SETS[kind], [plain(v, f"{path} member", depth + 1, leaf) for v in value])
    if kind is OrderedDict:
        pairs = [plain(list(pair), f"{path} item", depth + 1, leaf) for pair in value.items()]
        return extension(ORDERED, pairs)
    return leaf(value, path)


def _items(value: Sequence[Any], path: str, depth: int, leaf: Leaf) -> list[Any]:
    """Most are atoms, of which no path is made: a small call takes a third less."""
    return [
        v if type(v) in _ATOMS else plain(v, f"{path}[{i}]", depth + 1, leaf)
        for i, v in enumerate(value)
    ]


_ATOMS = frozenset((type(None), bool, float, str, bytes))
_SEQUENCES: dict[type, int] = {tuple: TUPLE, Size: SIZE}
_SETS: dict[type, int] = {set: SET, frozenset: FROZENSET}


def plain_leaf(value: Any, path: str) -> msgpack.ExtType:
    """The extension of a scalar, an array or a tensor; TypeError for anything else."""
    kind = type(value)
    if kind is complex:
        return extension(COMPLEX, [value.real, value.imag])
    if kind is dtypes.dtype:
        return extension(DTYPE, value.name)
    if kind is device:
        return extension(DEVICE, str(value))
    for code, base in ((TENSOR, Tensor), (ARRAY, np.ndarray), (SCALAR, np.generic)):
        if isinstance(value, base):
            need_whole("sending it as an object", value)
            array = value._data if isinstance(value, Tensor) else np.asarray(value)
            return extension(code, _array_parts(array, path))
    raise TypeError(
        f"{path}: a {kind.__module__}.{kind.__qualname__} cannot be sent to other ranks; send "
        "plain data (numbers, str, bytes, list, tuple, dict, set, arrays, tensors)"
    )


def _array_parts(array: np.ndarray, path: str) -> list[Any]:
    if array.dtype.hasobject or not array.dtype.isnative:
        raise TypeError(f"{path}: arrays of dtype {array.dtype} cannot be sent to other ranks")
    name = dtypes.from_numpy(array.dtype).name
    return [name, list(array.shape), np.ascontiguousarray(array).tobytes()]


def _unpack_extension(readers: Readers, code: int, data: bytes) -> Any:
    hook = partial(_unpack_extension, readers)
    value = msgpack.unpackb(data, raw=False, strict_map_key=False, ext_hook=hook)
    if code not in readers:
        raise ValueError(f"unknown extension {code}")
    return readers[code](value)


def _array(parts: list[Any]) -> np.ndarray:
    name, shape, raw = parts
    return np.frombuffer(raw, dtypes.BY_NAME[name].numpy).reshape(shape).copy()


READERS: dict[int, Callable[[Any], Any]] = {
    **{TUPLE: tuple, SET: set, FROZENSET: frozenset, SIZE: Size, ORDERED: OrderedDict},
    **{COMPLEX: lambda parts: complex(*parts), BIG_INT: int},
    **{DTYPE: lambda name: dtypes.BY_NAME[name], DEVICE: device},
    **{ARRAY: _array, TENSOR: lambda parts: make(_array(parts))},
    SCALAR: lambda parts: _array(parts)[()],
}
