"""Golden losses of the GPT of examples/train_gpt.py: PyTorch's, and the same for any world.

Tolerances: 1e-3 against PyTorch (other kernels round otherwise; 20 steps amplify it), 1e-5 between
one process and several (the same mean, summed in another order), none between transports.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest

from dtrain.testing.distributed import run_distributed
from tests import gpt_run
from tests.recorded import load


@functools.cache
def alone() -> list[float]:
    return run_distributed(1, gpt_run.losses)[0]


def rank_losses() -> list[float]:
    import dtrain.distributed as dist

    return gpt_run.losses("dtrain", dist.get_rank(), dist.get_world_size())


@functools.cache
def together(ranks: int, transport: str) -> list[list[float]]:
    return run_distributed(ranks, rank_losses, transport=transport, timeout=60)


def test_the_same_seed_gives_pytorchs_losses():
    np.testing.assert_allclose(alone(), load("gpt_losses")["losses"], atol=1e-3)


@pytest.mark.parametrize("ranks", [2, 4])
def test_one_process_and_many_give_the_same_losses(ranks):
    for losses in together(ranks, "local"):
        np.testing.assert_allclose(losses, alone(), atol=1e-5)


def test_every_transport_gives_the_same_bits():
    assert together(2, "local") == together(2, "zmq")
