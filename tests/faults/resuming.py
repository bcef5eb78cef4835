"""A training run that is killed and goes on from its checkpoint: nothing about it may change.

    dtrun ... tests/faults/resuming.py FOLDER STEPS ddp|fsdp [PHASE:NTH:RANK]

Model with dropout, optimizer, learning-rate schedule, order of the data and each rank's random
state are saved with `async_save` after every third step. `PHASE` of tests/faults/phases.py is where
that rank is killed, when it comes there for the NTH time. `DROPOUT=0` in the environment: without
random numbers of a rank's own. Rank 0 prints the mean losses and a digest of what was trained.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

import dtrain as torch
import dtrain.distributed as dist
import dtrain.distributed.checkpoint as dcp
from dtrain.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from dtrain.distributed.fsdp import fully_shard
from dtrain.utils.data import DataLoader, DistributedSampler, TensorDataset
from tests.faults import phases

nn = torch.nn
FOLDER, STEPS, KIND = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
BATCH, EVERY = 8, 3  # samples of all ranks; steps from one checkpoint to the next
DATA = TensorDataset(torch.arange(80.0).view(40, 2) / 80, torch.arange(40.0).view(40, 1) / 40)


class Run:
    """All that has to survive, as one object that a checkpoint asks for its state."""

    def __init__(self) -> None:
        torch.manual_seed(7)
        dropout = nn.Dropout(float(os.environ.get("DROPOUT", "0.2")))
        self.model = nn.Sequential(nn.Linear(2, 16), dropout, nn.Tanh(), nn.Linear(16, 1))
        if KIND == "fsdp":
            for part in (self.model[0], self.model):
                fully_shard(part)
        else:
            self.model = nn.parallel.DistributedDataParallel(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, STEPS)
        self.sampler = DistributedSampler(DATA, seed=3)
        self.step, self.losses = 0, []
        torch.manual_seed(dist.get_rank())

    def state_dict(self) -> dict:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {
            "model": model,
            "optimizer": optimizer,
            "schedule": self.schedule.state_dict(),
            "sampler": self.sampler.state_dict(),
            f"random.{dist.get_rank()}": torch.get_rng_state(),
            "step": self.step,
            "losses": list(self.losses),
        }

    def load_state_dict(self, state: dict) -> None:
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        self.schedule.load_state_dict(state["schedule"])
        self.sampler.load_state_dict(state["sampler"])
        torch.set_rng_state(state[f"random.{dist.get_rank()}"])
        self.step, self.losses = state["step"], list(state["losses"])

    def train(self) -> None:
        saving = None
        while self.step < STEPS:
            self.sampler.set_epoch(self.sampler.epoch)
            # An iterator begins by drawing a seed. From the default generator, a run that begins in
            # the middle of an epoch would draw one more than the run that it continues.
            loader = DataLoader(
                DATA,
                batch_size=BATCH // dist.get_world_size(),
                sampler=self.sampler,
                generator=torch.Generator(),
            )
            for inputs, targets in loader:
                self.losses.append(self.learn(inputs, targets))
                self.step += 1
                if self.step % EVERY == 0:
                    place = FOLDER / f"step-{self.step}"
                    saving = dcp.async_save({"run": self}, checkpoint_id=place)
                if self.step == STEPS:
                    break
            else:
                self.sampler.set_epoch(self.sampler.epoch + 1)
        if saving is not None:
            saving.result()

    def learn(self, inputs: torch.Tensor, targets: torch.Tensor) -> float:
        loss = nn.functional.mse_loss(self.model(inputs), targets)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        mean = loss.detach() / dist.get_world_size()
        dist.all_reduce(mean)
        return mean.item()


def digest(run: Run) -> str:
    """Of parameters and optimizer, whole, and of the random state of all ranks."""
    options = dcp.state_dict.StateDictOptions(full_state_dict=True)
    states = get_state_dict(run.model, run.optimizer, options=options)
    flat, _ = dcp._nested_dict.flatten_state_dict({"model": states[0], "optimizer": states[1]})
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, torch.get_rng_state().numpy().tobytes())
    found = hashlib.sha256(b"".join(everyone))
    for key in sorted(flat):
        found.update(key.encode())
        value = flat[key]
        found.update(value.numpy().tobytes() if torch.is_tensor(value) else repr(value).encode())
    return found.hexdigest()


def main() -> None:
    for plan in sys.argv[4:]:
        name, nth, victim = plan.split(":")
        if os.environ["RANK"] == victim:
            phases.arm(name, lambda: None, int(nth))
    dist.init_process_group()
    run = Run()
    last = dcp.latest(FOLDER)
    if last is not None:
        dcp.load({"run": run}, checkpoint_id=last)
    began = run.step
    run.train()
    found = {"began": began, "losses": run.losses, "digest": digest(run)}
    if dist.get_rank() == 0:
        print(json.dumps(found), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
