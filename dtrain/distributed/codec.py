"""Python objects as bytes without pickle: what object collectives send.

Plain data only: None, bool, int, float, complex, str, bytes, list, tuple, dict (any of these as
keys that msgpack can hash), set, NumPy arrays and scalars, Tensors. Reading bytes from another
rank can therefore never run code. Anything else raises TypeError with the path to it.
"""

from __future__ import annotations

from typing import Any

import msgpack
import numpy as np

from dtrain import dtypes
from dtrain.autograd.node import make
from dtrain.tensor import Tensor

TUPLE, SET, ARRAY, TENSOR, COMPLEX, BIG_INT = range(6)
MAX_DEPTH = 64


def encode(value: Any) -> bytes:
    """The bytes of `value`; TypeError names the part that is not plain data."""
    packed: bytes = msgpack.packb(_plain(value, "object", 0), use_bin_type=True)
    return packed


def decode(data: bytes) -> Any:
    """The value of `encode`'s bytes; ValueError on anything malformed."""
    try:
        return msgpack.unpackb(data, raw=False, strict_map_key=False, ext_hook=_unpack_extension)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise ValueError(f"malformed object from another rank: {error}") from None


def _extension(code: int, value: Any) -> msgpack.ExtType:
    return msgpack.ExtType(code, msgpack.packb(value, use_bin_type=True))


def _plain(value: Any, path: str, depth: int) -> Any:
    """`value` in what msgpack knows, extensions for the rest."""
    if depth > MAX_DEPTH:
        raise TypeError(f"{path}: nested deeper than {MAX_DEPTH} (or a cycle)")
    kind = type(value)
    if value is None or kind in (bool, float, str, bytes):
        return value
    if kind is int:
        return value if -(2**63) <= value < 2**64 else _extension(BIG_INT, str(value))
    if kind is list:
        return [_plain(v, f"{path}[{i}]", depth + 1) for i, v in enumerate(value)]
    if kind is dict:
        return {
            _plain(k, f"{path} key {k!r}", depth + 1): _plain(v, f"{path}[{k!r}]", depth + 1)
            for k, v in value.items()
        }
    if kind is tuple:
        return _extension(
            TUPLE, [_plain(v, f"{path}[{i}]", depth + 1) for i, v in enumerate(value)]
        )
    if kind in (set, frozenset):
        return _extension(SET, [_plain(v, f"{path} member", depth + 1) for v in value])
    if kind is complex:
        return _extension(COMPLEX, [value.real, value.imag])
    if isinstance(value, Tensor):
        return _extension(TENSOR, _array_parts(value._data, path))
    if isinstance(value, (np.ndarray, np.generic)):
        return _extension(ARRAY, _array_parts(np.asarray(value), path))
    raise TypeError(
        f"{path}: a {kind.__module__}.{kind.__qualname__} cannot be sent to other ranks; send "
        "plain data (numbers, str, bytes, list, tuple, dict, set, arrays, tensors)"
    )


def _array_parts(array: np.ndarray, path: str) -> list[Any]:
    if array.dtype.hasobject or not array.dtype.isnative:
        raise TypeError(f"{path}: arrays of dtype {array.dtype} cannot be sent to other ranks")
    name = dtypes.from_numpy(array.dtype).name
    return [name, list(array.shape), np.ascontiguousarray(array).tobytes()]


def _unpack_extension(code: int, data: bytes) -> Any:
    value = msgpack.unpackb(data, raw=False, strict_map_key=False, ext_hook=_unpack_extension)
    if code == TUPLE:
        return tuple(value)
    if code == SET:
        return set(value)
    if code == COMPLEX:
        return complex(*value)
    if code == BIG_INT:
        return int(value)
    if code in (ARRAY, TENSOR):
        name, shape, raw = value
        array = np.frombuffer(raw, dtypes.BY_NAME[name].numpy).reshape(shape).copy()
        return make(array) if code == TENSOR else array
    raise ValueError(f"unknown extension {code}")
