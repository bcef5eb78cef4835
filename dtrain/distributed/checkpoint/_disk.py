"""What a checkpoint does on the disk: new files with a digest, the exchange of two names.

A file is hashed while it is written, and closing it waits for the disk. In which order files and
folders come to be is said in _draft.py.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
# Of Linux; a C library without it answers as a file system would that cannot.
_renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", lambda *_: -1)

# Written and hashed at once; two of them are in memory where an array is not contiguous.
PIECE = 8 << 20


class NewFile:
    """A file that is hashed while it is written: `sha256` and `size` when it is closed.

    Hashing runs beside writing, in a thread: both leave the GIL. With `sync`, closing waits for
    the disk.
    """

    def __init__(self, path: Path, sync: bool = True) -> None:
        self.path, self.size, self.sync = path, 0, sync
        self._digest = sha256()
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._hasher = ThreadPoolExecutor(1, "checkpoint-hash")

    def write(self, piece: Any) -> None:
        """Append a contiguous buffer of bytes; blocks until it is hashed and written."""
        view = memoryview(piece)
        hashed = self._hasher.submit(self._digest.update, view)
        try:
            while view:
                view = view[os.write(self._file, view) :]
        finally:
            hashed.result()
        if self.sync:
            self._start_writing(memoryview(piece).nbytes)
        self.size += memoryview(piece).nbytes

    def _start_writing(self, count: int) -> None:
        """Let the disk begin with the last `count` bytes while the next are hashed.

        Linux writes dirty pages out when it is told that they will not be needed, and does not
        wait; without it all of them wait for fsync.
        """
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file, self.size, count, os.POSIX_FADV_DONTNEED)

    @property
    def sha256(self) -> str:
        """The digest of what was written, as hex."""
        return self._digest.hexdigest()

    def __enter__(self) -> NewFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._hasher.shutdown()
        try:
            if error is None and self.sync:
                os.fsync(self._file)
        finally:
            os.close(self._file)


def exchange(first: Path, second: Path) -> None:
    """Give each of two folders the other's name in one step; OSError where that cannot be."""
    paths = os.fsencode(first), os.fsencode(second)
    ctypes.set_errno(errno.ENOSYS)
    if _renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE):
        code = ctypes.get_errno()
        if code in (errno.EINVAL, errno.ENOSYS):
            raise OSError(
                code,
                "this file system cannot exchange two folders in one step, so replacing the "
                "checkpoint would leave a moment without one: save each to a new folder "
                "(step-1, step-2, ...), with FileSystemWriter(keep=2) to delete old ones",
                str(second),
            )
        raise OSError(code, os.strerror(code), str(second))


def remove(folder: Path) -> None:
    """Delete a folder that is no checkpoint any more, or never became one."""
    shutil.rmtree(folder)
