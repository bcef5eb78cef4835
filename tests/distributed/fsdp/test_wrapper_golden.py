"""Golden losses of `FullyShardedDataParallel`: all strategies give the bits of `fully_shard`, which
are those of DDP, and 1e-5 of one plain process (test_golden.py)."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest

import dtrain as torch
import dtrain.distributed as dist
from dtrain.distributed.device_mesh import init_device_mesh
from dtrain.distributed.fsdp import (
    BackwardPrefetch,
    FullyShardedDataParallel as FSDP,
    MixedPrecision,
    ShardingStrategy,
)
from dtrain.distributed.fsdp.wrap import CustomPolicy
from dtrain.testing.distributed import run_distributed
from tests.distributed.fsdp import training
from tests.distributed.fsdp.test_golden import TOLERANCE, alone, train as train_fully_shard

nn = torch.nn

STRATEGIES = list(ShardingStrategy)
HYBRID = ("HYBRID_SHARD", "_HYBRID_SHARD_ZERO2")


def wrapped(name, **options):
    model = nn.SyncBatchNorm.convert_sync_batchnorm(training.made(name))
    parts = training.PARTS[name]
    policy = CustomPolicy(lambda module: type(module).__name__ in parts)
    options.setdefault("auto_wrap_policy", policy)
    return FSDP(model, **options)


def train(name, strategy=ShardingStrategy.FULL_SHARD, **options):
    """Losses and final parameters."""
    if strategy.name in HYBRID and dist.get_world_size() == 4:
        options["device_mesh"] = init_device_mesh("cpu", (2, 2))
    model = wrapped(name, sharding_strategy=strategy, **options)
    losses = training.descend(model, training.MODELS[name][1])
    return losses, training.whole(model)


@functools.cache
def expected_of(name, ranks):
    return run_distributed(ranks, train_fully_shard, name)[0]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("name", training.MODELS)
def test_golden_losses_equal_one_process_and_the_bits_of_fully_shard(name, ranks):
    for result in run_distributed(ranks, train, name):
        np.testing.assert_allclose(result[0], alone(name), rtol=0, atol=TOLERANCE)
        assert result == expected_of(name, ranks)


@pytest.mark.parametrize("strategy", STRATEGIES[1:], ids=lambda s: s.name)
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", ["CNN", "GPT", "tied"])
def test_golden_losses_of_every_strategy(name, ranks, strategy):
    """Hybrid sharding adds in two steps, hence in another order: no equal bits there."""
    for result in run_distributed(ranks, train, name, strategy):
        np.testing.assert_allclose(result[0], alone(name), rtol=0, atol=TOLERANCE)
        if strategy.name not in HYBRID:
            assert result == expected_of(name, ranks)


@pytest.mark.parametrize("transport", ["shm", "zmq"])
@pytest.mark.parametrize("prefetch", [*BackwardPrefetch, None])
def test_the_same_bits_with_every_prefetch(transport, prefetch):
    run = functools.partial(train, "GPT", backward_prefetch=prefetch)
    assert run_distributed(2, run, transport=transport) == [expected_of("GPT", 2)] * 2


def events_of_backward(prefetch):
    """What rank 0 does in the backward pass of its third step, over messages."""
    model = wrapped("MLP", backward_prefetch=prefetch)
    root, seen = model._fsdp_state.make_root(), []
    batch, rank = training.MODELS["MLP"][1], dist.get_rank()
    for step in range(3):
        loss = model(*(t[6 * rank : 6 * rank + 6] for t in batch(step)))
        if step == 2:
            for unit in root.units:
                unit.home.gather = noted(unit.home.gather, seen, f"gather {unit.name}")
                unit.reduce = noted(unit.reduce, seen, f"reduce {unit.name}")
        loss.backward()
    return seen


def noted(call, seen, what):
    def noting(*args, **kwargs):
        seen.append(what)
        return call(*args, **kwargs)

    return noting


@pytest.mark.parametrize("prefetch", [*BackwardPrefetch, None])
def test_the_next_unit_is_gathered_beside_the_one_before_or_behind_it(prefetch):
    events, _ = run_distributed(2, events_of_backward, prefetch, transport="zmq")
    names = [f"layers.{n}.weight" for n in (4, 2, 0)]
    beside = prefetch is BackwardPrefetch.BACKWARD_PRE
    for this, following in itertools.pairwise(names):
        gathered, reduced = events.index(f"gather {following}"), events.index(f"reduce {this}")
        assert (gathered < reduced) is beside, events


def train_low():
    precision = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = wrapped("CNN", mixed_precision=precision)
    losses = training.descend(model, training.MODELS["CNN"][1])
    return losses, {p.dtype for p in model.parameters()}


def test_mixed_precision_stays_near_and_keeps_parameters_as_they_are():
    for losses, dtypes in run_distributed(2, train_low):
        np.testing.assert_allclose(losses, alone("CNN"), rtol=0.02)
        assert losses != alone("CNN")
        assert dtypes == {torch.float32}


def accumulated(no_sync):
    model = wrapped("MLP")
    batch = training.MODELS["MLP"][1]
    rank = dist.get_rank()
    for step in range(2):
        part = [t[6 * rank : 6 * rank + 6] for t in batch(step)]
        if no_sync and step == 0:
            with model.no_sync():
                model(*part).backward()
            assert all(p.grad is None for p in model.parameters())
        else:
            model(*part).backward()
    norm = model.clip_grad_norm_(0.1).item()
    return norm, [p.grad.full_tensor().numpy().copy() for p in model.parameters()]


@pytest.mark.parametrize("no_sync", [False, True])
def test_accumulated_gradients_are_clipped_as_those_of_one_process(no_sync):
    plain, batch = training.made("MLP"), training.MODELS["MLP"][1]
    for step in range(2):
        plain(*batch(step)).backward()
    expected = nn.utils.clip_grad_norm_(plain.parameters(), 0.1).item()
    for norm, grads in run_distributed(2, accumulated, no_sync):
        assert norm == pytest.approx(expected, rel=1e-5)
        for ours, theirs in zip(grads, plain.parameters(), strict=True):
            np.testing.assert_allclose(ours, theirs.grad.numpy(), rtol=1e-4, atol=1e-8)
