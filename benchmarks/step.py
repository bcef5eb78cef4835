"""Time of one training step (forward, backward, AdamW) of an MLP, a CNN and a GPT.

    python benchmarks/step.py                                # one process, one thread
    python benchmarks/step.py --mode ddp --nproc 2           # DistributedDataParallel under dtrun
    python benchmarks/step.py --torch-python PATH --rounds 3 # PyTorch beside it

Every model runs in a process of its own, and PyTorch's (in this interpreter or in the one named)
right after ours, --rounds times in turn: times are medians over the steps of the best round, in ms.
The losses after the last step are printed because they should agree. PyTorch's AdamW is the default
one, or with --fused its fastest.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import sys
import time

from beside import ONE_THREAD, command, measured, with_torch
from models import build

PARTS = ("step", "forward", "backward", "optimizer")


def timed_steps(torch, model, x, y, optimizer, steps):
    """Seconds of each part of each step, and the last loss."""
    times = {part: [] for part in PARTS}
    for _ in range(steps):
        marks = [time.perf_counter()]
        loss = model(x, y)
        marks.append(time.perf_counter())
        loss.backward()
        marks.append(time.perf_counter())
        optimizer.step()
        optimizer.zero_grad()
        marks.append(time.perf_counter())
        times["step"].append(marks[3] - marks[0])
        for i, part in enumerate(PARTS[1:]):
            times[part].append(marks[i + 1] - marks[i])
    return times, loss.item()


def rank_main(library, args):
    """What the child runs: rank 0 prints medians in ms as one JSON line."""
    torch = importlib.import_module(library)
    torch.set_num_threads(1)
    distributed = args.mode == "ddp"
    if distributed:
        torch.distributed.init_process_group("gloo" if library == "torch" else args.transport)
    model, x, y = build(torch, args.models[0])
    if distributed:
        parallel = importlib.import_module(f"{library}.nn.parallel")
        model = parallel.DistributedDataParallel(model)
    options = {"fused": True} if args.fused and library == "torch" else {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, **options)
    times, loss = timed_steps(torch, model, x, y, optimizer, args.steps)
    if not distributed or torch.distributed.get_rank() == 0:
        warm = args.steps // 4
        found = {part: statistics.median(t[warm:]) * 1e3 for part, t in times.items()}
        print(json.dumps({**found, "loss": loss}), flush=True)
    if distributed:
        torch.distributed.destroy_process_group()


def best_rounds(model, args, python):
    """{library: its round with the shortest step}; the libraries take turns."""
    found = {}
    nproc = args.nproc if args.mode == "ddp" else 1
    env = {**os.environ, **dict.fromkeys(ONE_THREAD, "1")}
    for _ in range(args.rounds):
        for library in ("dtrain", "torch") if python else ("dtrain",):
            start = command(library, python if library == "torch" else sys.executable, nproc)
            flags = ["--library", library, "--models", model, "--mode", args.mode]
            flags += ["--steps", str(args.steps), "--transport", args.transport]
            result = measured(start, __file__, flags + ["--fused"] * args.fused, env)
            if library not in found or result["step"] < found[library]["step"]:
                found[library] = result
    return found


def print_row(model, library, result, ratio):
    times = "".join(f"{result[part]:>10.1f}" for part in PARTS)
    print(f"{model:<6}{library:<8}{times}{result['loss']:>10.4f}{ratio:>14}", flush=True)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = ["mlp", "cnn", "gpt"]
    parser.add_argument("--models", nargs="+", choices=names, default=names)
    parser.add_argument("--mode", choices=["single", "ddp"], default="single")
    parser.add_argument("--nproc", type=int, default=2, help="ranks in mode ddp (default 2)")
    parser.add_argument("--transport", default="zmq", help="dtrain's transport (default zmq)")
    parser.add_argument("--steps", type=int, default=20, help="a quarter of them warms up")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--fused", action="store_true", help="PyTorch's fused AdamW")
    parser.add_argument("--torch-python", default=sys.executable, help="an interpreter with torch")
    parser.add_argument("--library", choices=["dtrain", "torch"], help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    args = arguments()
    if args.library:
        return rank_main(args.library, args)
    python = with_torch(args.torch_python)
    ranks = f"{args.nproc} ranks" if args.mode == "ddp" else "1 process"
    blas = os.environ.get("OPENBLAS_CORETYPE", "unset")
    print(f"# ms per step, {ranks} of 1 thread, best of {args.rounds} rounds, OPENBLAS_CORETYPE "
          f"{blas}" + ("" if python else "; no PyTorch to compare with"))  # fmt: skip
    print("# model        " + "".join(f"{part:>10}" for part in PARTS) + "      loss    torch/ours")
    for model in args.models:
        found = best_rounds(model, args, python)
        for library, result in found.items():
            ratio = result["step"] / found["dtrain"]["step"]
            print_row(model, library, result, f"{ratio:.2f}x" if library == "torch" else "")


if __name__ == "__main__":
    main()
