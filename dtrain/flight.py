"""The flight record of a rank: its last calls, in memory that another process can read.

Owns: the format, its writer (`section`) and its reader (`read`); standard library only, because the
launcher reads it too. Under dtrun it is the file `flight-<rank>` in the run directory, mapped by
the rank that writes it: what it holds survives the rank's death, however it comes. Without a run
directory it is a nameless file (memfd), which others of this user can open as long as the process
lives. Rules: 1. one page says who the rank is;
behind it stand `SECTIONS` sections, one per group: a page that names the group, and a ring of its
last `CALLS` calls. 2. Room is allocated before it is used: a write never fails. 3. A call is
written with one `pack_into` when it begins and one when it ends (0.3 us together). The writer never
waits; the reader sees by the numbers at both ends of a record whether it is torn.
"""

from __future__ import annotations

import functools
import itertools
import mmap
import os
import socket
import struct
import threading
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from dtrain import stacks
from dtrain.processes import start_of

__all__ = [
    "CALLS",
    "DONE",
    "FAILED",
    "POINT_TO_POINT",
    "QUEUED",
    "RUNNING",
    "Call",
    "Flight",
    "GroupFlight",
    "Section",
    "close",
    "copy",
    "here",
    "of_process",
    "open_sections",
    "read",
    "read_all",
    "section",
]

CALLS = 1024
SECTIONS = 64
QUEUED, RUNNING, DONE, FAILED = 1, 2, 3, 4
POINT_TO_POINT = -1  # the sequence number of a call outside of the sequence

_MAGIC = b"DTRFLT01"
_PAGE = 4096
# magic, process, its start (`processes.start_of`), rank in the run (-1: none), its main thread,
# signal that makes it write its stack (0: none), wall clock minus monotonic clock, host
_HEAD = struct.Struct("<8sqqqQqd64s")
# 0 never used, 1 open, 2 closed; rank, size, which group of this name, thread that made it, name
_GROUP = struct.Struct("<QqqqQ256s")
# serial, sequence number, bytes, start, [state, end, seconds waited], signature, site, serial
_CALL = struct.Struct("<QqQdQdd88s104sQ")
_START_AT, _STATE_AT, _SITE = 24, 32, 104
_SIZE = _CALL.size
_SECTION = _PAGE + CALLS * _SIZE
_LENGTH = _PAGE + SECTIONS * _SECTION

_write_call = _CALL.pack_into
_write_start = struct.Struct("<dQ").pack_into
_write_end = struct.Struct("<Qdd").pack_into


class Section:
    """Where the calls of one group of this rank are written, from any thread."""

    __slots__ = ("_at", "_memory", "_serials", "name", "rank", "thread")

    def __init__(self, memory: mmap.mmap, at: int) -> None:
        self._memory, self._at = memory, at

    def open(self, name: str, number: int, rank: int, size: int) -> None:
        """Name the group; the calls of the group that had the section before are gone."""
        self._memory[self._at : self._at + _SECTION] = bytes(_SECTION)
        self._serials = itertools.count(1)
        self.name, self.rank, self.thread = name, rank, threading.get_ident()
        fields = 1, rank, size, number, self.thread, name.encode()
        _GROUP.pack_into(self._memory, self._at, *fields)

    def begin(
        self, state: int, seq: int, nbytes: int, start: float, signature: str, site: str
    ) -> int:
        """Write a call that starts or is queued; returns its place for `run` and `end`."""
        serial = next(self._serials)
        place = self._at + _PAGE + serial % CALLS * _SIZE
        # The end of a path says more than its beginning.
        where = site.encode() if len(site) <= _SITE else site.encode()[-_SITE:]
        # fmt: off
        _write_call(
            self._memory, place, serial, seq, nbytes, start, state, 0.0, 0.0,
            signature.encode(), where, serial,
        )
        # fmt: on
        return place

    def run(self, place: int, start: float) -> None:
        """A queued call starts."""
        _write_start(self._memory, place + _START_AT, start, RUNNING)

    def end(self, place: int, state: int, end: float, waited: float) -> None:
        """A call is over; `waited`: the seconds it spent waiting for others."""
        _write_end(self._memory, place + _STATE_AT, state, end, waited)

    def mark_closed(self) -> None:
        """Say that the group is closed."""
        self._memory[self._at] = 2


