"""Every change that a checkpoint makes on the disk: the few system calls, each in one place.

Rules: what was written is on the disk before it gets its name (fsync of files, then of their
folder); a checkpoint gets its name by one rename, or by one exchange with the one it replaces, so
that at no moment there is none; nothing older is deleted before.
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

from dtrain.serialization.files import sync_directory

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_libc = ctypes.CDLL(None, use_errno=True)

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
        self.size += memoryview(piece).nbytes

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


def publish(partial: Path, target: Path, sync: bool = True) -> None:
    """Give the finished folder `partial` the name `target`; what had it is then at `partial`.

    OSError where the file system cannot exchange two names at once: save to a new name there.
    """
    if sync:
        sync_directory(partial)
    if _has_entries(target):
        _exchange(partial, target)
    else:
        os.rename(partial, target)  # also over an empty folder
    if sync:
        sync_directory(target.parent)


def _has_entries(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _exchange(first: Path, second: Path) -> None:
    paths = os.fsencode(first), os.fsencode(second)
    if _libc.renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE):
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
