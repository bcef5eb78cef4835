"""Fully sharded over one axis of a mesh, layers cut over the other: 2 x 2 ranks == one process."""

from __future__ import annotations

import numpy as np
import pytest

import dtrain as torch
import dtrain.distributed as dist
from dtrain import nn
from dtrain.distributed.fsdp import fully_shard
from dtrain.distributed.tensor import DTensor, Replicate, Shard
from dtrain.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from dtrain.testing.distributed import run_distributed
from tests.distributed.tensor.test_parallel import PLANS, made, train


def check_gpt(plan, keeps_less):
    expected, wanted = train(made())
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = parallelize_module(made(), mesh["tp"], PLANS[plan])
    for block in model.blocks:
        block.keeps_less = keeps_less
        fully_shard(block, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    losses, state = train(model, mesh.get_group("dp"))
    np.testing.assert_allclose(losses, expected, rtol=1e-12)
    for key, value in wanted.items():
        np.testing.assert_allclose(state[key], value, rtol=0, atol=1e-9, err_msg=key)


@pytest.mark.parametrize(
    ("plan", "transport", "keeps_less"),
    [("blocks", "local", False), ("tokens and head", "zmq", False), ("sequence", "zmq", True)],
)
def test_gpt(plan, transport, keeps_less):
    run_distributed(4, check_gpt, plan, keeps_less, transport=transport)


def check_parts():
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    layer = nn.Linear(3, 8)
    whole = layer.weight.detach().numpy().copy()
    parallelize_module(layer, mesh["tp"], ColwiseParallel())
    fully_shard(layer, mesh=mesh["dp"])
    dp, tp = mesh.get_local_rank("dp"), mesh.get_local_rank("tp")
    rows = slice(4 * tp + 2 * dp, 4 * tp + 2 * dp + 2)
    np.testing.assert_array_equal(layer.weight.to_local().detach().numpy(), whole[rows])
    np.testing.assert_array_equal(layer.weight.full_tensor().detach().numpy(), whole)
    assert layer.weight.placements[1] == Shard(0)


def test_parts_of_parts():
    run_distributed(4, check_parts)


def check_refusals():
    mesh = dist.init_device_mesh("cpu", (2,))
    layer = nn.Linear(3, 8)
    parallelize_module(layer, mesh, ColwiseParallel())
    with pytest.raises(ValueError, match="expected an axis of the same mesh"):
        fully_shard(layer, mesh=mesh)
    other = nn.Linear(3, 8)
    other.weight = nn.Parameter(DTensor.from_local(torch.zeros(8, 3), mesh, [Replicate()]))
    with pytest.raises(ValueError, match="expected an axis of the same mesh"):
        fully_shard(other)


def test_other_meshes_are_refused():
    run_distributed(2, check_refusals)
