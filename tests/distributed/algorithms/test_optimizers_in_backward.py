"""Optimizers that step in backward: after a bucket's reduction, or with each gradient."""

from __future__ import annotations

import functools
import gc
import weakref

import pytest

import dtrain as torch
import dtrain.distributed as dist
from dtrain.distributed.algorithms.ddp_comm_hooks import (
    ddp_zero_hook as zero_hooks,
    default_hooks as default,
    optimizer_overlap_hooks as overlap,
    powerSGD_hook as power,
)
from dtrain.distributed.optim import (
    ZeroRedundancyOptimizer,
    _apply_optimizer_in_backward,
    _get_in_backward_optimizers,
)
from dtrain.testing.distributed import run_distributed
from tests.distributed.algorithms.hook_cases import Bucket, gradients_of, make_parameters

nn, optim = torch.nn, torch.optim
STEPS = 4


def buckets_of(parameters, step, layout):
    gradients = gradients_of(dist.get_rank(), step)
    return [
        Bucket([parameters[i] for i in part], [gradients[i] for i in part], n, part is layout[-1])
        for n, part in enumerate(layout)
    ]


LAYOUTS = [[(4,), (3, 2), (1, 0)], [(0, 1, 2), (3, 4)]]  # as before and after a rebuild


def plainly(hook, make_state):
    """Parameters of the same steps: all buckets reduced, then one step of Adam."""
    parameters, state = make_parameters(), make_state()
    optimizer = optim.Adam(parameters, lr=0.1)
    for step in range(STEPS):
        buckets = buckets_of(parameters, step, LAYOUTS[step > 0])
        futures = [hook(state, bucket) for bucket in buckets]
        for bucket, future in zip(buckets, futures, strict=True):
            future.wait()
            for p, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
                p.grad = gradient
        optimizer.step()
    return [p.tolist() for p in parameters]


def with_zero(wrap, hook, make_state):
    parameters, state = make_parameters(), make_state()
    zero = ZeroRedundancyOptimizer(parameters, optim.Adam, overlap_with_ddp=True, lr=0.1)
    stepping = wrap(hook, None, zero)
    for step in range(STEPS):
        buckets = buckets_of(parameters, step, LAYOUTS[step > 0])
        for future in [stepping(state, bucket) for bucket in buckets]:
            future.wait()
    zero.consolidate_state_dict()
    return [p.tolist() for p in parameters]


def make_powerSGD():
    return power.PowerSGDState(None, start_powerSGD_iter=1)


@pytest.mark.parametrize(
    ("hook", "make_state"),
    [(default.allreduce_hook, lambda: None), (power.powerSGD_hook, make_powerSGD)],
    ids=["allreduce", "PowerSGD"],
)
@pytest.mark.parametrize(
    "wrap", [zero_hooks.hook_with_zero_step, zero_hooks.hook_with_zero_step_interleaved]
)
def test_zero_in_backward_has_the_bits_of_a_step_after_it(wrap, hook, make_state):
    """From the first pass on, also while buckets change, also behind a hook of several stages."""
    (expected, *_) = run_distributed(3, functools.partial(plainly, hook, make_state))
    got = run_distributed(3, functools.partial(with_zero, wrap, hook, make_state))
    assert got == [expected] * 3


def bytes_with_zero():
    parameters = make_parameters()
    zero = ZeroRedundancyOptimizer(parameters, optim.SGD, overlap_with_ddp=True, lr=0.1)
    hook = zero_hooks.hook_with_zero_step(default.fp16_compress_hook, None, zero)
    bucket = Bucket(parameters, gradients_of(0))
    statistics = dist.group.WORLD.arrays.statistics
    computed = hook.payload(None, bucket)
    dist.barrier()
    before = statistics().bytes_sent
    hook(None, bucket).wait()
    return statistics().bytes_sent - before, computed.sent(2)


def test_bytes_of_zero_in_backward():
    for counted, computed in run_distributed(2, bytes_with_zero, transport="zmq"):
        assert counted == computed


def test_zero_must_know_of_the_hook():
    def main():
        zero = ZeroRedundancyOptimizer(make_parameters(), optim.SGD, lr=0.1)
        zero_hooks.hook_with_zero_step(default.allreduce_hook, None, zero)

    with pytest.raises(ValueError, match="constructed with `overlap_with_ddp=True`"):
        run_distributed(1, main)


def then_optimizer():
    parameters = make_parameters()
    state = overlap._OptimizerHookState(optim.Adam(parameters, lr=0.1), parameters[:4])
    hook = overlap._hook_then_optimizer(default.allreduce_hook, state)
    for step in range(STEPS):
        for future in [hook(None, b) for b in buckets_of(parameters, step, LAYOUTS[step > 0])]:
            future.wait()
    return [p.tolist() for p in parameters]


def test_any_optimizer_behind_any_hook():
    expected = run_distributed(2, functools.partial(plainly, default.allreduce_hook, lambda: None))[
        0
    ]
    for got in run_distributed(2, then_optimizer):
        assert got[:4] == expected[:4]
        assert not torch.tensor(got[4]).any()


def reduced_in_backward():
    parameters = make_parameters()
    _apply_optimizer_in_backward(optim.Adam, parameters, {"lr": 0.1}, register_hook=False)
    for step in range(STEPS):
        buckets = buckets_of(parameters, step, LAYOUTS[step > 0])
        for future in [overlap.apply_optim_in_backward_hook(None, b) for b in buckets]:
            future.wait()
    return [p.tolist() for p in parameters]


def test_optimizers_of_parameters_after_the_reduction():
    expected = run_distributed(2, functools.partial(plainly, default.allreduce_hook, lambda: None))
    assert run_distributed(2, reduced_in_backward) == expected


def trained(in_backward):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    if in_backward:
        _apply_optimizer_in_backward(optim.Adam, model.parameters(), {"lr": 0.01})
        assert len(_get_in_backward_optimizers(model)) == 4
    else:
        optimizer = optim.Adam(model.parameters(), lr=0.01)
    for _ in range(5):
        model(torch.ones(3, 4)).square().sum().backward()
        if in_backward:
            assert all(p.grad is None for p in model.parameters())
        else:
            optimizer.step()
            optimizer.zero_grad()
    return [p.tolist() for p in model.parameters()], weakref.ref(model)


def test_in_backward_without_ranks():
    parameters, model = trained(True)
    assert parameters == trained(False)[0]
    gc.collect()
    assert model() is None  # nothing keeps it


def test_several_optimizers_of_one_parameter():
    p = nn.Parameter(torch.zeros(2))
    _apply_optimizer_in_backward(optim.SGD, [p], {"lr": 1.0})
    _apply_optimizer_in_backward(optim.SGD, [p], {"lr": 0.5})
    p.sum().backward()
    assert p.tolist() == [-1.5, -1.5]
