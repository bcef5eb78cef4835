"""A store in one file on a file system that all ranks see: an append-only log of commands.

Owns: the format of that log: msgpack values, first {"dtrain store": 1, "run": run id}, then
[command, args] of every command that changed something. Rules: 1. a reader or writer holds an
exclusive `fcntl` lock while it works. 2. A log of another run id is left over from an earlier job:
it is unlinked and a new one begun. 3. A half-written command at the end (its writer was killed) is
cut off by the next writer. Waiting means looking again: a file cannot wake anybody.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgpack

from dtrain.comm.store.base import (
    DEFAULT_TIMEOUT,
    MUTATING,
    NotYet,
    Store,
    Table,
    Timeout,
    timed_out,
)
from dtrain.errors import DistStoreError
from dtrain.wire import dumps

__all__ = ["FileStore"]

_MARK = "dtrain store"
_FIRST_LOOK, _LAST_LOOK = 0.001, 0.05  # seconds between looks, doubling


class FileStore(Store):
    """The store in the file `path`, made if it is missing. All ranks of a job must give the same
    `run_id`.

    The file stays behind. A later job with another run id begins a new one; one with the same run
    id goes on with its keys, and a gather that the earlier job left incomplete is reported as such
    instead of waiting for ranks that are gone.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, run_id: str = "", timeout: Timeout = DEFAULT_TIMEOUT
    ) -> None:
        super().__init__(timeout)
        self.path, self.run_id = Path(path), run_id
        self._thread_lock = threading.Lock()
        self._closed = False
        self._run: str | None = None  # the run id in the log, once it has been read
        self._open()

    def _open(self) -> None:
        """Open the log of this run.

        One of another run is unlinked, and so left to those who still have it open.
        """
        while True:
            self._reset()
            try:
                # Private to the user: whoever can write the log can write the job's keys.
                self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except OSError as error:
                raise DistStoreError(f"cannot open {self.path}: {error.strerror}") from error
            try:
                with self._locked():
                    if self._is_linked() and self._join_run():
                        return
            except BaseException:
                self.close()
                raise
            os.close(self._fd)

    def _is_linked(self) -> bool:
        return os.fstat(self._fd).st_nlink > 0

    def _join_run(self) -> bool:
        """Read the log, or begin it if it is empty.

        False when it was of another run and has been unlinked.
        """
        run = self._catch_up()
        if run is None:
            self._append({_MARK: 1, "run": self.run_id})
            self._run = self.run_id
        elif run != self.run_id:
            self.path.unlink()
            return False
        return True

    def _reset(self) -> None:
        self._table = Table()
        self._at = 0  # end of what the table has seen
        self._run = None

    def _call(self, command: str, args: list[Any], timeout: float) -> Any:
        deadline, pause = time.monotonic() + timeout, _FIRST_LOOK
        while True:
            try:
                return self._do(command, args)
            except NotYet as waiting:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise timed_out(waiting, timeout) from None
            time.sleep(min(pause, left))
            pause = min(2 * pause, _LAST_LOOK)

    def _gather(self, key: str, rank: int, size: int, value: bytes, timeout: float) -> list[bytes]:
        number = self._call("join", [key, rank, size, value], timeout)
        return list(self._call("collect", [key, number, rank], timeout))

    def _do(self, command: str, args: list[Any]) -> Any:
        with self._locked():
            if not self._is_linked():
                raise DistStoreError(f"{self.path} has been removed or taken over by another run")
            self._catch_up()
            result = self._table.do(command, args)
            if command in MUTATING:
                self._append([command, args])
            return result

    @contextmanager
    def _locked(self) -> Iterator[None]:
        # The file lock excludes other processes and other FileStores, the thread lock other threads
        # of this one.
        with self._thread_lock:
            if self._closed:
                raise DistStoreError(f"the store in {self.path} is closed")
            fcntl.flock(self._fd, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(self._fd, fcntl.LOCK_UN)

    def _catch_up(self) -> str | None:
        """Apply what others have written since the last look.

        The run id of the log, None for an empty one.
        """
        start = self._at
        unpacker = msgpack.Unpacker(raw=False, strict_map_key=False)
        unpacker.feed(os.pread(self._fd, os.fstat(self._fd).st_size - start, start))
        for entry in unpacker:
            if self._run is not None:
                self._table.do(*entry)
            elif isinstance(entry, dict) and _MARK in entry:
                self._run = entry["run"]
            else:
                raise DistStoreError(f"{self.path} is not a store file: it is left as it is")
            self._at = start + unpacker.tell()
        return self._run

    def _append(self, entry: Any) -> None:
        data = dumps(entry)
        # What is behind the last whole entry was half-written by a process that was killed.
        os.ftruncate(self._fd, self._at)
        os.pwrite(self._fd, data, self._at)
        self._at += len(data)

    def clone(self) -> FileStore:
        twin = object.__new__(type(self))  # a subclass may have another __init__
        FileStore.__init__(twin, self.path, run_id=self.run_id, timeout=self.timeout)
        return twin

    def close(self) -> None:
        """Close the file; it stays where it is."""
        with self._thread_lock:
            if not self._closed:
                self._closed = True
                os.close(self._fd)
