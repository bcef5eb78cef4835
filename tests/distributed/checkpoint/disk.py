"""A disk that fails, dies, or loses power at a chosen event; and what would be left on it.

`Disk` stands between the program and everything it does to files below one folder: each change is
an event, recorded in order, and may be struck. `Remains` replays recorded events on a model of a
disk that keeps only what it must: the content of a file up to its last fsync, the names in a folder
up to that folder's last fsync. Rule: what is not recorded is not covered, so `Disk` counts the
calls it knows, and a test compares what the model and the real folder hold at the end.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from dtrain.distributed.checkpoint import _disk

Strike = Callable[[int, str], str | OSError | None]


class Killed(BaseException):
    """The process is gone: raised by every change from the struck one on."""


class Disk:
    """Everything that happens below `folder` while `watched()`.

    `strike(number, kind)` is asked before each event: an OSError is raised in its place, "die"
    kills the process there (a write is half done then).
    """

    def __init__(self, folder: Path, strike: Strike = lambda number, kind: None) -> None:
        self.folder, self.strike = os.path.realpath(folder), strike
        self.events: list[tuple[str, ...]] = []
        self.dead = False
        self._lock = threading.RLock()
        self._folders: set[int] = set()

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Stand between; a process that died here has all its folders closed, as by the kernel."""
        self._real = {n: getattr(os, n) for n in ("open", "close", "write", "fsync", "mkdir")}
        self._real |= {n: getattr(os, n) for n in ("rename", "unlink", "rmdir")}
        with pytest.MonkeyPatch.context() as patch:
            for name in self._real:
                patch.setattr(os, name, getattr(self, f"_{name}"))
            self._exchanged = _disk.exchange
            patch.setattr(_disk, "exchange", self._exchange)
            yield
        for number in self._folders if self.dead else ():
            os.close(number)

    # --- what stands in the place of os' functions ---

    def _open(self, path, flags, mode=0o777, *, dir_fd=None):
        where = self._place(path, dir_fd)
        if where is not None and flags & os.O_CREAT:
            return self._event("create", where, do=lambda: self._real["open"](path, flags, mode))
        found = self._real["open"](path, flags, mode, dir_fd=dir_fd)
        if where is not None and flags & os.O_DIRECTORY:
            self._folders.add(found)
        return found

    def _close(self, number):
        self._folders.discard(number)
        self._real["close"](number)

    def _write(self, number, data):
        where = self._place(number)
        if where is None:
            return self._real["write"](number, data)
        content = bytes(data)
        half = content[: len(content) // 2]
        return self._event(
            "write", where, content,
            do=lambda: self._real["write"](number, data),
            half=lambda: self._real["write"](number, half),
        )  # fmt: skip

    def _fsync(self, number):
        where = self._place(number)
        self._event("fsync", where, do=lambda: self._real["fsync"](number))

    def _mkdir(self, path, mode=0o777, *, dir_fd=None):
        where = None if os.path.isdir(path) else self._place(path)  # an old one is no change
        self._event("mkdir", where, do=lambda: self._real["mkdir"](path, mode))

    def _rename(self, old, new):
        do = lambda: self._real["rename"](old, new)  # noqa: E731
        self._event("rename", self._place(old), self._place(new), do=do)

    def _exchange(self, one, other):
        do = lambda: self._exchanged(one, other)  # noqa: E731
        self._event("exchange", self._place(one), self._place(other), do=do)

    def _unlink(self, path, *, dir_fd=None):
        do = lambda: self._real["unlink"](path, dir_fd=dir_fd)  # noqa: E731
        self._event("unlink", self._place(path, dir_fd), do=do)

    def _rmdir(self, path, *, dir_fd=None):
        do = lambda: self._real["rmdir"](path, dir_fd=dir_fd)  # noqa: E731
        self._event("rmdir", self._place(path, dir_fd), do=do)

    def _place(self, path, dir_fd=None):
        """The path below the folder, None for what is elsewhere."""
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        elif dir_fd is not None:
            path = os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), path)
        path = os.path.abspath(path)
        inside = path == self.folder or path.startswith(self.folder + "/")
        return os.path.relpath(path, self.folder) if inside else None

    def _event(self, kind, where, *more, do, half=lambda: None):
        if where is None:
            return do()
        with self._lock:
            if self.dead:
                raise Killed
            struck = self.strike(len(self.events), kind)
            self.events.append((kind, where, *more))
            if struck == "die":
                half()
                self.dead = True
                raise Killed
            if struck is not None:
                raise struck
            return do()


# --- what is left ------------------------------------------------------------------------------


@dataclass
class File:
    """Content, and what of it an fsync has reached."""

    data: bytes = b""
    synced: bytes = b""


@dataclass
class Folder:
    """Names, and those that an fsync has reached."""

    names: dict[str, File | Folder] = field(default_factory=dict)
    synced: dict[str, File | Folder] = field(default_factory=dict)


LOSSES: dict[str, Callable[[File], bytes]] = {
    "kept": lambda file: file.data,
    "dropped": lambda file: file.synced,
    "torn": lambda file: file.data[: (len(file.synced) + len(file.data)) // 2],
    "zeroed": lambda file: file.synced + bytes(len(file.data) - len(file.synced)),
}


class Remains:
    """A model disk that replays events; `leave` makes real what a power cut now would leave."""

    def __init__(self) -> None:
        self.root = Folder()

    def _at(self, path: str) -> tuple[Folder, str]:
        *parents, name = path.split("/")
        folder = self.root
        for parent in parents:
            folder = folder.names[parent]  # type: ignore[assignment]
        return folder, name

    def replay(self, kind: str, path: str, *more) -> None:
        """One event."""
        folder, name = self._at(path)
        if kind in ("mkdir", "create"):
            folder.names[name] = Folder() if kind == "mkdir" else File()
        elif kind == "write":
            folder.names[name].data += more[0]
        elif kind == "fsync":
            found = self.root if path == "." else folder.names[name]
            if isinstance(found, File):
                found.synced = found.data
            else:
                found.synced = dict(found.names)
        elif kind in ("rename", "exchange"):
            other, new = self._at(more[0])
            moved, back = folder.names.pop(name), other.names.get(new)
            other.names[new] = moved
            if kind == "exchange":
                folder.names[name] = back
        else:
            del folder.names[name]

    def leave(self, target: Path, loss: str, names_lost: bool) -> None:
        """Write the tree to `target`: unsynced content lost in one way, unsynced names or not."""
        _write(self.root, target, LOSSES[loss], names_lost)


def _write(folder: Folder, target: Path, content: Callable[[File], bytes], lost: bool) -> None:
    target.mkdir()
    for name, found in (folder.synced if lost else folder.names).items():
        if isinstance(found, File):
            (target / name).write_bytes(content(found))
        else:
            _write(found, target / name, content, lost)
