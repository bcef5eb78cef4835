"""What this host lets a process use: cores, processor time, memory.

Owns: reading /proc and the control groups (versions 1 and 2) that a container or a batch system
puts a process into. Linux; standard library only; nothing here raises where a file is not there,
None stands for "no limit that can be seen".
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["available_memory", "cores", "memory_limit", "processor", "processor_quota"]

_GROUPS, _OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# Version 1 writes "no limit" as the largest number of pages.
_NO_LIMIT = 1 << 60


def cores() -> int:
    """Processors this process may run on: less than the machine's where a mask is set."""
    return len(os.sched_getaffinity(0))


def processor() -> str:
    """The model of the processor, "unknown" where /proc does not tell."""
    for line in _lines(Path("/proc/cpuinfo")):
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return "unknown"


def processor_quota(groups: Path = _GROUPS, own: Path = _OWN) -> float | None:
    """How many processors' time the control groups allow, as in `docker run --cpus 1.5`."""
    found = []
    for folder in _folders("cpu", groups, own):
        quota, period = _numbers(folder / "cpu.max", 2)
        if quota is None:
            (quota,) = _numbers(folder / "cpu.cfs_quota_us", 1)
            (period,) = _numbers(folder / "cpu.cfs_period_us", 1)
        if quota is not None and period and quota > 0:
            found.append(quota / period)
    return min(found, default=None)


def memory_limit(groups: Path = _GROUPS, own: Path = _OWN) -> int | None:
    """The least limit of memory, in bytes, among the control groups of this process."""
    limits = [limit for limit, _ in _memory(groups, own)]
    return min(limits, default=None)


def available_memory(
    groups: Path = _GROUPS, own: Path = _OWN, meminfo: Path = Path("/proc/meminfo")
) -> int | None:
    """Bytes that can still be had: the machine's, or what a control group has left if less."""
    left = [limit - used for limit, used in _memory(groups, own)]
    for line in _lines(meminfo):
        if line.startswith("MemAvailable:"):
            left.append(int(line.split()[1]) * 1024)
    return max(0, min(left)) if left else None


def _memory(groups: Path, own: Path) -> Iterator[tuple[int, int]]:
    """(limit, used) of each group that has a limit; the page cache does not count as used."""
    for folder in _folders("memory", groups, own):
        for limit_name, used_name in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            (limit,), (used,) = _numbers(folder / limit_name, 1), _numbers(folder / used_name, 1)
            if limit is not None and limit < _NO_LIMIT:
                yield limit, max(0, (used or 0) - _cache(folder))


def _cache(folder: Path) -> int:
    """Bytes of files that the kernel gives back when memory is short."""
    for line in _lines(folder / "memory.stat"):
        name, _, value = line.partition(" ")
        if name in ("inactive_file", "total_inactive_file"):
            return int(value)
    return 0


def _folders(controller: str, groups: Path, own: Path) -> Iterator[Path]:
    """The group of this process and all above it, of version 2 and of `controller` in version 1.

    A container sees its own group as the root, although /proc may name the path on the host: what
    is not there is skipped.
    """
    for line in _lines(own):
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = groups / controllers if controllers else groups
        names = [name for name in path.split("/") if name]
        yield from (root.joinpath(*names[:depth]) for depth in range(len(names), -1, -1))


def _numbers(path: Path, count: int) -> tuple[int | None, ...]:
    """The first numbers of a file; None for "max", and where there is no file."""
    words = next(iter(_lines(path)), "").split()[:count]
    words += [""] * (count - len(words))
    return tuple(int(word) if word.lstrip("-").isdecimal() else None for word in words)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
