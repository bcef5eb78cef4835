"""Latency and bandwidth of the collectives, in the table the field knows (OSU micro-benchmarks).

    python benchmarks/collectives.py --nproc 2 --transport zmq
    python benchmarks/collectives.py --torch-python PATH    # gloo and MPICH beside it
    python benchmarks/collectives.py --nproc 4 --rounds 3   # more ranks than cores, less noise

Starts its own ranks with dtrun. Times are medians in the caller of rank 0, each call after a
barrier; GB/s is bytes over time (algorithm bandwidth). "empty" is the same call on tensors from
`dist.empty`. With PyTorch at hand (in this interpreter or in the one named) the same file runs
under torchrun in the same minutes, with mpi4py there under mpiexec, and ratios are printed. Rounds
are run in turn, one of each library after the other, and the median of each figure is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

SIZES = [4, 1 << 10, 64 << 10, 1 << 20, 16 << 20, 64 << 20]
KINDS = ["all_reduce", "all_gather", "broadcast", "reduce_scatter", "barrier"]


def median_time(call, barrier, repeats):
    """Median seconds of `call`, each after a barrier; the first tenth and two more do not count."""
    warm = repeats // 10 + 2
    times = []
    for _ in range(warm + repeats):
        barrier()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times[warm:])


def tensor_calls(dist, nbytes, make):
    """{kind: a call on float32 tensors from `make(count)`}; all_gather's lists are ordinary."""
    n, world = nbytes // 4, dist.get_world_size()
    x, part = make(n).fill_(1.0), make(max(n // world, 1))
    whole, gathered = make(max(n // world, 1) * world).fill_(1.0), make(n * world)
    return {
        "all_reduce": lambda: dist.all_reduce(x),
        "all_gather": lambda: dist.all_gather_into_tensor(gathered, x),
        "broadcast": lambda: dist.broadcast(x, 0),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(part, whole),
    }


def mpi_calls(comm, nbytes):
    """The same through mpi4py."""
    import numpy as np
    from mpi4py import MPI

    n = nbytes // 4
    count = max(n // comm.size, 1)
    x, gathered = np.ones(n, np.float32), np.empty(n * comm.size, np.float32)
    whole, part = np.ones(count * comm.size, np.float32), np.empty(count, np.float32)
    return {
        "all_reduce": lambda: comm.Allreduce(MPI.IN_PLACE, x),
        "all_gather": lambda: comm.Allgather(x, gathered),
        "broadcast": lambda: comm.Bcast(x, 0),
        "reduce_scatter": lambda: comm.Reduce_scatter_block(whole, part),
    }


def measure(calls_for, barrier, sizes):
    """{kind: {bytes: seconds}} on this rank; the same code for all libraries."""
    found = {kind: {} for kind in KINDS}
    for nbytes in sizes:
        repeats = 200 if nbytes < 1 << 20 else 20
        for kind, call in calls_for(nbytes).items():
            found[kind][nbytes] = median_time(call, barrier, repeats)
    found["barrier"][0] = median_time(barrier, barrier, 200)
    return found


def rank_main(library, backend, sizes):
    """What every rank runs: rank 0 prints its times as one JSON line."""
    if library == "mpi":
        from mpi4py import MPI

        comm = MPI.COMM_WORLD
        found = {"mpich": measure(partial(mpi_calls, comm), comm.Barrier, sizes)}
        if comm.rank == 0:
            print(json.dumps(found), flush=True)
        return
    torch = __import__(library)
    dist = torch.distributed
    if library == "torch":
        torch.set_num_threads(1)
    dist.init_process_group(backend)
    makes = {"gloo": torch.empty} if library == "torch" else {"ours": torch.empty}
    if library == "dtrain":
        makes["empty"] = dist.empty
    found = {
        column: measure(partial(tensor_calls, dist, make=make), dist.barrier, sizes)
        for column, make in makes.items()
    }
    if dist.get_rank() == 0:
        print(json.dumps(found), flush=True)
    dist.destroy_process_group()


def launched(launcher, library, backend, sizes):
    """Run the ranks and return rank 0's {column: {kind: {bytes: seconds}}}."""
    command = [*launcher, __file__, "--rank-of", library, "--transport", backend]
    command += ["--sizes", *map(str, sizes)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    line = next(text for text in done.stdout.splitlines() if "{" in text)
    return json.loads(line[line.index("{") :])


def launchers(python, nproc):
    """{library: the command that starts its ranks}, of those that are here."""
    flags = ["--standalone", "--nproc-per-node", str(nproc)]
    found = {"dtrain": [str(Path(sys.executable).with_name("dtrun")), *flags]}
    if imports(python, "torch"):
        found["torch"] = [python, "-m", "torch.distributed.run", *flags]
    mpiexec = Path(python).with_name("mpiexec")
    if imports(python, "mpi4py") and mpiexec.exists():
        found["mpi"] = [str(mpiexec), "-n", str(nproc), python]
    return found


def imports(python, module):
    """Whether that interpreter has the module."""
    probe = f"import importlib.util as u; raise SystemExit(not u.find_spec({module!r}))"
    return not subprocess.run([python, "-c", probe], check=False).returncode


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
    columns = list(found)
    ratios = [
        (other, own) for other in ("gloo", "mpich") if other in found for own in ("ours", "empty")
    ]
    for kind in KINDS:
        names = "".join(f"{f'{column} us':>12}" for column in columns)
        over = "".join(f"{f'{other}/{own}':>13}" for other, own in ratios)
        print(f"\n# {kind}\n# {'bytes':>10}{names}{'GB/s':>8}{over}")
        for nbytes in found["ours"][kind]:
            at = {column: found[column][kind][nbytes] for column in columns}
            row = "".join(f"{at[column] * 1e6:>12.1f}" for column in columns)
            rate = nbytes / at["ours"] / 1e9
            over = "".join(f"{at[other] / at[own]:>12.2f}x" for other, own in ratios)
            print(f"{nbytes:>12}{row}{rate:>8.2f}{over}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--transport", default="shm", help="dtrain's transport (default shm)")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="bytes")
    parser.add_argument("--torch-python", default=sys.executable, help="an interpreter with torch")
    parser.add_argument("--rounds", type=int, default=1, help="runs of each library")
    parser.add_argument("--rank-of", choices=["dtrain", "torch", "mpi"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_of:
        rank_main(args.rank_of, args.transport, args.sizes)
        return
    starts = launchers(args.torch_python, args.nproc)
    blas = os.environ.get("OPENBLAS_CORETYPE", "unset")
    print(f"# {args.nproc} ranks, transport {args.transport}, float32, {os.cpu_count()} cores, "
          f"OPENBLAS_CORETYPE {blas}, beside: {', '.join(list(starts)[1:]) or 'nothing'}, load "
          f"{os.getloadavg()[0]:.1f}")  # fmt: skip
    rounds = []
    for _ in range(args.rounds):
        rounds.append({})
        for library, start in starts.items():
            backend = "gloo" if library == "torch" else args.transport
            rounds[-1].update(launched(start, library, backend, args.sizes))
    print_table(median_of(rounds))


if __name__ == "__main__":
    main()
