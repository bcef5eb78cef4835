"""Which way the output of each worker goes, and the descriptors that the launcher polls for it.

Per stream: inherited (shown, nothing to add), a file (redirected), /dev/null (filtered out), or a
pipe to a `Source` (prefixed, teed or searched). Files are `<dir>/<local_rank>/{stdout,stderr}.log`,
and `<dir>/filtered_{stdout,stderr}.log` for the lines of all workers that have a word asked for.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import subprocess
import time

from dtrun.output import FULL, Console, Copy, LogFile, Mux, Source, same_file
from dtrun.spec import STDERR, STDOUT, Spec, prefix

READ_BYTES = 64 * 1024
LOG_NAMES = {STDOUT: "stdout.log", STDERR: "stderr.log"}
COPY_NAMES = {STDOUT: "filtered_stdout.log", STDERR: "filtered_stderr.log"}


class Streams:
    """The pipes of one worker group and the two consoles they end in."""

    def __init__(self, spec: Spec, selector: selectors.BaseSelector, hostname: str) -> None:
        self.spec = spec  # changes when the number of this node does
        self._selector = selector
        self._hostname = hostname
        self._consoles = {STDOUT: Console(1), STDERR: Console(2)}
        stdout_mux = Mux()
        self._muxes = {STDOUT: stdout_mux, STDERR: stdout_mux if same_file(1, 2) else Mux()}
        self._sources: dict[int, Source] = {}  # by the read end of the pipe
        self._logs: list[LogFile] = []

    @property
    def deadline(self) -> float | None:
        """When the next incomplete line is due, on the monotonic clock."""
        return min((s.deadline for s in self._sources.values() if s.deadline), default=None)

    def open(self, local_rank: int, bit: int, log_dir: str) -> int | None:
        """What the worker gets as its stdout or stderr, for Popen; the caller closes a real one."""
        spec = self.spec
        logged = (spec.redirects[local_rank] | spec.tee[local_rank]) & bit
        redirected = logged and not spec.tee[local_rank] & bit
        shown = not redirected and (spec.shown is None or local_rank in spec.shown)
        path = os.path.join(log_dir, str(local_rank), LOG_NAMES[bit])
        words = spec.filters[bit - 1]
        if not shown and not words:
            if not logged:
                return subprocess.DEVNULL
            return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        text = prefix(spec, local_rank, self._hostname)
        if not text and not logged and not words:
            return None
        log = self._log(path) if logged else None
        copy = Copy(words, self._log(os.path.join(log_dir, COPY_NAMES[bit]))) if words else None
        console = self._consoles[bit] if shown else Console(-1, closed=True)
        return self._pipe(Source(text, console, self._muxes[bit] if shown else Mux(), log, copy))

    def _log(self, path: str) -> LogFile:
        log = LogFile(path, self._consoles[STDERR])
        self._logs.append(log)
        return log

    def _pipe(self, source: Source) -> int:
        read, write = os.pipe()
        os.set_blocking(read, False)
        self._sources[read] = source
        return write

    def say(self, text: str) -> None:
        """Write a line or more of dtrun's own to stderr."""
        self._muxes[STDERR].end_line()
        self._consoles[STDERR].write(text.encode(errors="backslashreplace"))

    def watch(self) -> None:
        """Tell the selector what to wait for: pipes whose console has room, consoles that wait."""
        for fd, source in self._sources.items():
            self._register(fd, selectors.EVENT_READ, len(source.console.pending) < FULL)
        for console in self._consoles.values():
            self._register(console.fd, selectors.EVENT_WRITE, bool(console.pending))

    def _register(self, fd: int, event: int, wanted: bool) -> None:
        if wanted != (fd in self._selector.get_map()):
            _ = self._selector.register(fd, event) if wanted else self._selector.unregister(fd)

    def ready(self, fd: int) -> None:
        """The selector says that `fd` can be read (a pipe) or written (a console)."""
        if fd in self._sources:
            self._read(fd)
        for console in self._consoles.values():
            if console.fd == fd:
                console.flush()

    def show_tails(self, now: float) -> None:
        """Show the incomplete lines that are due."""
        for source in self._sources.values():
            if source.deadline is not None and source.deadline <= now:
                source.show_tail()

    def drain(self) -> None:
        """Take what is left in the pipes, once nobody writes any more, and close them."""
        for fd in list(self._sources):
            with contextlib.suppress(BlockingIOError):  # held open by a process that is not ours
                while fd in self._sources:
                    self._read(fd)
        for fd in list(self._sources):
            self._end(fd)
        for log in self._logs:
            log.close()
        self._logs.clear()

    def pending(self) -> bool:
        """Whether a console has not taken everything yet."""
        return any(console.pending for console in self._consoles.values())

    def _read(self, fd: int) -> None:
        data = os.read(fd, READ_BYTES)
        if data:
            self._sources[fd].feed(data, time.monotonic())
        else:
            self._end(fd)

    def _end(self, fd: int) -> None:
        self._sources.pop(fd).end()
        self._register(fd, selectors.EVENT_READ, False)
        os.close(fd)
