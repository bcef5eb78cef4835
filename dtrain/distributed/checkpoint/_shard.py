"""One file of tensors in the safetensors format: written piece by piece, read box by box.

The format: 8 bytes little-endian length of a JSON header, {name: {dtype, shape, data_offsets}},
then the data. Nothing is held twice: contiguous memory is written and read directly, other memory
in pieces. Source: https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from dtrain import dtypes
from dtrain.distributed.checkpoint._disk import PIECE, NewFile
from dtrain.distributed.checkpoint.api import DamagedCheckpoint
from dtrain.tensor import Size

Array = np.ndarray[Any, Any]

NAMES = {
    **{"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"},
    **{"int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "bool": "BOOL"},
    **{"uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "complex64": "C64"},
}
_KINDS = {short: name for name, short in NAMES.items()}


LIMIT = 100 << 20  # bytes of a header, as in the format's own reader

Specs = Sequence[tuple[str, dtypes.dtype, Sequence[int]]]


def write_shard(path: Path, arrays: Sequence[tuple[str, Array]], sync: bool) -> dict[str, Any]:
    """Write named arrays; {"size", "sha256", "begins": where each one's data begin in the file}."""
    specs = [(name, dtypes.from_numpy(array.dtype), array.shape) for name, array in arrays]
    header, begins = header_of(specs)
    with NewFile(path, sync) as file:
        file.write(header)
        for _, array in arrays:
            for piece in pieces(array):
                file.write(piece)
    return {"size": file.size, "sha256": file.sha256, "begins": begins}


def header_of(specs: Specs, texts: Mapping[str, str] | None = None) -> tuple[bytes, list[int]]:
    """The head of a file with these tensors in this order, and where the data of each begin.

    `texts` become its `__metadata__`.
    """
    entries: dict[str, Any] = {"__metadata__": dict(texts)} if texts else {}
    ends = [0]
    for name, dtype, size in specs:
        kind, shape = dtype.name, list(size)
        ends.append(ends[-1] + math.prod(shape) * dtype.itemsize)
        if kind not in NAMES:  # complex128: pairs of float64
            kind, shape = "float64", [*shape, 2]
        entries[name] = {"dtype": NAMES[kind], "shape": shape, "data_offsets": ends[-2:]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, [len(header) + end for end in ends[:-1]]


def read_header(path: Path) -> tuple[dict[str, tuple[dtypes.dtype, Size, int]], dict[str, str]]:
    """({name: (dtype, shape, where its data begin)}, texts) of a safetensors file.

    DamagedCheckpoint unless the tensors fill the file exactly, in some order.
    """
    try:
        with open(path, "rb") as file:
            total, length = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
            if length > min(LIMIT, total):
                raise ValueError(f"a header of {length} bytes in a file of {total}")
            entries = json.loads(file.read(length), object_pairs_hook=_once)
        texts = entries.pop("__metadata__", {})
        return _filling(entries, 8 + length, total), {str(k): str(v) for k, v in texts.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        told = f"{type(error).__name__}: {error}"
        raise DamagedCheckpoint(f"{path} is no undamaged safetensors file: {told}") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key that stands there twice")
    return found


def _filling(
    entries: dict[str, Any], begin: int, total: int
) -> dict[str, tuple[dtypes.dtype, Size, int]]:
    tensors, end = {}, 0
    for name, entry in sorted(entries.items(), key=lambda pair: pair[1]["data_offsets"]):
        (first, last), shape = entry["data_offsets"], entry["shape"]
        dtype = dtypes.BY_NAME[_KINDS[entry["dtype"]]]
        if not all(type(n) is int and n >= 0 for n in (first, last, *shape)) or first != end:
            raise ValueError(f"{name} does not begin where the one before ends")
        if last - first != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name} has {last - first} bytes for {dtype.name} {shape}")
        tensors[name], end = (dtype, Size(shape), begin + first), last
    if begin + end != total:
        raise ValueError(f"its tensors end at byte {begin + end} of {total}")
    return tensors


def pieces(array: Array) -> Iterator[Array]:
    """The bytes of an array in C order, at most about PIECE at a time."""
    if array.flags.c_contiguous:
        flat = array.reshape(-1).view(np.uint8)
        for start in range(0, flat.size, PIECE):
            yield flat[start : start + PIECE]
        return
    rows = max(1, PIECE // (array.nbytes // array.shape[0]))
    for start in range(0, array.shape[0], rows):
        yield np.ascontiguousarray(array[start : start + rows]).reshape(-1).view(np.uint8)


def check_file(path: Path, size: int, digest: str) -> None:
    """DamagedCheckpoint unless the file has this size and SHA-256. Reads all of it."""
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{path} is missing") from None
    try:
        found = os.fstat(file).st_size
        if found != size:
            raise DamagedCheckpoint(f"{path} has {found} bytes, its manifest says {size}")
        if _digest_of(file, size) != digest:
            raise DamagedCheckpoint(
                f"{path} is not the file that was saved: its SHA-256 is another than the manifest's"
            )
    finally:
        os.close(file)


def _digest_of(file: int, size: int) -> str:
    """The SHA-256 of a file, hashing one piece while the next one is read."""
    digest, buffers = sha256(), [bytearray(min(PIECE, size)) for _ in range(2)]
    with ThreadPoolExecutor(1, "checkpoint-hash") as hasher:
        before = None
        for number, start in enumerate(range(0, size, PIECE)):
            view = memoryview(buffers[number % 2])[: min(PIECE, size - start)]
            read_exactly(file, start, view)
            if before is not None:
                before.result()
            before = hasher.submit(digest.update, view)
        if before is not None:
            before.result()
    return digest.hexdigest()


def read_exactly(file: int, begin: int, view: memoryview) -> None:
    """Fill `view` from position `begin` of an open file."""
    while view:
        count = os.preadv(file, [view], begin)
        if count == 0:
            raise DamagedCheckpoint(f"a file ends at byte {begin}, {len(view)} bytes too early")
        begin, view = begin + count, view[count:]


def _bytes(array: Array) -> memoryview:
    return memoryview(array.reshape(-1).view(np.uint8))  # type: ignore[arg-type]


def read_box(
    file: int, begin: int, chunk: Sequence[int], offsets: Sequence[int], dtype: Any, out: Array
) -> None:
    """Read the box at `offsets` of `out.shape` from a chunk whose data begin at `begin`.

    Only the rows (first dimension) of the box are read; where it has them whole and `out` is
    contiguous and of the chunk's dtype, straight into it. Values are cast as by `copy_`.
    """
    shape, sizes = tuple(chunk) or (1,), out.shape or (1,)
    out, start = out.reshape(sizes) if not out.ndim else out, (tuple(offsets) or (0,))
    row = int(np.prod(shape[1:], dtype=np.int64)) * dtype.itemsize
    first = begin + start[0] * row
    if sizes[1:] == shape[1:] and out.flags.c_contiguous and out.dtype == dtype:
        read_exactly(file, first, _bytes(out))
        return
    step = max(1, PIECE // row)
    columns = tuple(slice(o, o + n) for o, n in zip(start[1:], sizes[1:], strict=True))
    for top in range(0, sizes[0], step):
        rows = np.empty((min(step, sizes[0] - top), *shape[1:]), dtype)
        read_exactly(file, first + top * row, _bytes(rows))
        np.copyto(out[top : top + len(rows)], rows[(slice(None), *columns)], casting="unsafe")
