"""A state as bytes and back: plain data by the codec, arrays and tensors beside it, not copied.

The first part is the structure, with a place for each array; the others are the arrays' own
memory, in order. `unpack` gives arrays that are views of the bytes it is given, which is right for
`load_state_dict`: it copies. What is neither plain data nor an array raises TypeError with its
path; nothing is pickled.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np

from dtrain import dtypes
from dtrain.autograd.node import make
from dtrain.distributed import codec
from dtrain.tensor import Tensor

_LENGTH = struct.Struct("<q")
_CODES = {codec.TENSOR: Tensor, codec.ARRAY: np.ndarray}


def pack(state: Any) -> list[Any]:
    """The parts of a state: bytes, then the memory of its arrays, still theirs."""
    arrays: list[np.ndarray] = []

    def leaf(value: Any, path: str) -> msgpack.ExtType:
        for code, kind in _CODES.items():
            if isinstance(value, kind):
                array = value._data if isinstance(value, Tensor) else value
                name = dtypes.from_numpy(array.dtype).name
                if array.size:
                    arrays.append(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
                return codec.extension(code, [name, list(array.shape)])
        return codec.plain_leaf(value, path)

    head = codec.encode(state, leaf)
    return [_LENGTH.pack(len(head)), head, *arrays]


def unpack(data: Any) -> Any:
    """The state whose parts `data` has, one behind the other; ValueError on anything malformed."""
    view = memoryview(data)
    (length,) = _LENGTH.unpack(view[: _LENGTH.size])
    offset = _LENGTH.size + length

    def next_array(parts: list[Any]) -> np.ndarray:
        nonlocal offset
        dtype, shape = np.dtype(dtypes.BY_NAME[parts[0]].numpy), parts[1]
        count = int(np.prod(shape))
        array = np.frombuffer(view, dtype, count, offset).reshape(shape)
        offset += array.nbytes
        return array

    readers: dict[int, Callable[[Any], Any]] = dict(codec.READERS)
    readers[codec.ARRAY] = next_array
    readers[codec.TENSOR] = lambda parts: make(next_array(parts))
    return codec.decode(bytes(view[_LENGTH.size : _LENGTH.size + length]), readers)
