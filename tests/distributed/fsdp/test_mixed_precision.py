"""Mixed precision: forward and backward in bfloat16, reduction and parameters in float32.

The oracle is one process that does the same by hand: a plain model in the lower precision for each
rank, gradients added up in the wider one.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest

import dtrain as torch
import dtrain.distributed as dist
from dtrain.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from dtrain.testing.distributed import run_distributed
from tests.distributed.fsdp import training

nn = torch.nn

RANKS, STEPS = 2, 3


def plain(dtype=torch.float32):
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def batch(step, rank):
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(10 * step + rank))


def by_hand(reduce_dtype, passes):
    """Parameters after a few steps of SGD; each adds up the gradients of some passes."""
    masters = [p.detach() for p in plain().parameters()]
    for step in range(STEPS):
        low = plain(torch.bfloat16)
        with torch.no_grad():
            for p, master in zip(low.parameters(), masters, strict=True):
                p.copy_(master)
        sums = [[torch.zeros(m.shape, dtype=reduce_dtype) for m in masters] for _ in range(RANKS)]
        for number in range(passes):
            for rank in range(RANKS):
                low.zero_grad()
                low(batch(step * passes + number, rank).bfloat16()).square().sum().backward()
                for total, p in zip(sums[rank], low.parameters(), strict=True):
                    total += p.grad.to(reduce_dtype)
        for master, *parts in zip(masters, *sums, strict=True):
            mean = (sum(part.float() for part in parts) / RANKS).to(reduce_dtype)
            master -= 0.05 * mean.float()
    return [m.numpy().copy() for m in masters]


def train(policy, passes):
    model = plain()
    if policy.output_dtype is None:
        fully_shard(model[0], mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(STEPS):
        for number in range(passes):
            model.set_requires_gradient_sync(number == passes - 1)
            output = model(batch(step * passes + number, dist.get_rank()))
            assert output.dtype == (policy.output_dtype or policy.param_dtype)
            output.square().sum().backward()
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    return [p.full_tensor().detach().numpy().copy() for p in model.parameters()]


@pytest.mark.parametrize("transport", ["local", "shm", "zmq"])
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("reduce_dtype", [torch.float32, None])
def test_the_bits_of_the_same_by_hand(reduce_dtype, passes, transport):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=reduce_dtype)
    expected = by_hand(reduce_dtype or torch.bfloat16, passes)
    for found in run_distributed(RANKS, train, policy, passes, transport=transport):
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_results_are_cast():
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float64)
    run_distributed(RANKS, train, policy, 1)


def without_casting():
    model = fully_shard(
        plain(), mp_policy=MixedPrecisionPolicy(torch.bfloat16, cast_forward_inputs=False)
    )
    with pytest.raises(RuntimeError, match="dtype"):
        model(batch(0, 0))


def test_inputs_are_not_cast_when_told_so():
    run_distributed(1, without_casting)


def reduced_lower(dtype):
    model = fully_shard(plain(), mp_policy=MixedPrecisionPolicy(reduce_dtype=dtype))
    model(batch(0, dist.get_rank())).square().sum().backward()
    return [p.grad.full_tensor().numpy().copy() for p in model.parameters()]


def test_float32_gradients_reduced_in_bfloat16():
    model = plain()
    sums = [0.0] * 4
    for rank in range(RANKS):
        model.zero_grad()
        model(batch(0, rank)).square().sum().backward()
        sums = [
            s + p.grad.bfloat16().float() for s, p in zip(sums, model.parameters(), strict=True)
        ]
    for found in run_distributed(RANKS, reduced_lower, torch.bfloat16):
        for ours, theirs in zip(found, sums, strict=True):
            np.testing.assert_array_equal(ours, (theirs / RANKS).bfloat16().float().numpy())


def gpt(policy):
    model = training.sharded("GPT", training.made("GPT"), mp_policy=policy)
    return training.descend(model, training.MODELS["GPT"][1], steps=3)


def test_a_gpt_in_bfloat16_learns_as_one_in_float32():
    """The losses are bfloat16 too: between 4 and 8 numbers are 2 ** -5 apart."""
    alone = training.descend(training.made("GPT"), training.MODELS["GPT"][1], steps=3)
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    found = run_distributed(2, functools.partial(gpt, policy))[0]
    np.testing.assert_allclose(found, alone, rtol=0, atol=2**-3)
    assert found != alone
