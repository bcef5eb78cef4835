"""Saving and loading objects in torch.save's zip format.

`save` writes files that PyTorch reads; `load` reads PyTorch's and by default runs no code from
them (weights_only.py says how). Files appear at their place complete or not at all. The older
formats of PyTorch (before 1.6) are not read. For checkpoints of plain tensors safetensors is the
usual alternative, and its NumPy face is the idiom that also runs under PyTorch:
`safetensors.numpy.save_file({k: v.numpy() for k, v in model.state_dict().items()}, path)`.
Source: torch.serialization.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Mapping
from typing import IO, Any

import numpy as np

from dtrain.device import device
from dtrain.serialization.archive import ALIGNMENT, ArchiveReader, ArchiveWriter
from dtrain.serialization.files import published
from dtrain.serialization.pickled import TrustingUnpickler, Writer
from dtrain.serialization.portable import Storage, StorageType
from dtrain.serialization.weights_only import (
    add_safe_globals as add_safe_globals,
    clear_safe_globals as clear_safe_globals,
    get_safe_globals as get_safe_globals,
    safe_globals as safe_globals,
    unpickle,
)

MapLocation = str | device | Mapping[str, str] | Callable[[Any, str], Any]


def save(obj: object, f: str | os.PathLike[str] | IO[bytes]) -> None:
    """Write `obj` to a path or a writable binary file, in torch.save's zip format.

    Tensors that share memory share it in the file, which holds all of that memory: save a clone of
    a small view of something large. A path is replaced by one rename after the bytes are on the
    disk. Anything else than tensors and plain data is pickled, classes of dtrain.nn and
    dtrain.optim under PyTorch's names. Source: torch.save.
    """
    if isinstance(f, (str, os.PathLike)):
        with published(f) as file:
            _write(obj, file)
    elif callable(getattr(f, "write", None)):
        _write(obj, f)
    else:
        raise AttributeError(
            "expected 'f' to be string, path, or a file-like object with a 'write' attribute, got "
            + type(f).__name__
        )


def _write(obj: object, file: IO[bytes]) -> None:
    pickled = io.BytesIO()
    writer = Writer(pickled)
    writer.dump(obj)
    with ArchiveWriter(file) as archive:
        archive.add("data.pkl", pickled.getvalue())
        archive.add(".format_version", b"1")
        archive.add(".storage_alignment", str(ALIGNMENT).encode())
        archive.add("byteorder", sys.byteorder.encode())
        for storage in writer.storages():
            archive.add(f"data/{storage.key}", storage.array.view(np.uint8))
        archive.add("version", b"3\n")


def load(
    f: str | os.PathLike[str] | IO[bytes],
    map_location: MapLocation | None = None,
    *,
    weights_only: bool = True,
    mmap: bool = False,
) -> Any:
    """Read what `save` or torch.save wrote.

    With `weights_only`, the default, only tensors, plain data and what `add_safe_globals` allows
    are built, and no code is run; UnpicklingError ("Weights only load failed. ...") for all else.
    `weights_only=False` unpickles: IT RUNS ANY CODE THE FILE CONTAINS. Use it only for files from
    a source you trust; whole pickled modules need it.

    `map_location` says where storages saved on another device go: "cpu", a dict such as
    {"cuda:0": "cpu"}, or a function, which is accepted and not called, since there is one place.
    RuntimeError when a storage of another device has nowhere to go. `mmap` maps the file (a path)
    instead of reading it: pages are read when they are used, changes stay private.
    RuntimeError for a damaged file. Source: torch.load.
    """
    if isinstance(f, (str, os.PathLike)):
        with open(f, "rb") as file:
            return _read(file, map_location, weights_only, mmap)
    if mmap:
        raise ValueError(
            "f must be a file path in order to use the mmap argument, got " + type(f).__name__
        )
    return _read(f, map_location, weights_only, False)


def _read(
    file: IO[bytes], map_location: MapLocation | None, weights_only: bool, mapped: bool
) -> Any:
    archive = ArchiveReader(file, mapped)
    if archive.has("constants.pkl"):
        raise RuntimeError(
            "this is a TorchScript archive, which holds a compiled program; dtrain reads what "
            "torch.save wrote: save the module's state_dict"
        )
    if archive.has("byteorder") and archive.read("byteorder") != sys.byteorder.encode():
        raise RuntimeError(
            f"the file was written on a machine of the other byte order ({sys.byteorder} here); "
            "load and save it with PyTorch on this one"
        )
    storages = _Storages(archive, map_location)
    data = archive.read("data.pkl")
    if weights_only:
        return unpickle(data, storages.load)
    return TrustingUnpickler(io.BytesIO(data), storages.load).load()


class _Storages:
    """The storages of an archive, each read once, when it is first asked for."""

    def __init__(self, archive: ArchiveReader, map_location: MapLocation | None) -> None:
        self.archive = archive
        self.map_location = map_location
        self.loaded: dict[str, Storage] = {}

    def load(self, pid: Any) -> Storage:
        """The storage of a persistent id ("storage", type, key, location, count)."""
        _, kind, key, location, count = pid
        if not isinstance(kind, StorageType):
            raise RuntimeError(f"expected the type of a storage, got {kind!r}: the file is damaged")
        check_location(location, self.map_location)
        if key not in self.loaded:
            found = self.archive.array(f"data/{key}")
            size = count * (kind.dtype.itemsize if kind.dtype else 1)
            if found.nbytes != size:
                raise RuntimeError(
                    f"storage {key} has {found.nbytes} bytes, expected {size}: the file is damaged"
                )
            array = found.view(kind.dtype.numpy) if kind.dtype else found
            self.loaded[key] = Storage(key, array, kind.dtype)
        return self.loaded[key]


def check_location(location: str, map_location: MapLocation | None) -> None:
    """Refuse a storage that was not on the CPU, unless `map_location` brings it there."""
    if callable(map_location):
        return
    if isinstance(map_location, Mapping):
        location = map_location.get(location, location)
    elif map_location is not None:
        location = str(device(map_location))  # raises for anything but the CPU
    if not location.startswith("cpu"):
        raise RuntimeError(
            f"Attempting to deserialize object on a {location} device, but dtrain runs on the "
            "CPU. Please use load with map_location='cpu' to map your storages to the CPU."
        )
