"""What the tests of pipelines share: a small model, its batches, and the stages of a rank."""

from __future__ import annotations

import dtrain as torch
import dtrain.distributed as dist
from dtrain.distributed.pipelining import PipelineStage

nn = torch.nn

WIDTH, LAYERS, BATCH = 6, 12, 12


def layers():
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(LAYERS)]


def batch_of(step, size=BATCH):
    generator = torch.Generator().manual_seed(step)
    return (torch.randn(size, WIDTH, generator=generator),
            torch.randn(size, WIDTH, generator=generator))  # fmt: skip


def mine(stages):
    """The stages of this rank."""
    every, size = layers(), LAYERS // stages
    return [
        PipelineStage(nn.Sequential(*every[s * size : (s + 1) * size]), s, stages)
        for s in range(dist.get_rank(), stages, dist.get_world_size())
    ]
