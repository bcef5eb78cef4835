"""Checkpoints of many ranks to and from single files: PyTorch's `torch.save`, and safetensors.

Each runs in one process, without a process group, and verifies a checkpoint before it reads it;
`save_safetensors` alone is for all ranks, and makes a file of state that is in memory. To
and from safetensors one tensor is in memory at a time; a `torch.save` file is made and read as a
whole. Files appear complete or not at all. Source: torch.distributed.checkpoint.format_utils, for
the two with `torch_save` in their names.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from dtrain.autograd.node import make
from dtrain.distributed.checkpoint import _shard, _values
from dtrain.distributed.checkpoint._nested_dict import (
    flatten_state_dict,
    is_tensor,
    unflatten_state_dict,
)
from dtrain.distributed.checkpoint._together import Together
from dtrain.distributed.checkpoint._torch_save_reader import (
    BroadcastingTorchSaveReader as BroadcastingTorchSaveReader,
    DynamicMetaLoadPlanner as DynamicMetaLoadPlanner,
)
from dtrain.distributed.checkpoint._whole import WholeTensors
from dtrain.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from dtrain.distributed.checkpoint.metadata import TensorStorageMetadata
from dtrain.distributed.checkpoint.state_dict_saver import save
from dtrain.serialization import load as load_file, save as save_file
from dtrain.serialization.files import published

StrPath = str | os.PathLike[str]

# Where a safetensors file keeps the values of a checkpoint, which are no tensors: JSON.
_VALUES = "dtrain.values"


class Whole:
    """A verified checkpoint, tensor by tensor. DamagedCheckpoint unless every byte is as saved."""

    def __init__(self, folder: StrPath) -> None:
        self._reader = FileSystemReader(folder, fallback=False)
        self.metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(self.metadata, True)
        self._reader.verify(0, 1)

    @property
    def tensors(self) -> dict[str, TensorStorageMetadata]:
        """The tensors by their flat names."""
        entries = self.metadata.state_dict_metadata.items()
        return {name: entry for name, entry in entries if isinstance(entry, TensorStorageMetadata)}

    @property
    def values(self) -> dict[str, Any]:
        """What is no tensor, as JSON has it."""
        found: dict[str, Any] = self.metadata.storage_data["values"]
        return found

    def read(self, name: str) -> np.ndarray[Any, Any]:
        """One whole tensor, put together from its chunks."""
        stored = self.tensors[name]
        whole = np.empty(tuple(stored.size), stored.properties.dtype.numpy)
        places = self.metadata.storage_data["chunks"][name]
        for chunk, (file, begin) in zip(stored.chunks, places, strict=True):
            box = tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))
            part = whole[box] if box else whole
            with _opened(self._reader.path / file) as source:
                zeros = (0,) * len(chunk.sizes)
                _shard.read_box(source, begin, chunk.sizes, zeros, whole.dtype, part)
        return whole


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    file = os.open(path, os.O_RDONLY)
    try:
        yield file
    finally:
        os.close(file)


def dcp_to_torch_save(dcp_checkpoint_dir: StrPath, torch_save_path: StrPath) -> None:
    """A checkpoint as one nested state dict in a file of `torch.save`'s format.

    The whole state is in memory. DamagedCheckpoint, OSError.
    """
    whole = Whole(dcp_checkpoint_dir)
    flat: dict[str, Any] = {name: make(whole.read(name)) for name in whole.tensors}
    flat |= {name: _values.from_json(value) for name, value in whole.values.items()}
    ordered = {name: flat[name] for name in whole.metadata.planner_data}
    save_file(unflatten_state_dict(ordered, whole.metadata.planner_data), torch_save_path)


def torch_save_to_dcp(torch_save_path: StrPath, dcp_checkpoint_dir: StrPath) -> None:
    """A file of `torch.save` as a checkpoint. What is no tensor or plain data raises TypeError
    with its path; loading runs no code of the file (`weights_only`).
    """
    state = load_file(torch_save_path, weights_only=True)
    save(state, storage_writer=FileSystemWriter(dcp_checkpoint_dir), no_dist=True)


def dcp_to_safetensors(dcp_checkpoint_dir: StrPath, path: StrPath) -> None:
    """A checkpoint's tensors as one safetensors file, under their flat names ("model.0.weight").

    Values that are no tensors stand as JSON in the file's metadata. One tensor is in memory at a
    time. ValueError for a header above the format's limit of 100 MB.
    """
    whole = Whole(dcp_checkpoint_dir)
    # Larger numbers first, so that all data are aligned in the file.
    names = sorted(whole.tensors, key=lambda n: -whole.tensors[n].properties.dtype.itemsize)
    specs = [(n, whole.tensors[n].properties.dtype, whole.tensors[n].size) for n in names]
    _write(path, specs, whole.values, map(whole.read, names))


def _write(
    path: StrPath, specs: _shard.Specs, values: dict[str, Any], arrays: Iterable[Any]
) -> None:
    """One safetensors file, complete or not there."""
    header, _ = _shard.header_of(specs, {_VALUES: json.dumps(values)} if values else None)
    if len(header) > _shard.LIMIT:
        raise ValueError(f"{path}: a header of {len(header)} bytes, the format allows 100 MB")
    with published(path) as file:
        file.write(header)
        for array in arrays:
            for piece in _shard.pieces(array):
                file.write(memoryview(piece))  # type: ignore[arg-type]


def save_safetensors(
    state_dict: Mapping[str, Any], path: StrPath, process_group: Any = None
) -> None:
    """The state of all ranks as one safetensors file, which rank 0 writes; all ranks call it.

    Names and values as in `dcp_to_safetensors`. Parts come to rank 0 one tensor at a time: it holds
    one whole tensor that is cut, the others none. Blocks until the file is on the disk, then all
    ranks know; CheckpointException on all of them. Not in torch.
    """
    ranks = Together(process_group)
    flat, _ = flatten_state_dict(state_dict)
    whole = WholeTensors(flat, ranks)
    stream, failure = iter(whole), None
    values = {k: _values.to_json(v, k) for k, v in flat.items() if not is_tensor(v)}
    if ranks.rank == 0:
        try:
            _write(path, whole.specs, values, (array for _, array in stream))
        except Exception as error:  # the others send on, and are told below
            failure = error
    for _ in stream:
        pass

    def tell() -> None:
        if failure is not None:
            raise failure

    ranks.each(f"writing {path}", tell)


def safetensors_to_dcp(path: StrPath, dcp_checkpoint_dir: StrPath) -> None:
    """A safetensors file as a checkpoint, with the values that `dcp_to_safetensors` put there.

    Its tensors are mapped, not read. DamagedCheckpoint for a file that is none.
    """
    tensors, texts = _shard.read_header(Path(path))
    state: dict[str, Any] = {
        name: make(np.memmap(path, dtype.numpy, "r", begin, tuple(shape)))
        if np.prod(shape, dtype=np.int64)
        else make(np.empty(tuple(shape), dtype.numpy))
        for name, (dtype, shape, begin) in tensors.items()
    }
    values = json.loads(texts.get(_VALUES, "{}"))
    state |= {name: _values.from_json(value) for name, value in values.items()}
    save(state, storage_writer=FileSystemWriter(dcp_checkpoint_dir), no_dist=True)
