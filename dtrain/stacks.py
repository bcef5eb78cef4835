"""What the main thread of another process is doing now.

Owns: the files in which a process tells others of itself (`own_file`, `nameless`), and stacks. A
rank asks the interpreter (faulthandler) to write the stack of its main thread into such a file
whenever a certain signal comes; that works also while the thread computes or is stuck in C, and
needs no thread that waits for requests. Standard library only. Rules: 1. nobody is sent the signal
who has not said in its flight record that it listens: others would die of it. 2. Reading never
blocks for longer than `PATIENCE`.
"""

from __future__ import annotations

import contextlib
import faulthandler
import linecache
import os
import re
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from dtrain.processes import ENDED, STOPPED, start_of, state_of

__all__ = [
    "Frame",
    "answer",
    "beside",
    "in_words",
    "nameless",
    "of_process",
    "of_thread",
    "own_file",
]

SIGNAL = signal.SIGRTMIN + 12
PATIENCE = 0.5
_LOOK = 0.005

_HEAD = "Stack (most recent call first):\n"
_LINE = re.compile(r'  File "(.*)", line (\d+) in (.*)')
_PACKAGE = os.path.dirname(os.path.abspath(__file__)) + os.sep
# Frames that a launcher has put below the user's.
_BELOW = (f"{os.sep}dtrun{os.sep}worker.py", "<frozen runpy>", f"{os.sep}threading.py")
_SHOWN = 8

Frame = tuple[str, int, str]  # file, line, function; the innermost comes first


def own_file(name: str) -> int:
    """A new file in which this process tells others of itself: a descriptor.

    `<name>-<rank>` in the run directory; nameless without one, and in a child of the rank.
    """
    directory, rank = os.environ.get("DTRAIN_RUN_DIR"), os.environ.get("RANK")
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND
    if directory and rank:
        with contextlib.suppress(FileExistsError):  # our parent's
            return os.open(Path(directory, f"{name}-{rank}"), flags, 0o600)
    return os.memfd_create(f"dtrain-{name}-{os.getpid()}", os.MFD_CLOEXEC)


def nameless(name: str, pid: int) -> Path | None:
    """Where the nameless file of a living process can be opened."""
    descriptors = Path(f"/proc/{pid}/fd")
    try:
        for path in descriptors.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if os.readlink(path).startswith(f"/memfd:dtrain-{name}-{pid} "):
                    return path
    except (FileNotFoundError, PermissionError, ProcessLookupError):
        return None
    return None


def beside(flight: str) -> Path | None:
    """Where the process writes its stack whose flight record is at that path."""
    path = Path(flight)
    if path.name.startswith("flight-"):
        return path.with_name(path.name.replace("flight-", "stack-"))
    return nameless("stack", int(path.parts[2]))  # /proc/PID/fd/N


def answer() -> int:
    """Write the main thread's stack whenever the returned signal comes, for good.

    0 where the program uses that signal itself.
    """
    if signal.getsignal(SIGNAL) is not signal.SIG_DFL:
        return 0
    faulthandler.register(SIGNAL, own_file("stack"), all_threads=False)
    return int(SIGNAL)


def of_process(pid: int, started: int, number: int, file: Path | None) -> list[Frame] | str:
    """The stack of a process that answers signal `number`, or why there is none.

    `started` (`processes.start_of`) tells it from a later one; `file` is where it writes.
    """
    state = state_of(pid)
    if state == ENDED or start_of(pid) != started:
        return "its process has ended"
    if state in STOPPED:
        return "its process is stopped (SIGSTOP)"
    if not number or file is None:
        return "its stack cannot be asked for"
    if not file.exists():  # the record was copied from elsewhere
        return "its stack cannot be asked for"
    before = file.stat().st_size
    os.kill(pid, number)
    deadline = time.monotonic() + PATIENCE
    size = before
    while time.monotonic() < deadline:
        time.sleep(_LOOK)
        now = file.stat().st_size
        if now == size > before:  # nothing more has come since the last look
            return parse(file.read_text(encoding="utf-8", errors="replace"))
        size = now
    return f"it does not answer (state {state_of(pid)}, as ps shows it)"


def parse(text: str) -> list[Frame]:
    """The last stack in what faulthandler has written."""
    found = map(_LINE.fullmatch, text.rpartition(_HEAD)[2].splitlines())
    return [(match[1], int(match[2]), match[3]) for match in found if match]


def of_thread(ident: int) -> list[Frame]:
    """The stack of a thread of this process; empty when it has ended."""
    frame: FrameType | None = sys._current_frames().get(ident)
    frames = []
    while frame is not None:
        frames.append((frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
        frame = frame.f_back
    return frames


def in_words(frames: list[Frame]) -> list[str]:
    """As Python shows it, the innermost call last; without what dtrain and dtrun put around it."""
    inner = [frame for frame in frames if not frame[0].startswith(_PACKAGE)] or frames
    shown = [frame for frame in inner if not any(own in frame[0] for own in _BELOW)] or inner
    lines = []
    for file, line, function in reversed(shown[:_SHOWN]):
        lines.append(f'File "{file}", line {line}, in {function}')
        source = linecache.getline(file, line).strip()
        if source:
            lines.append(f"  {source}")
    return lines
