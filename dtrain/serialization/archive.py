"""The zip file that torch.save writes: uncompressed records, aligned to 64 bytes.

Records are `<root>/data.pkl` (the object), `<root>/data/<key>` (the bytes of one storage), and
`version`, `byteorder`, ... which say how to read them. Nothing here knows what they mean.
Reading checks the CRC of every record; a mapped storage is not read, and so not checked.
"""

from __future__ import annotations

import mmap
import struct
import zipfile
from types import TracebackType
from typing import IO, Any

import numpy as np

ROOT = "archive"
ALIGNMENT = 64
_LOCAL_HEADER = struct.Struct("<26x2H")  # the two lengths at the end of a record's fixed header


class ArchiveWriter:
    """Writes records one after another; `close` (or the end of the `with`) completes the file."""

    def __init__(self, file: IO[bytes]) -> None:
        self._zip = zipfile.ZipFile(file, "w", zipfile.ZIP_STORED)
        self._start = self._zip.start_dir

    def add(self, name: str, data: Any) -> None:
        """Add a record: bytes, or any contiguous buffer of bytes."""
        info = zipfile.ZipInfo(f"{ROOT}/{name}")  # dated 1980, so that equal contents are equal
        info.CRC, info.file_size = 0, memoryview(data).nbytes
        zip64 = info.file_size >= 2**30  # sizes that need the longer header, with room to spare
        end = self._zip.start_dir - self._start + len(info.FileHeader(zip64)) + 4
        padding = -end % ALIGNMENT
        info.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding  # torch's way to align
        with self._zip.open(info, "w", force_zip64=zip64) as record:
            record.write(data)

    def __enter__(self) -> ArchiveWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._zip.close()


class ArchiveReader:
    """Reads records. RuntimeError, in torch's words, for what is damaged, missing or no archive.

    With `mapped`, storages are views of the mapped file: memory is used page by page, and what is
    written to them stays private.
    """

    def __init__(self, file: IO[bytes], mapped: bool = False) -> None:
        self._file = file
        try:
            self._zip = zipfile.ZipFile(file)
        except zipfile.BadZipFile as error:
            raise RuntimeError(
                "PytorchStreamReader failed reading zip archive: failed finding central directory "
                f"({error}). The file is incomplete, or not one of torch.save's zip format; files "
                "of PyTorch before 1.6 must be saved again by a newer one"
            ) from None
        names = self._zip.namelist()
        self._root = names[0].partition("/")[0] if names else ROOT
        self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) if mapped else None

    def _find(self, name: str) -> zipfile.ZipInfo:
        try:
            info = self._zip.getinfo(f"{self._root}/{name}")
        except KeyError:
            raise RuntimeError(
                f"PytorchStreamReader failed locating file {name}: file not found"
            ) from None
        if info.compress_type != zipfile.ZIP_STORED:
            raise RuntimeError(f"record {name} is compressed, which torch.save never does")
        return info

    def has(self, name: str) -> bool:
        return f"{self._root}/{name}" in self._zip.NameToInfo

    def read(self, name: str) -> bytes:
        """The bytes of a record."""
        try:
            return self._zip.read(self._find(name))
        except zipfile.BadZipFile as error:
            raise RuntimeError(f"PytorchStreamReader failed reading file {name}: {error}") from None

    def array(self, name: str) -> np.ndarray:
        """The bytes of a record as a writable uint8 array."""
        info = self._find(name)
        if self._map is None:
            return np.frombuffer(bytearray(self.read(name)), np.uint8)
        name_length, extra_length = _LOCAL_HEADER.unpack_from(self._map, info.header_offset)
        start = info.header_offset + _LOCAL_HEADER.size + name_length + extra_length
        if start + info.file_size > len(self._map):
            raise RuntimeError(f"PytorchStreamReader failed reading file {name}: out of bounds")
        return np.frombuffer(self._map, np.uint8, info.file_size, start)
