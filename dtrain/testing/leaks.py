"""Does a block leave something behind? Threads, child processes, descriptors, shared memory, socket
directories.

Owns: `check_leaks`, a context manager that raises `LeakError` naming each thing that is there after
the block and was not before. What needs a moment to go away gets `grace` seconds.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import zmq
from zmq.utils.garbage import GarbageCollectorThread

from dtrain import flight
from dtrain.testing import processes

__all__ = ["LeakError", "check_leaks", "snapshot"]


class LeakError(AssertionError):
    """Something was left behind; the text names it."""


def snapshot() -> dict[str, str]:
    """{what: description} of everything this process holds that can leak.

    The fork server of process ranks is no leak: it is started once and ends with this process.
    """
    held: dict[str, str] = {}
    for thread in threading.enumerate():
        if not isinstance(thread, GarbageCollectorThread):
            held[f"thread {thread.name} ({thread.ident})"] = ""
    for task in os.listdir("/proc/self/task"):
        with suppress(FileNotFoundError):  # a thread that has just ended
            for child in Path(f"/proc/self/task/{task}/children").read_text().split():
                if int(child) != processes.own_process():
                    held[f"process {child}"] = ""
    for fd in set(os.listdir("/proc/self/fd")) - set(map(str, processes.own_descriptors())):
        with suppress(FileNotFoundError):  # the one that listed the directory
            held[f"descriptor {fd}"] = os.readlink(f"/proc/self/fd/{fd}")
    # Names carry the process id: other jobs on this machine are not ours to judge.
    for directory in (Path(tempfile.gettempdir()), Path("/dev/shm")):
        for path in directory.glob(f"dtrain-{os.getpid()}-*"):
            held[f"path {path}"] = ""
    return held


@contextmanager
def check_leaks(grace: float = 2.0) -> Iterator[None]:
    """Raise `LeakError` if the block leaves anything behind; not if the block itself raises."""
    # What pyzmq opens for zero-copy, and the flight record, live as long as the process: have them
    # opened before counting.
    zmq.Frame(bytearray(1), copy=False, copy_threshold=0)
    flight.here()
    before = snapshot()
    yield
    deadline = time.monotonic() + grace
    while left := _new(before, snapshot()):
        if time.monotonic() >= deadline:
            raise LeakError("left behind:\n" + "\n".join(map(_describe, left.items())))
        time.sleep(0.01)


def _new(before: dict[str, str], after: dict[str, str]) -> dict[str, str]:
    return {
        what: text
        for what, text in after.items()
        if what not in before or (what.startswith("descriptor") and before[what] != text)
    }


def _describe(item: tuple[str, str]) -> str:
    what, text = item
    for thread in threading.enumerate():
        if what == f"thread {thread.name} ({thread.ident})":
            frame = sys._current_frames().get(thread.ident or 0)
            text = "\n" + "".join(traceback.format_stack(frame))
    return f"{what}: {text}"