class _Writer:
    """The flight record of this process. `sections`: those of groups that are open."""

    def __init__(self) -> None:
        self.sections: list[Section] = []
        self._lock = threading.Lock()
        self._unused = list(range(SECTIONS - 1, -1, -1))
        self._closed: list[Section] = []
        self._numbers: dict[tuple[str, int], int] = {}
        self._file = stacks.own_file("flight")
        roomy = self._lengthen()
        self._memory = mmap.mmap(self._file if roomy else -1, _LENGTH)
        if not roomy:
            self._unused = []
        pid, main = os.getpid(), threading.main_thread().ident or 0
        fields = (
            *(pid, start_of(pid), int(os.environ.get("RANK") or -1), main),
            *(stacks.answer(), time.time() - time.monotonic(), socket.gethostname().encode()),
        )
        _HEAD.pack_into(self._memory, 0, _MAGIC, *fields)

    def section(self, name: str, rank: int, size: int) -> Section:
        with self._lock:
            number = self._numbers[name, rank] = self._numbers.get((name, rank), 0) + 1
            taken = self._take()
            taken.open(name, number, rank, size)
            self.sections.append(taken)
            return taken

    def _take(self) -> Section:
        if self._unused and self._reserve(at := _PAGE + self._unused[-1] * _SECTION, _SECTION):
            self._unused.pop()
            return Section(self._memory, at)
        if self._closed:
            return self._closed.pop(0)
        return Section(mmap.mmap(-1, _SECTION), 0)  # which nobody else sees

    def _lengthen(self) -> bool:
        """Whether the file may be as long as it can become, and has room for its head."""
        try:
            os.ftruncate(self._file, _LENGTH)
        except OSError:  # RLIMIT_FSIZE, or a file system that is full
            return False
        return self._reserve(0, _PAGE)

    def _reserve(self, at: int, nbytes: int) -> bool:
        """Whether there is room for that much more."""
        try:
            os.posix_fallocate(self._file, at, nbytes)
        except OSError as error:
            warnings.warn(
                f"the last calls of this rank cannot be read by others: no room for its flight"
                f" record ({error})",
                RuntimeWarning,
                stacklevel=6,
            )
            return False
        return True

    def close(self, section: Section) -> None:
        with self._lock:
            if section in self.sections:
                section.mark_closed()
                self.sections.remove(section)
                self._closed.append(section)


_making = threading.Lock()
_made = functools.cache(_Writer)


def here() -> _Writer:
    """The flight record of this process, made when it is first asked for."""
    with _making:
        return _made()


def _forget() -> None:
    """A forked child is no rank: what it writes must not appear in its parent's record."""
    global _making
    _making = threading.Lock()
    _made.cache_clear()


os.register_at_fork(after_in_child=_forget)


def section(name: str, rank: int, size: int) -> Section:
    """A section for a group that this process joins as `rank` of `size`; `close` gives it back."""
    return here().section(name, rank, size)


def close(section: Section) -> None:
    """The group is closed; its calls stay readable until another group needs the section."""
    here().close(section)


def open_sections() -> list[Section]:
    """Those of the groups that this process has open."""
    return list(here().sections)


# ---- reading


@dataclass(frozen=True, slots=True)
class Call:
    """One call as it stands in a record; times are in seconds of the monotonic clock."""

    seq: int  # POINT_TO_POINT for a message
    nbytes: int
    start: float
    state: int
    end: float
    waited: float
    signature: str
    site: str

    def __str__(self) -> str:
        number = "" if self.seq == POINT_TO_POINT else f"#{self.seq} "
        return f"{number}{self.signature} at {self.site}"

    @property
    def unfinished(self) -> bool:
        return self.state in (QUEUED, RUNNING)


