"""Golden losses of DDP: one plain process and 1, 2, 3 or 4 ranks train the same model.

Tolerances: 1e-5 between one process and several (the same mean, in float32, summed in another
order), none between bucket sizes. Losses are means over the whole batch, and over all ranks.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest

import dtrain as torch
import dtrain.distributed as dist
from dtrain.nn.parallel import DistributedDataParallel as DDP
from dtrain.testing.distributed import run_distributed
from tests import gpt_run

nn, F = torch.nn, torch.nn.functional

STEPS, BATCH, CONTEXT = 6, 12, 16  # 12 samples are equal shares for 1, 2, 3 and 4 ranks
TOLERANCE = 1e-5
CAPS = [None, 1e-6, 2e-3, 10.0]  # MiB: the default, a bucket for each parameter, some, one


class Classifier(nn.Module):
    """A network and its loss, so that all models are called in one way."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x, labels):
        return F.cross_entropy(self.layers(x), labels)


def mlp():
    return Classifier(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 5))


def cnn():
    return Classifier(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
        nn.Linear(32, 5),
    )  # fmt: skip


def gpt():
    return gpt_run.example().GPT(CONTEXT, width=32, layers=2)


def labelled(*shape):
    """A batch that differs from step to step, of random samples in five classes."""
    return lambda step: (
        torch.randn(BATCH, *shape, generator=torch.Generator().manual_seed(step)),
        (torch.arange(BATCH) + step) % 5,
    )


def text(step):
    example = gpt_run.example()
    return example.batch_of(example.read_text(gpt_run.ROOT / "LICENSE"), BATCH, CONTEXT, step)


MODELS = {"MLP": (mlp, labelled(16)), "CNN": (cnn, labelled(1, 8, 8)), "GPT": (gpt, text)}


def train(name, cap=None):
    """Losses and final parameters; without a process group on the whole batch in plain modules."""
    build, batch_of = MODELS[name]
    torch.manual_seed(3)
    model = build()
    ranks, rank = 1, 0
    if dist.is_initialized():
        ranks, rank = dist.get_world_size(), dist.get_rank()
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        model = DDP(model, bucket_cap_mb=cap)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    share, losses = BATCH // ranks, []
    for step in range(STEPS):
        loss = model(*(t[rank * share : (rank + 1) * share] for t in batch_of(step)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach() / ranks
        if ranks > 1:
            dist.all_reduce(mean)
        losses.append(mean.item())
    return losses, [p.detach().numpy().tobytes() for p in model.parameters()]


@functools.cache
def alone(name):
    return train(name)[0]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("name", MODELS)
def test_golden_losses_equal_one_process(name, ranks):
    for losses, _ in run_distributed(ranks, train, name):
        np.testing.assert_allclose(losses, alone(name), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["CNN", "GPT"])
def test_the_same_bits_for_every_bucket_size(name):
    """Losses and parameters do not depend on `bucket_cap_mb`."""
    first, *others = [run_distributed(3, train, name, cap) for cap in CAPS]
    assert all(run == first for run in others)
    assert len({tuple(parameters) for _, parameters in first}) == 1  # on all ranks
