"""Latency and bandwidth of the collectives, in the table the field knows (OSU micro-benchmarks).

    python benchmarks/collectives.py --nproc 2 --transport zmq
    python benchmarks/collectives.py --torch-python PATH    # PyTorch with gloo beside it

Starts its own ranks with dtrun. Times are medians in the caller of rank 0, each call after a
barrier; GB/s is bytes over time (algorithm bandwidth). With PyTorch at hand (in this interpreter or
in the one named) the same file runs under torchrun in the same minutes, and the ratio is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
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


def measure(torch, sizes):
    """{kind: {bytes: seconds}} on this rank; the same code for both libraries."""
    dist = torch.distributed
    world = dist.get_world_size()
    found = {kind: {} for kind in KINDS}
    for nbytes in sizes:
        n = nbytes // 4
        repeats = 200 if nbytes < 1 << 20 else 20
        x, parts = torch.ones(n), [torch.empty(n) for _ in range(world)]
        whole, part = torch.ones(max(n // world, 1) * world), torch.empty(max(n // world, 1))
        calls = {
            "all_reduce": lambda x=x: dist.all_reduce(x),
            "all_gather": lambda x=x, parts=parts: dist.all_gather(parts, x),
            "broadcast": lambda x=x: dist.broadcast(x, 0),
            "reduce_scatter": lambda p=part, w=whole: dist.reduce_scatter_tensor(p, w),
        }
        for kind, call in calls.items():
            found[kind][nbytes] = median_time(call, dist.barrier, repeats)
    found["barrier"][0] = median_time(dist.barrier, dist.barrier, 200)
    return found


def rank_main(library, backend, sizes):
    """What every rank runs: rank 0 prints its times as one JSON line."""
    torch = __import__(library)
    if library == "torch":
        torch.set_num_threads(1)
    torch.distributed.init_process_group(backend)
    found = measure(torch, sizes)
    if torch.distributed.get_rank() == 0:
        print(json.dumps(found), flush=True)
    torch.distributed.destroy_process_group()


def launch(launcher, library, backend, nproc, sizes):
    """Run the ranks and return rank 0's times."""
    command = [*launcher, "--standalone", "--nproc-per-node", str(nproc), __file__]
    command += ["--rank-of", library, "--transport", backend, "--sizes", *map(str, sizes)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    line = next(text for text in done.stdout.splitlines() if "{" in text)
    found = json.loads(line[line.index("{") :])
    return {kind: {int(n): t for n, t in times.items()} for kind, times in found.items()}


def torch_launcher(python):
    """The command that runs torchrun with `python`, or None when it has no PyTorch."""
    probe = [python, "-c", "import importlib.util as u; raise SystemExit(not u.find_spec('torch'))"]
    if subprocess.run(probe, check=False).returncode:
        return None
    return [python, "-m", "torch.distributed.run"]


def print_table(ours, theirs):
    """One block per collective: bytes, microseconds, GB/s, and PyTorch's with the ratio."""
    for kind in KINDS:
        beside = "      gloo us   gloo/ours" if theirs else ""
        print(f"\n# {kind}\n# {'bytes':>10} {'median us':>12} {'GB/s':>8}{beside}")
        for nbytes, seconds in ours[kind].items():
            row = f"{nbytes:>12} {seconds * 1e6:>12.1f} {nbytes / seconds / 1e9:>8.2f}"
            if theirs:
                other = theirs[kind][nbytes]
                row += f" {other * 1e6:>12.1f} {other / seconds:>10.2f}x"
            print(row)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--transport", default="zmq", help="dtrain's transport (default zmq)")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="bytes")
    parser.add_argument("--torch-python", default=sys.executable, help="an interpreter with torch")
    parser.add_argument("--rank-of", choices=["dtrain", "torch"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_of:
        return rank_main(args.rank_of, args.transport, args.sizes)
    launcher = torch_launcher(args.torch_python)
    blas = os.environ.get("OPENBLAS_CORETYPE", "unset")
    compared = "" if launcher else "; no PyTorch to compare with"
    print(f"# {args.nproc} ranks, transport {args.transport}, float32, {os.cpu_count()} cores, "
          f"OPENBLAS_CORETYPE {blas}{compared}")  # fmt: skip
    dtrun = [str(Path(sys.executable).with_name("dtrun"))]
    ours = launch(dtrun, "dtrain", args.transport, args.nproc, args.sizes)
    theirs = launcher and launch(launcher, "torch", "gloo", args.nproc, args.sizes)
    print_table(ours, theirs)


if __name__ == "__main__":
    main()
