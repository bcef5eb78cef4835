"""Memory that outlives this process: dtrun keeps it open, and hands it to the next one.

Two nameless files in memory (memfd) for each rank of a node, whose descriptors DTRAIN_MEMORY names.
`write` fills the older one, with its number last: a process that is killed in between leaves the
other one whole. Nothing of it has a name, so nothing is left behind when dtrun ends. Writing uses
pwrite, which says ENOSPC where touching a mapping would end the process. Cost: one copy of the
bytes for a write, one for a read; memory twice the bytes for each rank.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Mapping
from typing import Any

_HEADER = struct.Struct("<8sqq")  # magic, number, bytes that follow
_MAGIC = b"DTRMEM01"
_EMPTY = bytes(_HEADER.size)


class Memory:
    """What was committed under which number; `descriptors` are two files."""

    def __init__(self, descriptors: Iterable[int]) -> None:
        self._slots = tuple(descriptors)

    @classmethod
    def inherited(cls, environ: Mapping[str, str] = os.environ) -> Memory | None:
        """What dtrun gave to this process; None without dtrun."""
        text = environ.get("DTRAIN_MEMORY")
        return cls(map(int, text.split(","))) if text else None

    def numbers(self) -> set[int]:
        """The numbers that can be read."""
        return {number for number, _ in map(_header, self._slots) if number >= 0}

    def write(self, number: int, parts: Iterable[Any]) -> None:
        """Keep the bytes of `parts`, one behind the other, under `number` (0 or more).

        The two newest are kept. OSError when there is no memory left; the newest is whole then.
        """
        slot = min(self._slots, key=lambda slot: _header(slot)[0])
        os.pwrite(slot, _EMPTY, 0)
        offset = _HEADER.size
        for part in parts:
            offset += _write_all(slot, memoryview(part).cast("B"), offset)
        os.ftruncate(slot, offset)
        os.pwrite(slot, _HEADER.pack(_MAGIC, number, offset - _HEADER.size), 0)

    def read(self, number: int) -> bytearray:
        """The bytes that were kept; KeyError for another number."""
        for slot in self._slots:
            found, size = _header(slot)
            if found == number:
                data = bytearray(size)
                view, offset = memoryview(data), 0
                while offset < size:
                    offset += os.preadv(slot, [view[offset:]], _HEADER.size + offset)
                return data
        raise KeyError(number)


def _header(slot: int) -> tuple[int, int]:
    """Number and size of what is in a slot; -1 for nothing."""
    head = os.pread(slot, _HEADER.size, 0)
    if len(head) < _HEADER.size:
        return -1, 0
    magic, number, size = _HEADER.unpack(head)
    return (number, size) if magic == _MAGIC else (-1, 0)


def _write_all(slot: int, view: memoryview, offset: int) -> int:
    done = 0
    while done < len(view):
        done += os.pwrite(slot, view[done:], offset + done)
    return done