@dataclass(frozen=True, slots=True)
class GroupFlight:
    """What one rank did in one group: its last calls, oldest first, without torn ones."""

    name: str
    number: int  # which group of this name, from 1
    rank: int
    size: int
    is_open: bool
    thread: int
    calls: list[Call]
    torn: int


@dataclass(frozen=True, slots=True)
class Flight:
    """The record of one process. `clock` turns its times into seconds since the epoch."""

    path: str
    pid: int
    started: int
    rank: int
    main_thread: int
    signal: int
    clock: float
    host: str
    groups: list[GroupFlight]

    def last_call(self) -> tuple[GroupFlight, Call] | None:
        """The call that began last, in any group."""
        calls = [(group, call) for group in self.groups for call in group.calls]
        return max(calls, key=lambda pair: pair[1].start, default=None)


def read(path: str | Path) -> Flight | None:
    """The record in a file, of a rank that may live and write; None when nothing is there yet."""
    with open(path, "rb") as file:
        page = file.read(_PAGE)
        if page[: len(_MAGIC)] != _MAGIC:
            return None
        _, pid, started, rank, main, signal, clock, host = _HEAD.unpack_from(page)
        groups = []
        for index in range(SECTIONS):
            group = _read_group(file, _PAGE + index * _SECTION)
            if group is None:
                break
            groups.append(group)
    return Flight(str(path), pid, started, rank, main, signal, clock, _text(host), groups)


def read_all(directory: str | Path) -> list[Flight]:
    """The records of all ranks of this host, in rank order."""
    found = [read(path) for path in _files(directory)]
    return sorted((flight for flight in found if flight), key=lambda flight: flight.rank)


def copy(source: Path, target: Path) -> None:
    """Copy the sections of a record that were ever used, of a process that has ended."""
    with open(source, "rb") as file, open(target, "wb") as out:
        out.write(file.read(_PAGE))
        while (section := file.read(_SECTION)) and section[0]:
            out.write(section)


def of_process(pid: int) -> Flight | None:
    """The record of a process of this user on this host.

    When the process has ended there is one only in the run directory of this process.
    """
    directory = os.environ.get("DTRAIN_RUN_DIR")
    for path in _files(directory) if directory else ():
        with open(path, "rb") as file:
            page = file.read(_HEAD.size)
        if page[: len(_MAGIC)] == _MAGIC and _HEAD.unpack(page)[1] == pid:
            return read(path)
    path = stacks.nameless("flight", pid)
    return None if path is None else read(path)


def _files(directory: str | Path) -> list[Path]:
    return list(Path(directory).glob("flight-*"))


def _read_group(file: BinaryIO, at: int) -> GroupFlight | None:
    file.seek(at)
    head = file.read(_PAGE)
    if len(head) < _PAGE or head[0] == 0:
        return None
    state, rank, size, number, thread, name = _GROUP.unpack_from(head)
    # Read twice: what changes meanwhile was being written.
    one, other = _ring(file, at + _PAGE), _ring(file, at + _PAGE)
    calls = {}
    torn = 0
    for place in range(0, len(one), _SIZE):
        record = one[place : place + _SIZE]
        fields = _CALL.unpack(record)
        if record != other[place : place + _SIZE] or fields[0] != fields[-1]:
            torn += 1
        elif fields[0]:
            calls[fields[0]] = Call(*fields[1:7], _text(fields[7]), _text(fields[8]))
    ordered = [calls[serial] for serial in sorted(calls)]
    return GroupFlight(_text(name), number, rank, size, state == 1, thread, ordered, torn)


def _ring(file: BinaryIO, at: int) -> bytes:
    file.seek(at)
    return file.read(CALLS * _SIZE)


def _text(field: bytes) -> str:
    return field.rstrip(b"\0").decode(errors="replace")
