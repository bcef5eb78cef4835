"""Where ranks read each other's shards in place, nobody sees a parameter change while reading it.

A rank that reads holds the others up for `GRACE` seconds: without the fence they would go on within
microseconds, and the test would see it. With it they cannot, so that the wait is never too short.
"""

from __future__ import annotations

import threading

import numpy as np
import pytest

import dtrain as torch
import dtrain.distributed as dist
from dtrain.distributed.fsdp import fully_shard
from dtrain.testing.distributed import run_distributed

nn = torch.nn

GRACE = 0.1


def model_of(width=6):
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))


def batch(rank, width=6):
    return torch.randn(4, width, generator=torch.Generator().manual_seed(rank))


class Reader:
    """Rank 1's look at the parameters during forward: they stay as they are until it is over."""

    def __init__(self):
        self.others_went_on = threading.Event()
        self.reading = threading.Event()

    def __call__(self, module, args, output):
        if dist.get_rank() != 1:
            return
        before = [p.detach().numpy().copy() for p in module.parameters()]
        self.reading.set()
        assert not self.others_went_on.wait(GRACE), "parameters were changed while they were read"
        for a, b in zip(before, module.parameters(), strict=True):
            assert (a == b.detach().numpy()).all()


def changed_by_a_step(reader, no_sync):
    """Both ranks accumulate or evaluate, then rank 0 wants to step while rank 1 reads."""
    model = fully_shard(model_of())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(batch(dist.get_rank())).sum().backward()
    if no_sync:
        model.set_requires_gradient_sync(False)
        handle = model[0].register_forward_hook(reader)
        model(batch(dist.get_rank())).sum().backward()
    else:
        handle = model[0].register_forward_hook(reader)
        with torch.no_grad():
            model(batch(dist.get_rank()))
    handle.remove()
    if dist.get_rank() == 0:
        assert reader.reading.wait(10)
    optimizer.step()
    reader.others_went_on.set()
    return [p.full_tensor().detach().numpy().copy() for p in model.parameters()]


@pytest.mark.parametrize("no_sync", [True, False])
def test_a_step_waits_for_ranks_that_read(no_sync):
    first, second = run_distributed(2, changed_by_a_step, Reader(), no_sync)
    assert all((a == b).all() for a, b in zip(first, second, strict=True))


def changed_by_loading(reader):
    model = fully_shard(model_of())
    state = {name: p.clone().detach() * 2 for name, p in model.state_dict().items()}
    handle = model[0].register_forward_hook(reader)
    model(batch(dist.get_rank()))
    handle.remove()
    if dist.get_rank() == 0:
        assert reader.reading.wait(10)
    model.load_state_dict(state)
    reader.others_went_on.set()
    return model(batch(0)).detach().numpy().copy()


def test_loading_waits_for_ranks_that_read_and_is_seen_by_the_next_forward():
    first, second = run_distributed(2, changed_by_loading, Reader())
    plain = model_of()
    with torch.no_grad():
        for p in plain.parameters():
            p *= 2
    np.testing.assert_array_equal(first, plain(batch(0)).detach().numpy())
    np.testing.assert_array_equal(first, second)


def stepped_late(others_ran):
    """Rank 1 changes its shards only when rank 0 has had time to run ahead with old ones."""
    model = fully_shard(model_of())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):  # after the first pass ranks meet for other reasons
        optimizer.step()
        model(batch(dist.get_rank())).sum().backward()
    if dist.get_rank() == 1:
        assert not others_ran.wait(GRACE), "a forward pass began before all had stepped"
    optimizer.step()
    output = model(batch(0)).detach().numpy().copy()
    others_ran.set()
    return output


def test_forward_waits_until_all_have_stepped():
    first, second = run_distributed(2, stepped_late, threading.Event())
    np.testing.assert_array_equal(first, second)


def stepped_in_hooks(width):
    """An optimizer for each parameter, stepped when its gradient has been reduced."""
    model = model_of(width)
    fully_shard(model[0])
    fully_shard(model)
    for p in model.parameters():
        optimizer = torch.optim.SGD([p], lr=0.1)

        def step(parameter, optimizer=optimizer):
            optimizer.step()
            parameter.grad = None

        p.register_post_accumulate_grad_hook(step)
    for _ in range(3):
        model(batch(dist.get_rank(), width)).square().sum().backward()
    return [p.full_tensor().detach().numpy().copy() for p in model.parameters()]


def stepped_after(width):
    model = model_of(width)
    fully_shard(model[0])
    fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(batch(dist.get_rank(), width)).square().sum().backward()
        optimizer.step()
    return [p.full_tensor().detach().numpy().copy() for p in model.parameters()]


@pytest.mark.parametrize("transport", ["local", "shm"])
def test_optimizers_stepped_inside_backward(transport):
    inside = run_distributed(3, stepped_in_hooks, 5, transport=transport)
    after = run_distributed(3, stepped_after, 5)
    for a, b in zip(inside, after, strict=True):
        assert all((x == y).all() for x, y in zip(a, b, strict=True))
