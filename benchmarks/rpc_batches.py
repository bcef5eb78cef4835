"""Calls answered one by one and in batches: `python benchmarks/rpc_batches.py [--torch PYTHON]`.

A worker has a network; another asks it about `--calls` inputs at a time. It answers each call as it
comes, or gathers them and works on all of them at once (`rpc.functions.async_execution`). Prints
the time for each call, medians, by width of the network. With `--torch` the script runs once more
under that interpreter, with torch in dtrain's place.
"""

import argparse
import importlib
import os
import statistics
import subprocess
import sys
import threading
import time
from multiprocessing import get_context

LIBRARY = "torch" if "--library=torch" in sys.argv else "dtrain"  # spawned processes have these too
torch = importlib.import_module(LIBRARY)
rpc = importlib.import_module(f"{LIBRARY}.distributed.rpc")
INPUTS = 64


class Network:
    """One layer and its activation on both ways of answering."""

    def __init__(self, width, size):
        self.layer, self.size = torch.nn.Linear(INPUTS, width), size
        self.lock = threading.Lock()
        self.asked, self.answers = [], torch.futures.Future()

    def compute(self, x):
        with torch.no_grad():
            return self.layer(x).relu().sum(dim=1)

    def alone(self, x):
        return self.compute(x.unsqueeze(0))[0]

    @rpc.functions.async_execution
    def together(self, x):
        with self.lock:
            number, answers = len(self.asked), self.answers
            self.asked.append(x)
            mine = answers.then(lambda done: done.wait()[number])
            if len(self.asked) == self.size:
                asked, self.asked, self.answers = self.asked, [], torch.futures.Future()
                answers.set_result(self.compute(torch.stack(asked)))
        return mine


def microseconds(ask, x, calls, rounds):
    taken = []
    for _ in range(rounds):
        begun = time.perf_counter()
        for future in [ask(x) for _ in range(calls)]:
            future.wait()
        taken.append((time.perf_counter() - begun) / calls)
    return statistics.median(taken) * 1e6


def worker(rank, options):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(options.port))
    torch.set_num_threads(1)
    rpc.init_rpc(f"w{rank}", rank=rank, world_size=2)
    for width in options.widths if rank == 0 else ():
        network, x = rpc.remote("w1", Network, (width, options.calls)), torch.ones(INPUTS)
        ways = {way: getattr(network.rpc_async(), way) for way in ("alone", "together")}
        for ask in ways.values():
            microseconds(ask, x, options.calls, 10)
        took = {way: microseconds(ask, x, options.calls, 100) for way, ask in ways.items()}
        print(
            f"{LIBRARY}: width {width}, {options.calls} calls at a time: one by one "
            f"{took['alone']:.0f} us a call, in batches {took['together']:.0f} us",
            flush=True,
        )
        del network, ways, ask
    rpc.shutdown()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=32)
    parser.add_argument("--widths", type=int, nargs="*", default=[64, 4096, 16384])
    parser.add_argument("--library", default="dtrain", choices=["dtrain", "torch"])
    parser.add_argument("--torch", help="an interpreter that has PyTorch")
    parser.add_argument("--port", type=int, default=29678)
    options = parser.parse_args()
    context = get_context("spawn")
    ranks = [context.Process(target=worker, args=(rank, options)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    if any(rank.exitcode for rank in ranks):
        sys.exit("a worker failed")
    if options.torch:
        arguments = ["--calls", options.calls, "--widths", *options.widths]
        command = [options.torch, __file__, "--library=torch", *map(str, arguments)]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
