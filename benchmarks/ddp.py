"""What DistributedDataParallel adds to a training step, with PyTorch's beside it.

    python benchmarks/ddp.py                        # 2 ranks, one thread each, transport shm
    python benchmarks/ddp.py --torch-python PATH    # PyTorch with gloo, in the same minutes
    python benchmarks/ddp.py --link --models gpt paced   # over 1 Gbit/s between two namespaces

Each rank has the same model twice, plain and wrapped, and trains them in turn, a block of steps
each; both ranks begin a block together, so that the plain steps too share the machine. "adds" is
the wrapped step less the plain one: medians over all blocks, in ms. Peak memory is that of another
run, which has the wrapped model alone. "paced" sleeps where gpt computes. "hidden" is the part of
the time in collectives that lies under backward in a trace of one more block.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import resource
import statistics
import sys
import time

from beside import ONE_THREAD, command, measured, with_torch
from models import build
from shaped_link import BYTES_PER_SECOND, run_over, shaped_link, why_not

BLOCK = 4  # steps of one model before the other has its turn; the first of them does not count


def wrapped(library, model, cap):
    parallel = importlib.import_module(f"{library}.nn.parallel")
    return parallel.DistributedDataParallel(model, bucket_cap_mb=cap)


def block(model, x, y, optimizer, times):
    """A few steps; their times in seconds go to `times`."""
    for step in range(BLOCK):
        start = time.perf_counter()
        loss = model(x, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step:
            times.append(time.perf_counter() - start)
    return loss.item()


def hidden(run):
    """The share of the time in collectives that lies under `backward` in the trace of a block."""
    with importlib.import_module("dtrain.profiler").profile() as prof:
        block(*run, [])
    calls = [event for event in prof.events() if event.category == "collective"]
    passes = [event for event in prof.events() if event.name == "backward"]
    under = sum(
        max(0.0, min(call.ended, one.ended) - max(call.begun, one.begun))
        for call in calls
        for one in passes
    )
    return under / sum(call.ended - call.begun for call in calls)


def rank_main(args):
    """What the child runs: rank 0 prints one line of JSON."""
    torch = importlib.import_module(args.library)
    torch.set_num_threads(1)
    dist = torch.distributed
    dist.init_process_group("gloo" if args.library == "torch" else args.transport)
    found, runs = {}, {}
    for kind in ("ddp",) if args.memory else ("plain", "ddp"):
        model, x, y = build(torch, args.models[0])
        model = wrapped(args.library, model, args.cap) if kind == "ddp" else model
        runs[kind] = model, x, y, torch.optim.AdamW(model.parameters(), lr=1e-3)
    times = {kind: [] for kind in runs}
    for number in range(args.blocks + 1):
        for kind, run in runs.items():
            dist.barrier()
            found[f"{kind} loss"] = block(*run, times[kind] if number else [])
    found |= {kind: statistics.median(all_of_them) * 1e3 for kind, all_of_them in times.items()}
    if args.library == "dtrain":
        found["hidden"] = hidden(runs["ddp"])
    found["gradients"] = sum(p.numel() * 4 for p in runs["ddp"][0].parameters())
    found["MiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if dist.get_rank() == 0:
        print(json.dumps(found), flush=True)
    dist.destroy_process_group()


def launched(library, model, args, python, *, memory):
    start = command(library, python, args.nproc)
    env = {**os.environ, **dict.fromkeys(ONE_THREAD, "1")}
    flags = ["--library", library, "--models", model, "--transport", args.transport]
    flags += ["--cap", str(args.cap)] if args.cap else []
    flags += ["--blocks", "1" if memory else str(args.blocks), *["--memory"] * memory]
    return measured(start, __file__, flags, env)


def row(library, model, args, python):
    """{figure: median over the rounds} of one library and model."""
    rounds = [launched(library, model, args, python, memory=False) for _ in range(args.rounds)]
    found = {key: statistics.median(each[key] for each in rounds) for key in rounds[0]}
    found["adds"] = statistics.median(each["ddp"] - each["plain"] for each in rounds)
    found["MiB"] = launched(library, model, args, python, memory=True)["MiB"]
    return found


def print_link(model, args):
    """A step over a shaped link beside the longer of computing and sending all gradients once."""
    refused = why_not()
    if refused:
        print(f"{model:<6}not run: {refused}")
        return
    with shaped_link() as names:
        for plane in ("curve", "plaintext"):
            env = {**os.environ, **dict.fromkeys(ONE_THREAD, "1"), "DTRAIN_DATA_PLANE": plane}
            flags = ["--library", "dtrain", "--models", model, "--transport", "tcp"]
            start = [sys.executable, __file__, *flags, "--blocks", str(args.blocks)]
            start += ["--cap", str(args.cap)] if args.cap else []
            found = run_over(names, start, env, timeout=600)
            wire = found["gradients"] / BYTES_PER_SECOND * 1e3
            limit = max(found["plain"], wire)
            print(f"{model:<6}{plane:<11}{found['plain']:>9.1f}{wire:>9.1f}{found['ddp']:>10.1f}"
                  f"{found['ddp'] / limit:>9.2f}{found['hidden']:>8.0%}", flush=True)  # fmt: skip


def print_model(model, rows):
    ours = rows["dtrain"]
    for library, found in rows.items():
        share = found["adds"] / found["plain"]
        line = f"{model:<6}{library:<8}{found['plain']:>10.1f}{found['ddp']:>10.1f}"
        line += f"{found['adds']:>9.2f}{share:>8.1%}{found['MiB']:>9.0f}"
        if library != "dtrain":
            line += f"{ours['adds'] / found['adds']:>16.2f}{ours['ddp'] / found['ddp']:>16.2f}"
        print(line, flush=True)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = ["mlp", "cnn", "gpt"]
    parser.add_argument("--models", nargs="+", choices=[*names, "paced"], default=names)
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--transport", default="shm", help="dtrain's transport (default shm)")
    parser.add_argument("--blocks", type=int, default=8, help=f"blocks of {BLOCK} steps each")
    parser.add_argument("--rounds", type=int, default=1, help="runs of each library")
    parser.add_argument("--torch-python", default=sys.executable, help="an interpreter with torch")
    parser.add_argument("--cap", type=float, help="bucket_cap_mb of both (default: theirs)")
    parser.add_argument("--link", action="store_true", help="over a link of 1 Gbit/s (root)")
    parser.add_argument("--library", choices=["dtrain", "torch"], help=argparse.SUPPRESS)
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    args = arguments()
    if args.library:
        rank_main(args)
        return
    if args.link:
        print("# ms per step, 2 ranks of 1 thread, 1 Gbit/s between them\n"
              "# model data         plain     wire   wrapped  /longer  hidden")  # fmt: skip
        for model in args.models:
            print_link(model, args)
        return
    python = with_torch(args.torch_python)
    blas = os.environ.get("OPENBLAS_CORETYPE", "unset")
    load = f"load {os.getloadavg()[0]:.1f}"
    print(f"# ms per step, {args.nproc} ranks of 1 thread, {args.transport}, median of "
          f"{args.rounds} rounds, OPENBLAS_CORETYPE {blas}, {load}")  # fmt: skip
    print("# model             plain   wrapped     adds   adds%      MiB"
          + ("   adds/torch's  wrapped/torch's" if python else ""))  # fmt: skip
    for model in args.models:
        rows = {"dtrain": row("dtrain", model, args, sys.executable)}
        if python:
            rows["torch"] = row("torch", model, args, python)
        print_model(model, rows)


if __name__ == "__main__":
    main()
