"""What the workers print: from their pipes to the console, line by line, and to log files.

Bytes pass through unchanged; a console line begins with the prefix of its worker. A complete line
is shown at once, an incomplete one (a prompt, a progress bar) after TAIL_SECONDS or when it grows
beyond TAIL_BYTES, and then its owner may go on with it. A console that does not take data never
blocks the launcher: data waits in `Console.pending`, and beyond FULL the caller stops reading.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
from collections.abc import Sequence

TAIL_SECONDS = 0.1
TAIL_BYTES = 64 * 1024
FULL = 1 << 20
# A poll that says "writable" promises this much for a pipe (PIPE_BUF).
CHUNK = 4096
# A new line starts after a newline, and after the carriage return of a progress bar.
LINE_START = re.compile(rb"(?:\n|\r(?!\n))(?=.)", re.DOTALL)


class Console:
    """A descriptor of ours that others read: never blocks, forgets what nobody reads any more."""

    def __init__(self, fd: int, *, closed: bool = False) -> None:
        self.fd = fd
        self.pending = bytearray()
        self.closed = closed  # nobody reads: the reader went away, as with `| head -1`

    def write(self, data: bytes) -> None:
        """Queue `data` and write what can be written now."""
        if not self.closed:
            self.pending += data
            self.flush()

    def flush(self) -> None:
        """Write what can be written now; an error means that nobody will ever read it."""
        try:
            while self.pending and self._writable():
                del self.pending[: os.write(self.fd, self.pending[:CHUNK])]
        except OSError:
            self.closed = True
            self.pending.clear()

    def _writable(self) -> bool:
        poll = select.poll()
        poll.register(self.fd, select.POLLOUT)
        return bool(poll.poll(0))


class Mux:
    """Keeps whole lines of several sources apart on one screen.

    `stdout` and `stderr` share one Mux when they are the same file or terminal.
    """

    def __init__(self) -> None:
        self._owner: Source | None = None  # whose incomplete line the cursor stands in
        self._last = b"\n"

    def emit(self, source: Source, data: bytes) -> None:
        """Show `data`, prefixed wherever a line begins."""
        if self._owner not in (None, source):
            self.end_line()
        begins = self._last == b"\n" or (self._last == b"\r" and data[:1] != b"\n")
        # A progress bar begins with a carriage return: the prefix comes after that, below.
        begins = begins and not (data[:1] == b"\r" and data[1:2] not in (b"", b"\n"))
        text = LINE_START.sub(lambda found: found[0] + source.prefix, data)
        source.console.write(source.prefix + text if begins else text)
        self._last = data[-1:]
        self._owner = None if self._last == b"\n" else source

    def end_line(self) -> None:
        """Leave the cursor at the start of a line."""
        if self._owner is not None:
            self._owner.console.write(b"\n")
            self._owner, self._last = None, b"\n"


class Source:
    """One output stream of one worker, on its way to a console and perhaps to a log file."""

    def __init__(
        self,
        prefix: bytes,
        console: Console,
        mux: Mux,
        log: LogFile | None = None,
        copy: Copy | None = None,
    ) -> None:
        self.prefix = prefix
        self.console = console
        self.deadline: float | None = None  # when an incomplete line is shown all the same
        self._mux = mux
        self._log = log
        self._copy = copy
        self._line = b""  # the beginning of one, shown or not
        self._tail = b""

    def feed(self, data: bytes, now: float) -> None:
        """Take what the worker wrote; `now` is in seconds of any one monotonic clock."""
        if self._log is not None:
            self._log.write(data)
        if self._copy is not None:
            *whole, self._line = (self._line + data).split(b"\n")
            self._copy.take(self.prefix, whole)
        lines, newline, self._tail = (self._tail + data).rpartition(b"\n")
        if newline:
            self._mux.emit(self, lines + newline)
            self.deadline = None
        if self._tail and self.deadline is None:
            self.deadline = now + TAIL_SECONDS
        if len(self._tail) > TAIL_BYTES:
            self.show_tail()

    def end(self) -> None:
        """Nothing more comes."""
        self.show_tail()
        if self._copy is not None and self._line:
            self._copy.take(self.prefix, [self._line])

    def show_tail(self) -> None:
        """Show the incomplete line as it stands."""
        if self._tail:
            self._mux.emit(self, self._tail)
        self._tail, self.deadline = b"", None


class LogFile:
    """A log file that the launcher writes; when it cannot be written, that is said once."""

    def __init__(self, path: str, console: Console) -> None:
        self.path = path
        self._console = console
        self._fd: int | None = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def write(self, data: bytes) -> None:
        """Append `data`; blocks as long as the file system does."""
        try:
            while self._fd is not None and data:
                data = data[os.write(self._fd, data) :]
        except OSError as error:
            self._console.write(f"dtrun: {self.path} is incomplete: {error.strerror}\n".encode())
            self.close()

    def close(self) -> None:
        """Close the file; later writes are dropped."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


class Copy:
    """Writes the lines that have one of some `words` to a file, with the prefix of their worker."""

    def __init__(self, words: Sequence[str], log: LogFile) -> None:
        self._words = [word.encode() for word in words]
        self._log = log

    def take(self, prefix: bytes, lines: Sequence[bytes]) -> None:
        """Keep those of these whole lines that are asked for."""
        kept = [line for line in lines if any(word in line for word in self._words)]
        self._log.write(b"".join(prefix + line + b"\n" for line in kept))


def same_file(one: int, other: int) -> bool:
    """Whether two descriptors show on the same screen."""
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(one), os.fstat(other))
    return False


def make_log_dir(base: str, run_id: str) -> str:
    """torchrun's directory of one run: `<base>/<run_id>_<random>`, absolute."""
    path = os.path.join(os.path.abspath(base), f"{run_id}_{os.urandom(4).hex()}")
    os.makedirs(path)
    return path


def open_standard_descriptors() -> None:
    """Point descriptors 0, 1 and 2 that were closed at /dev/null, so that no pipe gets them."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)
