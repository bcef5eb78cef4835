"""The three system calls by which ranks of one host wait for each other in shared memory.

Owns: `give_way` (sched_yield), `sleep` and `wake` (futex), through ctypes, which releases the GIL
around each of them. Words are 32 bits in memory that processes share. Linux only: `AVAILABLE` says
whether this machine is one where `transports.window` may be used.
"""

from __future__ import annotations

import ctypes
import platform
import sys

__all__ = ["AVAILABLE", "give_way", "sleep", "wake"]

# Stores must be seen in the order in which they were made (total store order): a rank writes its
# data and then its counter, in plain Python without a fence.
AVAILABLE = sys.platform == "linux" and platform.machine() == "x86_64"

_FUTEX = 202  # the number of the system call on x86-64
_WAIT, _WAKE = 0, 1
_EVERYBODY = 2**31 - 1

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
give_way = _libc.sched_yield


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
