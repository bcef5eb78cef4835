"""The system calls by which ranks of one host share memory and wait for each other in it.

Owns: `give_way` (sched_yield), `core` (sched_getcpu), `sleep` and `wake` (futex), `map_shared` and
`unmap`, through ctypes, which releases the GIL around each of them. Words are 32 bits in memory
that processes share. Linux only: `AVAILABLE` says whether this machine is one where
`transports.window` may be used.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import sys

__all__ = ["AVAILABLE", "core", "give_way", "map_shared", "sleep", "unmap", "wake"]

# Stores must be seen in the order in which they were made (total store order): a rank writes its
# data and then its counter, in plain Python without a fence.
AVAILABLE = sys.platform == "linux" and platform.machine() == "x86_64"

_FUTEX = 202  # the number of the system call on x86-64
_WAIT, _WAKE = 0, 1
_EVERYBODY = 2**31 - 1

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
give_way = _libc.sched_yield
core = _libc.sched_getcpu


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


def sleep(address: int, value: int, seconds: float) -> None:
    """Sleep while the word at `address` is `value` (32 bits), until `wake`, at most `seconds` < 1.

    May return early: the caller looks again.
    """
    limit = _Timespec(0, int(seconds * 1e9))
    _syscall(
        _FUTEX,
        ctypes.c_void_p(address),
        _WAIT,
        ctypes.c_uint32(value & 0xFFFFFFFF),
        ctypes.byref(limit),
        None,
        0,
    )


def wake(address: int) -> None:
    """Wake all who sleep on the word at `address`."""
    _syscall(_FUTEX, ctypes.c_void_p(address), _WAKE, _EVERYBODY, None, None, 0)


_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int),
    *(ctypes.c_int, ctypes.c_int, ctypes.c_long),
)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_FAILED = ctypes.c_void_p(-1).value


def map_shared(descriptor: int, length: int) -> int:
    """The address of a file's first `length` bytes, to be read and written. OSError."""
    rights = mmap.PROT_READ | mmap.PROT_WRITE
    address = _libc.mmap(None, length, rights, mmap.MAP_SHARED, descriptor, 0)
    if address == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(address)


def unmap(address: int, length: int) -> None:
    """Undo `map_shared`."""
    _libc.munmap(address, length)
