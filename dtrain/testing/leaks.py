"""Does a block leave something behind? Threads, child processes, descriptors, shared memory, socket directories.

Owns: `check_leaks`, a context manager that raises `LeakError` naming each thing that is there after the block and was
not before. What needs a moment to go away gets `grace` seconds.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from zmq.utils.garbage import GarbageCollectorThread, gc

__all__ = ["LeakError", "check_leaks", "snapshot"]


class LeakError(AssertionError):
    """Something was left behind; the text names it."""


def snapshot() -> dict[str, str]:
    """{what: description} of everything this process holds that can leak."""
    held: dict[str, str] = {}
    frames = sys._current_frames()
    for thread in threading.enumerate():
        if not isinstance(thread, GarbageCollectorThread):
            stack = "".join(traceback.format_stack(frames.get(thread.ident or 0)))
            held[f"thread {thread.name} ({thread.ident})"] = stack
    for child in psutil.Process().children(recursive=True):
        held[f"process {child.pid}"] = child.name()
    for fd in os.listdir("/proc/self/fd"):
        try:
            held[f"descriptor {fd}"] = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:
            continue  # the one that listed the directory
    # Names carry the process id: other jobs on this machine are not ours to judge.
    for directory in (Path(tempfile.gettempdir()), Path("/dev/shm")):
        for path in directory.glob(f"dtrain-{os.getpid()}-*"):
            held[f"path {path}"] = ""
    return held


@contextmanager
def check_leaks(grace: float = 2.0) -> Iterator[None]:
    """Raise `LeakError` if the block leaves anything behind; not if the block itself raises."""
    gc.store(b"")  # pyzmq's own thread, which lives as long as the process: start it before counting
    before = snapshot()
    yield
    deadline = time.monotonic() + grace
    while left := _new(before, snapshot()):
        if time.monotonic() >= deadline:
            raise LeakError("left behind:\n" + "\n".join(f"{k}: {v}" for k, v in left.items()))
        time.sleep(0.01)


def _new(before: dict[str, str], after: dict[str, str]) -> dict[str, str]:
    return {
        what: text
        for what, text in after.items()
        if what not in before or (what.startswith("descriptor") and before[what] != text)
    }
