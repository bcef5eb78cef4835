"""The job that is killed: a small model with dropout, data, checkpoints and a remote call a step.

    dtrun ... tests/faults/training.py FOLDER STEPS PAUSE [PHASE:RANK ...]

Each step waits PAUSE seconds. Start n is killed in phase n of the list, if there is one. What
happens is written to FOLDER/history as lines of JSON, times on the monotonic clock: `struck`,
`lost` (a rank learns of it), `step` (the first one of each start), `end` with a digest of the final
weights.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import sys
import time
from pathlib import Path

import dtrain as torch
from dtrain import elastic
from dtrain.distributed import rpc
from dtrain.utils.data import DataLoader, DistributedSampler, TensorDataset
from tests.faults import phases

dist = torch.distributed
FOLDER, STEPS, PAUSE, PLAN = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4:]
START = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
RANK = int(os.environ["RANK"])


def note(event: str, **fields: object) -> None:
    """Add a line to the history; whole, as long as it is short."""
    line = {
        "at": time.monotonic(),
        "event": event,
        "start": START,
        "rank": RANK,
        "pid": os.getpid(),
    }
    line |= fields
    descriptor = os.open(FOLDER / "history", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(descriptor, json.dumps(line).encode() + b"\n")
    os.close(descriptor)


def plan() -> None:
    """Arm what this start is to die of."""
    if len(PLAN) > START:
        name, _, victim = PLAN[START].partition(":")
        if int(victim) == RANK:
            phases.arm(name, lambda: note("struck", phase=name))


def batch(sampler, step):
    """The batch of a step: the first of an epoch of its own."""
    sampler.set_epoch(step)
    return next(iter(DataLoader(DATA, batch_size=4, sampler=sampler)))


DATA = TensorDataset(torch.arange(256.0).view(64, 4) / 256, torch.arange(64.0).view(64, 1) / 64)


def train() -> None:
    """All of it."""
    dist.init_process_group()
    size = dist.get_world_size()
    rpc.init_rpc(f"worker{RANK}")
    torch.manual_seed(RANK)
    layers = (torch.nn.Linear(4, 32), torch.nn.Dropout(0.1), torch.nn.Linear(32, 1))
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Sequential(*layers))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    sampler = DistributedSampler(DATA, shuffle=True, seed=3)
    state = elastic.State(
        model=model, optimizer=optimizer, folder=FOLDER / "checkpoints", every=5, seen=0.0
    )
    first = True
    for step in elastic.run(state, STEPS):
        inputs, targets = batch(sampler, step)
        loss = torch.nn.functional.mse_loss(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        told = rpc.rpc_sync(f"worker{(RANK + 1) % size}", torch.add, (torch.ones(1), step))
        state.seen += told.item()
        time.sleep(PAUSE)
        if first:
            note("step", number=step)
            first = False
    rpc.shutdown()
    weights = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
    assert state.seen == STEPS * (STEPS + 1) / 2
    dist.destroy_process_group()
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    note("end", digest=hashlib.sha256(weights).hexdigest(), steps=state.step, kilobytes=usage)


if __name__ == "__main__":
    plan()
    try:
        train()
    except dist.DistError as error:
        note("lost", what=type(error).__name__)
        raise
