"""Sharded models in checkpoints: saved on n ranks by one face, loaded on m by the other, and on."""

from __future__ import annotations

import functools

import numpy as np
import pytest

import dtrain as torch
import dtrain.distributed as dist
import dtrain.distributed.checkpoint as dcp
from dtrain.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from dtrain.distributed.fsdp import FullyShardedDataParallel as FSDP, fully_shard
from dtrain.distributed.fsdp.wrap import ModuleWrapPolicy
from dtrain.testing.distributed import run_distributed

nn = torch.nn

BATCH, STEPS = 12, 3


def by_units(model):
    for layer in (model[0], model[3]):
        fully_shard(layer)
    return fully_shard(model)


def wrapper(model):
    return FSDP(model, auto_wrap_policy=ModuleWrapPolicy({nn.Linear}))


def made(build, seed):
    torch.manual_seed(seed)
    # No bias before a norm: its gradient is rounding, which AdamW makes as large as any other.
    model = nn.Sequential(
        nn.Linear(5, 7, bias=False), nn.SyncBatchNorm(7), nn.Tanh(), nn.Linear(7, 2)
    )
    model = build(model)
    return model, torch.optim.AdamW(model.parameters(), lr=0.05)


def descend(model, optimizer, steps):
    ranks, rank = dist.get_world_size(), dist.get_rank()
    share = BATCH // ranks
    for step in steps:
        x = torch.randn(BATCH, 5, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x[rank * share : (rank + 1) * share]).square().mean().backward()
        optimizer.step()


def whole(model):
    values = model.state_dict().items()
    return {
        name: np.array((v.full_tensor() if hasattr(v, "full_tensor") else v).detach().numpy())
        for name, v in values
    }


def saved(build, folder):
    model, optimizer = made(build, seed=0)
    descend(model, optimizer, range(STEPS))
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder)
    descend(model, optimizer, range(STEPS, 2 * STEPS))
    return whole(model)


def resumed(build, folder):
    model, optimizer = made(build, seed=1)
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    descend(model, optimizer, range(STEPS, 2 * STEPS))
    return whole(model)


@functools.cache
def went_on(build, ranks, folder):
    """What a run without interruption ends with; it leaves a checkpoint of its middle."""
    return run_distributed(ranks, saved, build, folder)[0]


@pytest.mark.parametrize("after", [1, 2, 3, 4])
@pytest.mark.parametrize("before", [1, 2, 3, 4])
@pytest.mark.parametrize(("first", "second"), [(by_units, wrapper), (wrapper, by_units)])
def test_a_run_goes_on_with_other_ranks_and_the_other_face(
    first, second, before, after, tmp_path_factory
):
    folder = tmp_path_factory.getbasetemp() / f"{first.__name__}-{before}"
    expected = went_on(first, before, folder)
    for found in run_distributed(after, resumed, second, folder):
        assert found.keys() == expected.keys()
        for name, value in found.items():
            np.testing.assert_allclose(value, expected[name], rtol=2e-5, atol=1e-6, err_msg=name)
            if before == after:  # the same sums in the same order: nothing may differ
                np.testing.assert_array_equal(value, expected[name], err_msg=name)
