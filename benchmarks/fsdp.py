"""A training step with fully_shard beside one with DDP, and PyTorch's; memory of several ranks.

    python benchmarks/fsdp.py                        # 2 ranks, one thread each, transport shm
    python benchmarks/fsdp.py --torch-python PATH    # PyTorch with gloo, in the same minutes
    python benchmarks/fsdp.py --memory               # bytes per parameter for 1, 2 and 4 ranks

Each rank has the same GPT twice, under DDP and fully sharded (a unit for each block, one for the
rest), and trains them in turn, a block of steps each. Memory is the proportional set size of all
ranks together after a few steps of AdamW less that before the model was made, of layers so large
that activations do not count.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import sys

from beside import ONE_THREAD, command, measured, with_torch
from ddp import block
from models import build

WIDTH, LAYERS = 1024, 24  # of the model whose memory is measured: 25.2 M parameters


def sharded(library, model):
    fsdp = importlib.import_module(f"{library}.distributed.fsdp")
    for part in getattr(model, "blocks", model.children()):
        fsdp.fully_shard(part)
    return fsdp.fully_shard(model)


def time_steps(args):
    """Rank 0 prints the medians of both kinds of step, in ms."""
    torch = joined(args)
    runs = {}
    for kind in ("ddp", "fsdp"):
        model, x, y = build(torch, "gpt")
        parallel = torch.nn.parallel.DistributedDataParallel
        model = sharded(args.library, model) if kind == "fsdp" else parallel(model)
        runs[kind] = model, x, y, torch.optim.AdamW(model.parameters(), lr=1e-3)
    times = {kind: [] for kind in runs}
    losses = {}
    for number in range(args.blocks + 1):
        for kind, run in runs.items():
            torch.distributed.barrier()
            losses[kind] = block(*run, times[kind] if number else [])
    assert abs(losses["ddp"] - losses["fsdp"]) < 1e-4, losses
    report(torch, {kind: statistics.median(taken) * 1e3 for kind, taken in times.items()})


def weigh(args):
    """Rank 0 prints bytes per parameter on this host."""
    torch = joined(args)

    def train(width, layers):
        model = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(layers)))
        model = sharded(args.library, model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(3):
            model(torch.randn(2, width)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        torch.distributed.barrier()
        return model, optimizer

    small = train(8, 2)  # what is imported late
    before = proportional_set_size()
    large = train(WIDTH, LAYERS)
    grown = torch.tensor([float(proportional_set_size() - before)])
    del small, large
    torch.distributed.all_reduce(grown)
    parameters = LAYERS * (WIDTH + 1) * WIDTH
    report(torch, {"bytes": grown.item() / parameters})


def proportional_set_size():
    with open("/proc/self/smaps_rollup", encoding="ascii") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def joined(args):
    torch = importlib.import_module(args.library)
    torch.set_num_threads(1)
    dist = torch.distributed
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("gloo" if args.library == "torch" else args.transport, **alone)
    return torch


def report(torch, found):
    if torch.distributed.get_rank() == 0:
        print(json.dumps(found), flush=True)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def launched(library, args, python, nproc):
    start = command(library, python, nproc)
    env = {**os.environ, **dict.fromkeys(ONE_THREAD, "1")}
    flags = ["--library", library, "--transport", args.transport, "--blocks", str(args.blocks)]
    return measured(start, __file__, [*flags, *["--memory"] * args.memory], env)


def print_memory(args):
    unit = 4 / LAYERS
    print(f"# bytes per parameter on the host; 16 + {unit:.2f} a rank are expected")
    for nproc in (1, 2, 4):
        found = launched("dtrain", args, sys.executable, nproc)["bytes"]
        print(f"{nproc} ranks{found:>10.2f}{16 + nproc * unit:>10.2f}", flush=True)


def print_times(args, python):
    print(f"# ms per step of the GPT, {args.nproc} ranks of 1 thread, {args.transport}, load "
          f"{os.getloadavg()[0]:.1f}\n#            ddp      fsdp  fsdp/ddp")  # fmt: skip
    rows = {"dtrain": launched("dtrain", args, sys.executable, args.nproc)}
    if python:
        rows["torch"] = launched("torch", args, python, args.nproc)
    for library, found in rows.items():
        ratio = found["fsdp"] / found["ddp"]
        print(f"{library:<8}{found['ddp']:>8.1f}{found['fsdp']:>10.1f}{ratio:>10.3f}", flush=True)
    if python:
        print(f"fsdp: {rows['dtrain']['fsdp'] / rows['torch']['fsdp']:.3f} of torch's")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--transport", default="shm", help="dtrain's transport (default shm)")
    parser.add_argument("--blocks", type=int, default=8, help="blocks of steps of each kind")
    parser.add_argument("--torch-python", default=sys.executable, help="an interpreter with torch")
    parser.add_argument("--memory", action="store_true", help="memory, not time")
    parser.add_argument("--library", choices=["dtrain", "torch"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.library:
        (weigh if args.memory else time_steps)(args)
    elif args.memory:
        print_memory(args)
    else:
        print_times(args, with_torch(args.torch_python))


if __name__ == "__main__":
    main()
