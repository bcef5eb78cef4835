"""`--numa-binding`: which cores each local rank may run on, by the machine's memory nodes.

Local ranks are dealt out over the memory nodes in blocks. Then, with torchrun's names: `node` is
all cores of the rank's node; `socket` all cores of the nodes on its socket; `exclusive` a share of
the node's cores that no other rank has; `core-complex` the cores of one L3 cache of the node, the
complexes taken in turn. Cores that this process may not use are left out. Where the kernel shows no
nodes the machine is one. Source of the modes: torch.numa.binding, where a rank's GPU decides.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from dtrun.kernel import told

MODES = ("node", "socket", "exclusive", "core-complex")
SYSTEM = Path("/sys/devices/system")

Cores = tuple[int, ...]


def shares(
    mode: str | None, ranks: int, system: Path = SYSTEM, allowed: Collection[int] | None = None
) -> list[Cores]:
    """The cores of each local rank, none of them named for those that are not bound.

    ValueError when there are fewer cores than `exclusive` needs.
    """
    if mode is None:
        return [()] * ranks
    usable = set(os.sched_getaffinity(0) if allowed is None else allowed)
    nodes = _nodes(system, usable)
    places = [rank * len(nodes) // ranks for rank in range(ranks)]
    if mode == "node":
        return [nodes[place] for place in places]
    if mode == "socket":
        return [_socket(nodes, place, system) for place in places]
    return [_part(mode, nodes[place], *_turn(places, rank), system)
            for rank, place in enumerate(places)]  # fmt: skip


def check(mode: str | None, ranks: int) -> None:
    """ValueError for a mode that there is not, or that this machine has too few cores for."""
    if mode is not None and mode not in MODES:
        raise ValueError(f"--numa-binding must be one of {', '.join(MODES)}, got {mode!r}")
    shares(mode, ranks)


def _turn(places: list[int], rank: int) -> tuple[int, int]:
    """Which of the ranks of its node a rank is, and how many they are."""
    same = [other for other, place in enumerate(places) if place == places[rank]]
    return same.index(rank), len(same)


def _part(mode: str, cores: Cores, turn: int, count: int, system: Path) -> Cores:
    """The cores of the `turn`-th of `count` ranks on a node with these."""
    if mode == "core-complex":
        complexes = sorted({_together(system, core, "cache/index3/shared_cpu_list", cores)
                            for core in cores})  # fmt: skip
        return complexes[turn % len(complexes)]
    pairs = sorted({_together(system, core, "topology/thread_siblings_list", cores)
                    for core in cores})  # fmt: skip
    if count > len(pairs):
        raise ValueError(
            f"--numa-binding exclusive: {count} ranks on a memory node with {len(pairs)} cores"
        )
    mine = pairs[turn * len(pairs) // count : (turn + 1) * len(pairs) // count]
    return tuple(core for pair in mine for core in pair)


def _nodes(system: Path, usable: set[int]) -> list[Cores]:
    files = sorted(system.glob("node/node[0-9]*/cpulist"), key=lambda f: int(f.parent.name[4:]))
    nodes = [tuple(core for core in _listed(file) if core in usable) for file in files]
    return [node for node in nodes if node] or [tuple(sorted(usable))]


def _socket(nodes: list[Cores], place: int, system: Path) -> Cores:
    """The cores of all nodes whose first core is on the same socket."""
    package = [told(system / f"cpu/cpu{node[0]}/topology/physical_package_id") for node in nodes]
    same = [node for node, own in zip(nodes, package, strict=True) if own == package[place]]
    return tuple(sorted(core for node in same for core in node))


def _together(system: Path, core: int, file: str, cores: Cores) -> Cores:
    """Those of `cores` that share something with `core`: a list of the kernel's."""
    listed = _listed(system / f"cpu/cpu{core}" / file)
    return tuple(sorted({core, *(other for other in listed if other in cores)}))


def _listed(file: Path) -> list[int]:
    """`0-3,8` as numbers; none where the file is missing."""
    parts = [part.partition("-") for part in told(file).split(",") if part]
    return [n for first, _, last in parts for n in range(int(first), int(last or first) + 1)]
