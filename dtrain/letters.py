"""Letters: text that processes of one user hand to each other in nameless memory (memfd).

Owns: their form, a length and then the text, so that a half-written letter reads as an empty one.
Nothing is on a disk, and the last process that has it open takes it along. Another process opens a
letter by `path_of`, as long as its writer lives, or is given the descriptor.
"""

from __future__ import annotations

import os

__all__ = ["clear_letter", "new_letter", "path_of", "read_letter", "write_letter"]

_LENGTH = 8  # bytes before the text, which say how long it is


def new_letter(name: str) -> int:
    """The descriptor of an empty letter, for the caller to close; `name` shows up in /proc."""
    return os.memfd_create(name, os.MFD_CLOEXEC)


def path_of(letter: int) -> str:
    """Where other processes of this user can open a letter of this process."""
    return f"/proc/{os.getpid()}/fd/{letter}"


def clear_letter(letter: int) -> None:
    """Make it empty again."""
    os.ftruncate(letter, 0)


def read_letter(letter: int) -> bytes:
    """The text of a letter; empty while there is none, or only a part of it."""
    size = int.from_bytes(os.pread(letter, _LENGTH, 0), "little")
    with open(letter, "rb", closefd=False) as file:
        file.seek(_LENGTH)
        return file.read(size)


def write_letter(letter: int, text: bytes) -> None:
    """Write the text, then its length, which makes it valid."""
    with open(letter, "wb", closefd=False) as file:
        file.seek(_LENGTH)
        file.write(text)
    os.pwrite(letter, len(text).to_bytes(_LENGTH, "little"), 0)
