"""Stages of a pipeline that are sharded themselves: 2 stages by 2 ranks on a mesh of 4."""

from __future__ import annotations

import functools

import numpy as np
import pytest

import dtrain as torch
import dtrain.distributed as dist
from dtrain.distributed.device_mesh import init_device_mesh
from dtrain.distributed.fsdp import FullyShardedDataParallel as FSDP, fully_shard
from dtrain.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from dtrain.testing.distributed import run_distributed
from tests.distributed.pipelining.cases import BATCH, LAYERS, batch_of, layers
from tests.distributed.pipelining.test_schedules import CLOSE, STEPS, serial

nn, F = torch.nn, torch.nn.functional

MICROBATCHES = 3


def by_layers(stage, mesh):
    for layer in stage:
        fully_shard(layer, mesh=mesh)
    return fully_shard(stage, mesh=mesh)


def wrapped(stage, mesh):
    return FSDP(stage, device_mesh=mesh)


def trained(schedule_class, shard):
    """Mean losses, on the ranks of the last stage, and what this stage's parameters became."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "pp"))
    data, index = mesh.get_local_rank("dp"), mesh.get_local_rank("pp")
    half = LAYERS // 2
    part = shard(nn.Sequential(*layers()[index * half : (index + 1) * half]), mesh["dp"])
    stage = PipelineStage(part, index, 2, group=mesh.get_group("pp"))
    schedule = schedule_class(stage, MICROBATCHES, loss_fn=F.mse_loss)
    optimizer = torch.optim.SGD(part.parameters(), lr=0.5, momentum=0.9)
    share, found = BATCH // 2, []
    for step in range(STEPS):
        x, y = (t[data * share : (data + 1) * share] for t in batch_of(step))
        losses = []
        optimizer.zero_grad()
        schedule.step(x, target=y, losses=losses)
        optimizer.step()
        if stage.is_last:
            mean = sum(loss.detach() for loss in losses) / (2 * len(losses))
            dist.all_reduce(mean, group=mesh.get_group("dp"))
            found.append(mean.item())
    return index, found, [np.array(p.full_tensor().detach().numpy()) for p in part.parameters()]


@functools.cache
def expected():
    return serial()


@pytest.mark.parametrize("transport", ["local", "zmq"])
@pytest.mark.parametrize("shard", [by_layers, wrapped])
@pytest.mark.parametrize("schedule", [ScheduleGPipe, Schedule1F1B])
def test_sharded_stages_train_as_one_process(schedule, shard, transport):
    losses, parameters = expected()
    half = len(parameters) // 2
    for index, found, own in run_distributed(4, trained, schedule, shard, transport=transport):
        if index:
            np.testing.assert_allclose(found, losses, **CLOSE)
        for value, whole in zip(own, parameters[index * half :][:half], strict=True):
            np.testing.assert_allclose(value, whole, **CLOSE)
