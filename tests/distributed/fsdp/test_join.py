"""`Join` with sharded models: ranks with different numbers of batches train as one process does."""

from __future__ import annotations

import functools

import numpy as np
import pytest

import dtrain as torch
import dtrain.distributed as dist
from dtrain.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from dtrain.distributed.algorithms.join import Join
from dtrain.distributed.device_mesh import init_device_mesh
from dtrain.distributed.fsdp import FullyShardedDataParallel as FSDP, fully_shard
from dtrain.distributed.fsdp.wrap import ModuleWrapPolicy
from dtrain.testing.distributed import run_distributed

nn = torch.nn

BATCHES = [2, 4, 1]  # of each rank


def plain():
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3), nn.Tanh(), nn.Linear(3, 2))


def by_units(**options):
    model = plain()
    for layer in (model[0], model[2]):
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def wrapper():
    return FSDP(plain(), auto_wrap_policy=ModuleWrapPolicy({nn.Linear}))


def recomputing():
    model = plain()
    apply_activation_checkpointing(model, check_fn=lambda m: isinstance(m, nn.Linear))
    for layer in (model[0], model[2]):
        fully_shard(layer)
    return fully_shard(model)


def batch(rank, step):
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(10 * rank + step))


def trained(build, clear_first, by_all=True, evaluates=False):
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    rank = dist.get_rank()

    def step():
        optimizer.step()
        if not clear_first:
            optimizer.zero_grad()

    with Join([model], step=step, divide_by_initial_world_size=by_all):
        for number in range(BATCHES[rank]):
            if evaluates:
                with torch.no_grad():
                    model(batch(rank, number))
            if clear_first:
                optimizer.zero_grad()
            model(batch(rank, number)).square().sum().backward()
            step()
    return [np.array(p.full_tensor().detach().numpy()) for p in model.parameters()]


@functools.cache
def expected(by_all=True):
    """One process that adds what the ranks that have a batch would contribute."""
    model = plain()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(max(BATCHES)):
        active = [rank for rank, count in enumerate(BATCHES) if step < count]
        optimizer.zero_grad()
        for rank in active:
            share = len(BATCHES) if by_all else len(active)
            (model(batch(rank, step)).square().sum() / share).backward()
        optimizer.step()
    return [np.array(p.detach().numpy()) for p in model.parameters()]


def assert_as_one_process(found, by_all=True):
    for parameters in found:
        for ours, theirs in zip(parameters, expected(by_all), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("transport", ["local", "shm", "zmq"])
@pytest.mark.parametrize("build", [by_units, wrapper, recomputing])
def test_ranks_that_are_through_go_on_for_the_others(build, transport):
    assert_as_one_process(run_distributed(3, trained, build, True, transport=transport))


@pytest.mark.parametrize("transport", ["local", "zmq"])
def test_gradients_may_be_cleared_after_the_step(transport):
    assert_as_one_process(run_distributed(3, trained, by_units, False, transport=transport))


@pytest.mark.parametrize("transport", ["local", "zmq"])
def test_gradients_divided_by_the_active_ranks(transport):
    found = run_distributed(3, trained, by_units, True, False, transport=transport)
    assert_as_one_process(found, by_all=False)


@pytest.mark.parametrize("transport", ["local", "zmq"])
def test_passes_without_gradients_are_followed(transport):
    found = run_distributed(3, trained, by_units, True, True, True, transport=transport)
    assert_as_one_process(found)


@pytest.mark.parametrize("stays", [True, False])
def test_whatever_is_given_back_after_forward(stays):
    build = functools.partial(by_units, reshard_after_forward=not stays)
    assert_as_one_process(run_distributed(3, trained, build, True, transport="zmq"))


def refused():
    model = by_units()
    model(batch(0, 0))
    with pytest.raises(ValueError, match=r"needs step=..."):
        Join([model])
    with pytest.raises(ValueError, match="outermost"):
        Join([model[0]], step=print)
    grid = fully_shard(plain(), mesh=init_device_mesh("cpu", (2, 1)))
    with pytest.raises(ValueError, match="hybrid sharding"):
        Join([grid], step=print)


def test_what_join_cannot_do_is_refused():
    run_distributed(2, refused)


def without_a_batch():
    model = by_units()
    with Join([model], step=lambda: None):
        if dist.get_rank() == 0:
            model(batch(0, 0)).square().sum().backward()


def test_a_rank_needs_one_batch():
    with pytest.raises(RuntimeError, match="has not had one batch"):
        run_distributed(2, without_a_batch, timeout=10)
