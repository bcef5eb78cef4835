"""What the collectives shall reach, and whether they do.

Owns: `TARGETS` and `verdicts`. Each target compares one column of one table with another column, or
with a bound, at some sizes; its ratio is that of the worst size, 1.0 and more is reached.
"""

from __future__ import annotations

from dataclasses import dataclass

from shaped_link import BYTES_PER_SECOND

EVERY = ("all_reduce", "all_gather", "broadcast", "reduce_scatter", "barrier")
MOVING = ("all_gather", "broadcast", "reduce_scatter")
KIB, MIB = 1 << 10, 1 << 20


@dataclass(frozen=True)
class Target:
    """`column` of `kinds` in `table` from `least` to `most` bytes.

    `beside`: it is `factor` times as fast as that column. Otherwise it takes at most
    `limit(bytes)` seconds.
    """

    text: str
    table: str
    kinds: tuple[str, ...]
    column: str = "ours"
    beside: str = ""
    factor: float = 1.0
    limit: object = None
    least: int = 0
    most: int = 1 << 40


TARGETS = [
    Target("3 x gloo at every size", "shm, 2 ranks", ("all_reduce",), beside="gloo", factor=3),
    Target(
        "4 B in 20 us", "shm, 2 ranks", ("all_reduce",), limit=lambda n: 20e-6, least=4, most=4
    ),
    Target(
        "dist.empty 10 x gloo from 64 KiB", "shm, 2 ranks", ("all_reduce",), "empty", "gloo", 10,
        least=64 * KIB,
    ),
    Target(
        "dist.empty faster than MPICH from 1 MiB", "shm, 2 ranks", ("all_reduce",), "empty",
        "mpich", least=MIB,
    ),
    Target("3 x gloo at every size", "shm, 2 ranks", MOVING, beside="gloo", factor=3),
    Target("3 x gloo at every size", "shm, 4 ranks", EVERY, beside="gloo", factor=3),
    Target(
        "as fast as gloo from 1 MiB", "tcp in plain text, 2 ranks", ("all_reduce",),
        beside="gloo", least=MIB,
    ),
    Target(
        "at most 1.3 x gloo's time below 1 MiB", "tcp in plain text, 2 ranks", ("all_reduce",),
        beside="gloo", factor=1 / 1.3, most=MIB - 1,
    ),
    Target(
        "64 MiB at 400 MB/s", "tcp with CURVE, 2 ranks", ("send",), limit=lambda n: n / 400e6,
        least=64 * MIB,
    ),
    Target(
        "64 MiB within 10 % of 117 MB/s each way", "1 Gbit/s with CURVE, 2 ranks", ("all_reduce",),
        limit=lambda n: 1.1 * n / BYTES_PER_SECOND, least=64 * MIB,
    ),
]  # fmt: skip


def _ratios(target, found):
    """{(kind, bytes): how far the target is reached}."""
    for kind in target.kinds:
        own = found[target.column][kind]
        for nbytes in own:
            if not target.least <= nbytes <= target.most:
                continue
            if target.beside:
                yield found[target.beside][kind][nbytes] / own[nbytes] / target.factor, kind, nbytes
            else:
                yield target.limit(nbytes) / own[nbytes], kind, nbytes


def verdicts(tables):
    """One line per target; `tables` is {name: {column: {kind: {bytes: seconds}}} or why not}."""
    for target in TARGETS:
        found = tables.get(target.table, "not measured")
        what = f"{target.table}, {'/'.join(target.kinds)}: {target.text}"
        if isinstance(found, str):
            yield f"not run: {found:<16} {what}"
        elif target.beside and target.beside not in found:
            yield f"not run: no {target.beside:<13} {what}"
        else:
            ratio, kind, nbytes = min(_ratios(target, found))
            said = f"{'yes' if ratio >= 1 else 'no':<4}{ratio:>7.2f} of 1"
            yield f"{said}  {what} (at {kind}, {nbytes} B)"
