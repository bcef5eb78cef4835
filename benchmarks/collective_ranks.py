"""What every rank of `collectives.py` runs, with dtrain, PyTorch or mpi4py.

Rank 0 prints one line of JSON: {column: {kind: {bytes: seconds}}}. Times are medians in the caller,
each call after a barrier.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from functools import partial

KINDS = ["all_reduce", "all_gather", "broadcast", "reduce_scatter", "send", "barrier"]
LARGE = 1 << 20


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


def answered_send(send, recv, rank, x, answer):
    """Rank 0 sends `x` to rank 1, which answers with 4 bytes; the others do nothing."""
    if rank == 0:
        return lambda: (send(x, 1), recv(answer, 1))
    if rank == 1:
        return lambda: (recv(x, 0), send(answer, 0))
    return lambda: None


def tensor_calls(dist, nbytes, make):
    """{kind: a call on float32 tensors from `make(count)`}."""
    n, world = nbytes // 4, dist.get_world_size()
    x, part = make(n).fill_(1.0), make(max(n // world, 1))
    whole, gathered = make(max(n // world, 1) * world).fill_(1.0), make(n * world)
    return {
        "all_reduce": lambda: dist.all_reduce(x),
        "all_gather": lambda: dist.all_gather_into_tensor(gathered, x),
        "broadcast": lambda: dist.broadcast(x, 0),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(part, whole),
        "send": answered_send(dist.send, dist.recv, dist.get_rank(), x, make(1).fill_(0.0)),
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
        "send": answered_send(comm.Send, comm.Recv, comm.rank, x, np.zeros(1, np.float32)),
    }


def measure(calls_for, barrier, args):
    """{kind: {bytes: seconds}} on this rank; the same code for all libraries."""
    found = {kind: {} for kind in args.kinds}
    for nbytes in args.sizes:
        repeats = 200 if nbytes < LARGE else args.repeats
        for kind, call in calls_for(nbytes).items():
            if kind in found:
                found[kind][nbytes] = median_time(call, barrier, repeats)
    if "barrier" in found:
        found["barrier"][0] = median_time(barrier, barrier, 200)
    return found


def measured_with_mpi(args):
    """What MPICH takes, on rank 0."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    found = {"mpich": measure(partial(mpi_calls, comm), comm.Barrier, args)}
    return found if comm.rank == 0 else None


def measured_with_tensors(args):
    """What dtrain or PyTorch take, on rank 0."""
    torch = __import__(args.library)
    dist = torch.distributed
    if args.library == "torch":
        torch.set_num_threads(1)
    dist.init_process_group(args.backend)
    makes = {"gloo": torch.empty} if args.library == "torch" else {"ours": torch.empty}
    if args.backend == "shm":
        makes["empty"] = dist.empty
    found = {
        column: measure(partial(tensor_calls, dist, make=make), dist.barrier, args)
        for column, make in makes.items()
    }
    rank = dist.get_rank()
    dist.barrier()  # nobody leaves while another still measures
    dist.destroy_process_group()
    return found if rank == 0 else None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("library", choices=["dtrain", "torch", "mpi"])
    parser.add_argument("backend")
    parser.add_argument("--sizes", type=int, nargs="+", required=True)
    parser.add_argument("--kinds", nargs="+", default=KINDS)
    parser.add_argument("--repeats", type=int, default=20, help="of calls of 1 MiB and more")
    args = parser.parse_args()
    found = measured_with_mpi(args) if args.library == "mpi" else measured_with_tensors(args)
    if found is not None:
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
