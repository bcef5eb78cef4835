"""Remote calls between two processes, timed: `python benchmarks/rpc.py [--torch PYTHON]`.

The same calls as torch's: a small rpc_sync, 2000 pipelined ones, echoes of tensors, remote with
to_here. With `--torch` the script runs once more under that interpreter, with torch in dtrain's
place. `--over tcp` encrypts; with DTRAIN_DATA_PLANE=plaintext it does not. Prints medians, one line
each.
"""

import argparse
import importlib
import os
import statistics
import subprocess
import sys
import time
from multiprocessing import get_context


def add(a, b):
    return a + b


def ident(t):
    return t


def median_us(call, times):
    taken = []
    for _ in range(times):
        begun = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken) * 1e6


def many(rpc):
    for future in [rpc.rpc_async("w1", add, (1, 2)) for _ in range(2000)]:
        future.wait()


def worker(library, rank, port, over):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    for name in ("RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
    torch = importlib.import_module(library)
    rpc = importlib.import_module(f"{library}.distributed.rpc")
    torch.set_num_threads(1)
    begun = time.perf_counter()
    options = rpc.TensorPipeRpcBackendOptions(_transports=[over]) if over else None
    rpc.init_rpc(f"w{rank}", rank=rank, world_size=2, rpc_backend_options=options)
    if rank == 0:
        print(f"{library}: init_rpc {time.perf_counter() - begun:.3f} s")
        for _ in range(50):
            rpc.rpc_sync("w1", add, (1, 2))
        print(f"rpc_sync {median_us(lambda: rpc.rpc_sync('w1', add, (1, 2)), 1000):.0f} us")
        print(f"pipelined {2000e6 / median_us(lambda: many(rpc), 5):.0f} calls/s")
        for nbytes in (1 << 10, 1 << 20, 16 << 20):
            x = torch.ones(nbytes // 4)
            taken = median_us(lambda x=x: rpc.rpc_sync("w1", ident, (x,)), 30)
            print(f"echo {nbytes} B {taken:.0f} us")
        both = median_us(lambda: rpc.remote("w1", add, (1, 2)).to_here(), 200)
        print(f"remote + to_here {both:.0f} us", flush=True)
    rpc.shutdown()


def run(library, port, over):
    context = get_context("spawn")
    ranks = [context.Process(target=worker, args=(library, rank, port, over)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    if any(rank.exitcode for rank in ranks):
        sys.exit(f"{library}: a worker failed")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--library", default="dtrain")
    parser.add_argument("--torch", help="an interpreter that has PyTorch")
    parser.add_argument("--over", choices=["unix", "zmq", "tcp"], help="what carries messages")
    parser.add_argument("--port", type=int, default=29677)
    options = parser.parse_args()
    run(options.library, options.port, options.over)
    if options.torch:
        subprocess.run([options.torch, __file__, "--library", "torch"], check=True)
