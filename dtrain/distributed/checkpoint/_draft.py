"""A checkpoint in the making: a folder beside its place, `.NAME.RANDOM.partial`.

Rules: it is on the disk before it gets its name, by one rename, or by one exchange with the one
that it replaces; nothing older is deleted before. While its maker lives, it is locked (flock); what
a killed save left behind is not, and the next save of the series sweeps it away (where the file
system knows no locks of folders, it stays).
"""

from __future__ import annotations

import fcntl
import os
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from dtrain.distributed.checkpoint import _disk, _series
from dtrain.serialization.files import sync_directory

_SUFFIX = ".partial"


def hidden(target: Path) -> Path:
    """A new name beside `target` under which nobody looks for a checkpoint."""
    return target.with_name(f".{target.name}.{os.urandom(4).hex()}{_SUFFIX}")


def discard(folder: Path) -> None:
    """Delete a folder, which first stops being a checkpoint. A warning where that fails."""
    try:
        if not folder.name.endswith(_SUFFIX):
            nameless = hidden(folder)
            os.rename(folder, nameless)
            folder = nameless
        _disk.remove(folder)
    except OSError as error:
        warnings.warn(f"{folder} could not be deleted: {error}", stacklevel=2)


class Draft:
    """The folder `path`, which will be `target`. OSError when it cannot be made."""

    def __init__(self, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        sweep(target)
        self.target, self.path = target, hidden(target)
        os.mkdir(self.path)
        self._held = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        with suppress(OSError):
            fcntl.flock(self._held, fcntl.LOCK_EX)

    def publish(self, sync: bool = True) -> Path | None:
        """Give it its name and wait for the disk. Returns where what had the name before is now.

        OSError when it could not: then what had the name has it still, or again.
        """
        if sync:
            os.fsync(self._held)
        replaces = self.target.is_dir() and any(self.target.iterdir())
        move = _disk.exchange if replaces else os.rename  # rename also takes an empty folder's name
        move(self.path, self.target)
        if sync:
            try:
                sync_directory(self.target.parent)
            except OSError:
                move(self.target, self.path)
                raise
        os.close(self._held)
        return self.path if replaces else None

    def give_up(self) -> None:
        """Delete it, if it is still a draft."""
        own = os.fstat(self._held)
        if self.path.exists() and os.path.samestat(own, os.stat(self.path)):
            discard(self.path)
        os.close(self._held)


def sweep(target: Path) -> None:
    """Delete what killed saves of `target`, or of its series, have left behind."""
    for folder in _drafts(target):
        held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with suppress(OSError):  # BlockingIOError: its maker lives
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                discard(folder)
        finally:
            os.close(held)


def _drafts(target: Path) -> Iterator[Path]:
    for folder in list(target.parent.iterdir()):
        name, dot, _ = folder.name.removesuffix(_SUFFIX).rpartition(".")
        ours = dot and folder.name.endswith(_SUFFIX) and name.startswith(".")
        if ours and _series.are_kin(name[1:], target.name) and folder.is_dir():
            yield folder
