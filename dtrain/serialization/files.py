"""Writing files so that nobody ever sees half of one.

A file is written beside its place under a temporary name, flushed to the disk, and put in its
place by one rename; a crash leaves the earlier file, or none. What fails leaves no temporary file.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def published(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A new binary file that takes its place at `path` when the block ends without an exception.

    Waits for the disk (fsync of the file and its directory). Links are followed. Something that
    exists and is no regular file (a device, a pipe) is opened and written to directly.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        with open(target, "wb") as file:
            yield file
        return
    partial = target.with_name(f".{target.name}.{os.getpid()}.{os.urandom(4).hex()}.partial")
    try:
        with open(partial, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_directory(target.parent)


def sync_directory(directory: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
