"""Saving and loading checkpoints, beside what the disk does with plain writes and reads.

    python benchmarks/checkpoint.py                       # 2 ranks, 1 GiB, in a temporary folder
    python benchmarks/checkpoint.py --folder DIR --mib 4096 --ranks 4
    python benchmarks/checkpoint.py --training            # what async_save costs training steps

"disk" writes and reads one file of the same size per rank, all ranks at once, in pieces of 8 MiB,
and waits for the disk; files are dropped from the page cache before they are read. MB/s of all
ranks together, medians over rounds in which disk and checkpoint take turns. "extra" is how much
the resident memory of the rank that took most grew above what it was before the call, at its peak.
"async" is how long `async_save` holds the caller.

With --training each rank trains the GPT of `models`, in blocks of `EVERY` steps, every second of
which begins with an `async_save` of model and optimizer and ends when that is on the disk: one
thread a rank, so that all cores compute.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from beside import ONE_THREAD, command, measured
from fsdp import sharded
from models import build

import dtrain as torch
import dtrain.distributed as dist
import dtrain.distributed.checkpoint as dcp
from dtrain.distributed.checkpoint.state_dict import get_state_dict
from dtrain.distributed.tensor import DTensor, Shard

PIECE = 8 << 20
EVERY = 10  # steps from one save to the next


def state_of(mib):
    """This rank's part of `mib` MiB, in tensors of 16 MiB that are cut over the ranks."""
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    ranks, rows = dist.get_world_size(), 4096 // dist.get_world_size()
    local = np.random.default_rng(dist.get_rank()).random((rows, 1024), np.float32)
    return {
        f"layer{n}": DTensor.from_local(torch.tensor(local + n), mesh, [Shard(0)])
        for n in range(mib // 16)
    }, ranks


def write_plain(path, mib):
    piece = os.urandom(PIECE)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for _ in range((mib << 20) // PIECE):
        os.write(file, piece)
    os.fsync(file)
    os.close(file)


def read_plain(path):
    room = bytearray(PIECE)
    file = os.open(path, os.O_RDONLY)
    while os.readv(file, [room]):
        pass
    os.close(file)


def forget(folder):
    """Drop files from the page cache; they are on the disk."""
    for path in Path(folder).rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)


def status(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def timed(call):
    """(seconds until all ranks are through, MiB that the peak lies above the memory before)."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts anew
    before = status("VmRSS")
    dist.barrier()
    start = time.perf_counter()
    call()
    dist.barrier()
    return time.perf_counter() - start, status("VmHWM") - before


def rank_main(args):
    """What the child runs: rank 0 prints one line of JSON."""
    dist.init_process_group("shm")
    state, ranks = state_of(args.mib)
    rank, own = dist.get_rank(), args.mib // ranks
    plain, folder = Path(args.folder) / f"plain{rank}", Path(args.folder)
    found, futures = {}, []

    def keep(name, call):
        found.setdefault(name, []).append(timed(call))

    for number in range(args.rounds):
        saved, beside = folder / f"step-{number}", folder / f"async-{number}"
        keep("disk write", lambda: write_plain(plain, own))
        keep("save", lambda at=saved: dcp.save(state, checkpoint_id=at))
        if rank == 0:
            forget(args.folder)
        keep("disk read", lambda: read_plain(plain))
        keep("load", lambda at=saved: dcp.load(state, checkpoint_id=at))
        keep("async", lambda at=beside: futures.append(dcp.async_save(state, checkpoint_id=at)))
        futures.pop().result()
        dist.barrier()
        if rank == 0:
            shutil.rmtree(saved)
            shutil.rmtree(beside)
    extra = torch.tensor([max(extra for _, extra in times) for times in found.values()])
    dist.all_reduce(extra, dist.ReduceOp.MAX)
    if rank == 0:
        seconds = {name: statistics.median(t for t, _ in times) for name, times in found.items()}
        print(json.dumps({"seconds": seconds, "extra": extra.tolist()}), flush=True)
    dist.destroy_process_group()


def train(args):
    """Rank 0 prints medians of blocks with and without a save, and of what the calls held it."""
    dist.init_process_group("shm")
    model, x, y = build(torch, "gpt")
    fsdp = args.kind == "fsdp"
    wrapped = sharded("dtrain", model) if fsdp else torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    found, held = {"plain": [], "saving": []}, []
    for number in range(2 * args.rounds + 1):
        saves = number % 2 == 1
        dist.barrier()
        start = time.perf_counter()
        if saves:
            parts = get_state_dict(model, optimizer)
            state = dict(zip(("model", "optimizer"), parts, strict=True))
            done = dcp.async_save(state, checkpoint_id=Path(args.folder) / f"step-{number}")
            held.append(time.perf_counter() - start)
        for _ in range(EVERY):
            wrapped(x, y).backward()
            optimizer.step()
            optimizer.zero_grad()
        if saves:
            done.result()
        if number:
            found["saving" if saves else "plain"].append(time.perf_counter() - start)
    if dist.get_rank() == 0:
        seconds = {name: statistics.median(times) for name, times in found.items()}
        print(json.dumps({**seconds, "held": statistics.median(held)}), flush=True)
    dist.destroy_process_group()


def print_training(args, folder):
    print(f"# ms a step, {args.ranks} ranks of 1 thread, a save in each {EVERY}th step\n"
          "#           plain    saving   longer  the call")  # fmt: skip
    for kind in ("ddp", "fsdp"):
        flags = ["--child", "--kind", kind, "--folder", folder, "--rounds", str(args.rounds)]
        start = command("dtrain", sys.executable, args.ranks)
        env = {**os.environ, **dict.fromkeys(ONE_THREAD, "1")}
        found = measured(start, __file__, flags, env)
        plain, saving = (found[key] / EVERY * 1e3 for key in ("plain", "saving"))
        print(f"{kind:<8}{plain:>9.1f}{saving:>10.1f}{saving / plain - 1:>9.1%}"
              f"{found['held'] * 1e3:>10.1f}", flush=True)  # fmt: skip


def print_rates(args, found):
    print(f"# {args.mib} MiB, {args.ranks} ranks: MB/s, share of the disk's, MiB of extra memory")
    rates = {name: args.mib * 1.048576 / time for name, time in found["seconds"].items()}
    for (name, rate), extra in zip(rates.items(), found["extra"], strict=True):
        beside = {"save": "disk write", "load": "disk read"}.get(name)
        share = f"{rate / rates[beside]:8.0%}" if beside else " " * 8
        print(f"{name:12}{rate:10.0f}{share}{extra:10.0f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", help="on the disk that is measured")
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--training", action="store_true", help="what async_save costs training")
    parser.add_argument("--kind", choices=["ddp", "fsdp"], help=argparse.SUPPRESS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        (train if args.kind else rank_main)(args)
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        if args.training:
            print_training(args, folder)
            return
        flags = {"folder": folder, "mib": args.mib, "ranks": args.ranks, "rounds": args.rounds}
        given = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        start = command("dtrain", sys.executable, args.ranks)
        print_rates(args, measured(start, __file__, ["--child", *given], dict(os.environ)))


if __name__ == "__main__":
    main()
