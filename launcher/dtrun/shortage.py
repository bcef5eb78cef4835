"""Whether the kernel has killed a process of ours because its control group was out of memory.

Owns: reading cgroup v2's `memory.events` and v1's `memory.oom_control`, of the group that dtrun is
in; workers are in the same one. Rule: only a counter that has risen since the workers were started
counts. A machine that is out of memory as a whole, without a limit, is in /proc/vmstat.
"""

from __future__ import annotations

from pathlib import Path

from dtrun.kernel import told

CGROUPS, PROC = Path("/sys/fs/cgroup"), Path("/proc")
# Files of a group with a counter `oom_kill`, the limit and the most that was used, v2 and v1.
V2 = ("memory.events", "memory.max", "memory.peak")
V1 = ("memory.oom_control", "memory.limit_in_bytes", "memory.max_usage_in_bytes")


class Shortage:
    """The counters as they are now, to be compared with later ones."""

    def __init__(self, cgroups: Path = CGROUPS, proc: Path = PROC) -> None:
        self._group, self._files = _own_group(cgroups, proc)
        self._vmstat = proc / "vmstat"
        self._before = self._counts()

    def _counts(self) -> tuple[int, int]:
        own = 0 if self._group is None else _counter(self._group / self._files[0])
        return own, _counter(self._vmstat)

    def words(self) -> str:
        """What to say of a worker that was ended by SIGKILL; "" if memory was not the reason."""
        (group, machine), (group_before, machine_before) = self._counts(), self._before
        if group > group_before and self._group is not None:
            limit, most = (_mib(self._group / name) for name in self._files[1:])
            return (
                "killed for memory: the kernel, because the processes of the control group together"
                f" reached its limit of {limit}, with at most {most}"
            )
        if machine > machine_before:
            return "killed for memory, most likely: the kernel, as the machine had none left"
        return ""


def _own_group(cgroups: Path, proc: Path) -> tuple[Path | None, tuple[str, str, str]]:
    """The folder of this process's control group for memory, and the names of its files."""
    lines = told(proc / "self" / "cgroup").splitlines()
    found = {controllers: path for _, controllers, path in (line.split(":", 2) for line in lines)}
    v1 = next((path for names, path in found.items() if "memory" in names.split(",")), None)
    base, path, files = (
        (cgroups / "memory", v1, V1) if v1 is not None else (cgroups, found.get("", "/"), V2)
    )
    # In a container the path is the host's, and its own group is mounted in its place.
    places = (base / path.lstrip("/"), base)
    return next((place for place in places if (place / files[0]).exists()), None), files


def _counter(path: Path) -> int:
    """The number after `oom_kill`, 0 where there is none."""
    words = [line.split() for line in told(path).splitlines()]
    return next((int(number) for name, number in words if name == "oom_kill"), 0)


def _mib(path: Path) -> str:
    text = told(path)
    return f"{int(text) / 2**20:.0f} MiB" if text.isdecimal() else "an unknown size"
