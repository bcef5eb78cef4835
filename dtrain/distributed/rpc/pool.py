"""The threads that run what other workers call: `Pool`.

Rules: 1. at most `size` of them run at a time. 2. One that waits for a remote call does not count
(`waiting`), so that calls may come back to this worker however small the pool is. 3. Nothing spins:
idle threads block in a queue.
"""

from __future__ import annotations

import contextlib
import contextvars
import queue
import threading
from collections.abc import Callable, Iterator

_here = threading.local()


class Pool:
    """`size` threads, made when they are first needed, in copies of the maker's context."""

    def __init__(self, size: int, name: str) -> None:
        self.size, self._name = size, name
        self._context = contextvars.copy_context()
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads: set[threading.Thread] = set()
        self._waiting = self._idle = self._queued = 0
        self._closed = False

    def submit(self, task: Callable[[], None]) -> None:
        """Run `task`, which must not raise, in one of the threads; after `close` in this one."""
        with self._lock:
            if not self._closed:
                self._queued += 1
                self._tasks.put(task)
                self._reinforce()
                return
        task()

    def _reinforce(self) -> None:
        """One more thread if there is work for it and room; with the lock held."""
        if self._idle < self._queued and len(self._threads) - self._waiting < self.size:
            run = self._context.copy().run
            thread = threading.Thread(target=run, args=(self._work,), name=self._name, daemon=True)
            self._threads.add(thread)
            thread.start()

    def _work(self) -> None:
        _here.pool = self
        while True:
            with self._lock:
                if len(self._threads) - self._waiting > self.size:  # one that waited is back
                    self._threads.discard(threading.current_thread())
                    return
                self._idle += 1
            task = self._tasks.get()
            with self._lock:
                self._idle -= 1
                if task is None:
                    return
                self._queued -= 1
            task()
            del task  # what it held (references among it) goes now, not with the next one

    @property
    def busy(self) -> int:
        """How many tasks run or wait for a thread."""
        with self._lock:
            return self._queued + len(self._threads) - self._idle

    def _changed(self, by: int) -> None:
        with self._lock:
            self._waiting += by
            self._reinforce()

    def close(self, timeout: float) -> list[str]:
        """End the threads; returns the names of those that still run after `timeout` seconds."""
        with self._lock:
            self._closed = True
            threads = list(self._threads)
        for _ in threads:
            self._tasks.put(None)
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(timeout)
        return [thread.name for thread in threads if thread.is_alive()]


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    """Inside the block this thread waits for others: if it is a pool's, another may run instead."""
    pool: Pool | None = getattr(_here, "pool", None)
    if pool is None:
        yield
        return
    pool._changed(+1)
    try:
        yield
    finally:
        pool._changed(-1)
