"""Golden losses of fully sharded models: one plain process, DDP, and 1 to 4 ranks of `fully_shard`.

Tolerances: 1e-5 between one process and several (the same mean, summed in another order), none
between DDP, transports and ways to divide a model into units.
"""

from __future__ import annotations

import functools
import hashlib

import numpy as np
import pytest

import dtrain as torch
from dtrain.distributed.fsdp import fully_shard
from dtrain.nn.parallel import DistributedDataParallel as DDP
from dtrain.testing.distributed import run_distributed
from tests.comm.hosts import islands
from tests.distributed.fsdp import training

TOLERANCE = 1e-5


def train(name, units=True, clip=None, **options):
    """Losses and final parameters."""
    model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(training.made(name))
    model = training.sharded(name, model, **options) if units else fully_shard(model, **options)
    losses = training.descend(model, training.MODELS[name][1], clip=clip)
    return losses, training.whole(model)


def train_ddp(name):
    model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(training.made(name))
    model = DDP(model, find_unused_parameters=name == "tied")
    losses = training.descend(model, training.MODELS[name][1])
    return losses, [p.detach().numpy().tobytes() for p in model.parameters()]


def digest_of(parameters):
    return hashlib.sha256(b"".join(parameters)).hexdigest()


def in_process():
    """What a process can send: losses, and a digest of the parameters."""
    losses, parameters = train("GPT")
    return losses, digest_of(parameters)


@functools.cache
def alone(name, clip=None):
    return training.descend(training.made(name), training.MODELS[name][1], clip=clip)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("name", training.MODELS)
def test_golden_losses_equal_one_process_and_the_bits_of_ddp(name, ranks):
    with_ddp = run_distributed(ranks, train_ddp, name)[0]
    for result in run_distributed(ranks, train, name):
        np.testing.assert_allclose(result[0], alone(name), rtol=0, atol=TOLERANCE)
        assert result == with_ddp


@pytest.mark.parametrize("transport", ["shm", "zmq", islands(1, 1)])
@pytest.mark.parametrize("options", [{}, {"units": False}, {"reshard_after_forward": False}])
def test_the_same_bits_on_every_transport_and_division(transport, options):
    expected = run_distributed(2, train, "GPT")
    assert run_distributed(2, functools.partial(train, "GPT", **options), transport=transport) == (
        expected
    )


@pytest.mark.parametrize("options", [{}, {"reshard_after_forward": True}])
def test_the_same_bits_over_hosts(options):
    """Where ranks of a host share one copy, and where they give theirs back."""
    expected = run_distributed(3, train, "GPT")
    found = run_distributed(3, functools.partial(train, "GPT", **options), transport=islands(2, 1))
    assert found == expected


def test_the_same_bits_in_processes():
    expected = run_distributed(2, train, "GPT")
    found = run_distributed(2, in_process, transport="shm", processes=True)
    assert [(losses, digest) for losses, digest in found] == [
        (losses, digest_of(parameters)) for losses, parameters in expected
    ]


def test_gradients_are_clipped_by_the_norm_of_the_whole():
    for losses, _ in run_distributed(3, functools.partial(train, "GPT", clip=0.3)):
        np.testing.assert_allclose(losses, alone("GPT", clip=0.3), rtol=0, atol=TOLERANCE)
    assert alone("GPT", clip=0.3) != alone("GPT")
