"""Latency and bandwidth of the collectives, in the table the field knows (OSU micro-benchmarks).

    python benchmarks/collectives.py --nproc 2 --transport zmq
    python benchmarks/collectives.py --torch-python PATH    # gloo and MPICH beside it
    python benchmarks/collectives.py --nproc 4 --rounds 3   # more ranks than cores, less noise
    python benchmarks/collectives.py --all                  # every table, and what is reached

Starts its own ranks with dtrun (what they run is in `collective_ranks.py`). Times are medians in
the caller of rank 0, each call after a barrier; GB/s is bytes over time (algorithm bandwidth).
"empty" is the same call on tensors from `dist.empty`. "send" is answered with 4 bytes. With PyTorch
at hand (in this interpreter or in the one named) the same file runs under torchrun in the same
minutes, with mpi4py there under mpiexec, and ratios are printed. Rounds are run in turn, one of
each library after the other, and the median of each figure is printed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from beside import measured
from collective_ranks import KINDS
from shaped_link import run_over, shaped_link, why_not
from targets import verdicts

SIZES = [4, 1 << 10, 64 << 10, 1 << 20, 16 << 20, 64 << 20]
RANKS = str(Path(__file__).with_name("collective_ranks.py"))


@dataclass
class Table:
    """What one table measures. `flags` are dtrun's."""

    name: str
    transport: str
    nproc: int = 2
    sizes: list[int] = field(default_factory=lambda: SIZES)
    kinds: list[str] = field(default_factory=lambda: KINDS)
    flags: tuple[str, ...] = ()
    repeats: int = 20

    def arguments(self, library):
        """What `collective_ranks.py` is told."""
        backend = "gloo" if library == "torch" else self.transport
        asked = ["--sizes", *map(str, self.sizes), "--kinds", *self.kinds]
        return [library, backend, *asked, "--repeats", str(self.repeats)]


PLAIN = ("--data-plane", "plaintext")
EVERY_TABLE = [
    Table("shm, 2 ranks", "shm"),
    Table("shm, 4 ranks", "shm", nproc=4, sizes=SIZES[:-1]),
    Table("tcp in plain text, 2 ranks", "tcp", flags=PLAIN),
    Table("tcp with CURVE, 2 ranks", "tcp", kinds=["all_reduce", "send"]),
]
SHAPED = Table(
    "1 Gbit/s with CURVE, 2 ranks", "tcp", sizes=SIZES[3:], kinds=["all_reduce"], repeats=5
)


def launchers(python, table):
    """{library: the command that starts its ranks}, of those that are here."""
    flags = ["--standalone", "--nproc-per-node", str(table.nproc)]
    dtrun = str(Path(sys.executable).with_name("dtrun"))
    found = {"dtrain": [dtrun, *flags, *table.flags]}
    if imports(python, "torch"):
        found["torch"] = [python, "-m", "torch.distributed.run", *flags]
    mpiexec = Path(python).with_name("mpiexec")
    if imports(python, "mpi4py") and mpiexec.exists():
        found["mpi"] = [str(mpiexec), "-n", str(table.nproc), python]
    return found


def imports(python, module):
    """Whether that interpreter has the module."""
    probe = f"import importlib.util as u; raise SystemExit(not u.find_spec({module!r}))"
    return not subprocess.run([python, "-c", probe], check=False).returncode


def measured_table(table, python, rounds):
    """{column: {kind: {bytes: seconds}}}, medians over the rounds."""
    starts = launchers(python, table)
    found = []
    for _ in range(rounds):
        found.append({})
        for library, start in starts.items():
            found[-1].update(measured(start, RANKS, table.arguments(library), dict(os.environ)))
    return median_of(found)


def measured_over_link(table, python):
    """The same over a link of 1 Gbit/s, beside gloo; why not, where that cannot be made."""
    reason = why_not()
    if reason is not None:
        return reason
    starts = {"dtrain": sys.executable}
    if imports(python, "torch"):
        starts["torch"] = python
    found = {}
    try:
        with shaped_link() as names:
            for library, start in starts.items():
                command = [start, RANKS, *table.arguments(library)]
                found.update(run_over(names, command, dict(os.environ)))
    except OSError as error:
        return str(error)
    return median_of([found])


def median_of(rounds):
    """One {column: {kind: {bytes: seconds}}} of several."""
    return {
        column: {
            kind: {
                int(n): statistics.median(each[column][kind][n] for each in rounds) for n in times
            }
            for kind, times in kinds.items()
        }
        for column, kinds in rounds[0].items()
    }


def print_table(found):
    """One block per collective: bytes, microseconds, GB/s, the other libraries', and ratios."""
    if isinstance(found, str):
        print(f"not run: {found}")
        return
    columns = list(found)
    ratios = [
        (other, own)
        for other in ("gloo", "mpich")
        for own in ("ours", "empty")
        if other in found and own in found
    ]
    for kind in found["ours"]:
        names = "".join(f"{f'{column} us':>12}" for column in columns)
        over = "".join(f"{f'{other}/{own}':>13}" for other, own in ratios)
        print(f"\n# {kind}\n# {'bytes':>10}{names}{'GB/s':>8}{over}")
        for nbytes in found["ours"][kind]:
            at = {column: found[column][kind][nbytes] for column in columns}
            row = "".join(f"{at[column] * 1e6:>12.1f}" for column in columns)
            rate = nbytes / at["ours"] / 1e9
            over = "".join(f"{at[other] / at[own]:>12.2f}x" for other, own in ratios)
            print(f"{nbytes:>12}{row}{rate:>8.2f}{over}")


def print_all(python, rounds):
    """Every table, and one line per target."""
    tables = {}
    for table in EVERY_TABLE:
        print(f"\n## {table.name}")
        tables[table.name] = measured_table(table, python, rounds)
        print_table(tables[table.name])
    print(f"\n## {SHAPED.name}")
    tables[SHAPED.name] = measured_over_link(SHAPED, python)
    print_table(tables[SHAPED.name])
    print("\n## Targets: how much of each is reached at the worst size, 1 and more is all of it")
    for line in verdicts(tables):
        print(line)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--transport", default="shm", help="dtrain's transport (default shm)")
    parser.add_argument("--data-plane", default="curve", help="curve or plaintext, over tcp")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="bytes")
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS, help="which calls")
    parser.add_argument("--torch-python", default=sys.executable, help="an interpreter with torch")
    parser.add_argument("--rounds", type=int, default=1, help="runs of each library")
    parser.add_argument("--all", action="store_true", help="every table, and what is reached")
    args = parser.parse_args()
    flags = ("--data-plane", args.data_plane)
    table = Table("", args.transport, args.nproc, args.sizes, args.kinds, flags)
    blas = os.environ.get("OPENBLAS_CORETYPE", "unset")
    beside = ", ".join(list(launchers(args.torch_python, table))[1:]) or "nothing"
    which = "all tables" if args.all else f"{args.nproc} ranks, transport {args.transport}"
    print(f"# {which}, float32, {os.cpu_count()} cores, OPENBLAS_CORETYPE {blas}, "
          f"beside: {beside}, load {os.getloadavg()[0]:.1f}")  # fmt: skip
    if args.all:
        print_all(args.torch_python, args.rounds)
    else:
        print_table(measured_table(table, args.torch_python, args.rounds))


if __name__ == "__main__":
    main()
