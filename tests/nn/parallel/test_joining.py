"""DDP with uneven inputs: `with model.join():` against one process that has the same batches."""

from __future__ import annotations

import numpy as np
import pytest

import dtrain as torch
import dtrain.distributed as dist
from dtrain.distributed.algorithms import Join
from dtrain.nn.parallel import DistributedDataParallel as DDP
from dtrain.testing.distributed import run_distributed

nn = torch.nn
RATE = 0.1


class Net(nn.Module):
    """Two layers and a buffer that every training forward changes."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 4, dtype=torch.float64)
        self.last = nn.Linear(4, 1, dtype=torch.float64)
        self.register_buffer("seen", torch.zeros(1, dtype=torch.float64))

    def forward(self, x):
        if self.training:
            self.seen += x.sum().detach()
        return self.last(torch.tanh(self.first(x)))


def fresh():
    torch.manual_seed(6)
    return Net()


def batch(rank, step):
    generator = torch.Generator().manual_seed(100 * rank + step)
    return torch.randn(2, 3, dtype=torch.float64, generator=generator)


def parameters(model):
    return [p.detach().numpy().copy() for p in model.parameters()]


def reference(inputs, by_active, momentum=0.0):
    """One process: in each step the gradients of the ranks that have a batch, summed, divided."""
    model = fresh()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=momentum)
    for step in range(max(inputs)):
        active = [rank for rank, count in enumerate(inputs) if step < count]
        optimizer.zero_grad()
        loss = sum((model(batch(rank, step)) ** 2).mean() for rank in active)
        (loss / (len(active) if by_active else len(inputs))).backward()
        optimizer.step()
    return parameters(model)


def train(inputs, momentum=0.0, steps=False, caps=None, **options):
    rank = dist.get_rank()
    model = DDP(fresh(), bucket_cap_mb=caps, divergence_check_every=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=momentum)
    step = optimizer.step if steps else None
    with model.join(**options, step=step):
        for i in range(inputs[rank]):
            optimizer.zero_grad()
            (model(batch(rank, i)) ** 2).mean().backward()
            optimizer.step()
    state = optimizer.state_dict()["state"]
    velocity = [s["momentum_buffer"].numpy().copy() for s in state.values()] if momentum else []
    assert model.reducer.divide_by is None
    return parameters(model), velocity, model.module.seen.item()


@pytest.mark.parametrize("by_all", [True, False])
@pytest.mark.parametrize("inputs", [[3, 1], [0, 2, 4], [1, 5, 2, 5]], ids=str)
@pytest.mark.parametrize("caps", [None, 1e-5])
def test_uneven_inputs_equal_one_process(inputs, by_all, caps):
    def rank():
        return train(inputs, caps=caps, divide_by_initial_world_size=by_all)

    found = run_distributed(len(inputs), rank)
    expected = reference(inputs, by_active=not by_all)
    for ours, _, seen in found:
        for a, b, first in zip(ours, expected, found[0][0], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10)
            np.testing.assert_array_equal(a, first)
        assert seen == found[0][2]


def test_step_keeps_the_optimizers_equal_too():
    """Momentum is what would lag on a rank that makes no steps for the others' passes."""
    inputs = [3, 1, 4]

    found = run_distributed(3, train, inputs, 0.9, True)
    expected = reference(inputs, by_active=False, momentum=0.9)
    for ours, velocity, _ in found:
        for a, b in zip(ours, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10)
        for a, b in zip(velocity, found[0][1], strict=True):
            np.testing.assert_array_equal(a, b)


def epochs():
    rank, model = dist.get_rank(), DDP(fresh(), divergence_check_every=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for inputs in ([2, 1], [1, 3], [2, 2]):
        with model.join():
            for i in range(inputs[rank]):
                optimizer.zero_grad()
                (model(batch(rank, i)) ** 2).mean().backward()
                optimizer.step()
    optimizer.zero_grad()
    (model(batch(rank, 9)) ** 2).mean().backward()  # outside: as ever
    return parameters(model), [p.grad.numpy().copy() for p in model.parameters()]


def test_epochs_in_blocks_and_a_pass_outside():
    one, two = run_distributed(2, epochs)
    for a, b in zip(one[0] + one[1], two[0] + two[1], strict=True):
        np.testing.assert_array_equal(a, b)


def check_other_passes():
    """In a block: passes that do not reduce (no_sync), evaluation, and losses with weights."""
    rank, model = dist.get_rank(), DDP(fresh())
    grads = []
    with model.join():
        for i in range((1, 3)[rank]):
            model.zero_grad()
            with model.no_sync():
                (model(batch(rank, i)) ** 2).mean().backward()
            with torch.no_grad():
                model(batch(rank, i))
            model.set_loss_weight(2.0)
            (model(batch(rank, i)) ** 2).mean().backward()
            model.set_loss_weight(None)
            grads.append(model.module.last.weight.grad.numpy().copy())
    alone = fresh()
    (alone(batch(1, 2)) ** 2).mean().backward()
    if rank == 1:  # once under no_sync and once with weight 2, over weight 2
        expected = 1.5 * alone.last.weight.grad.numpy()
        np.testing.assert_allclose(grads[2], expected, rtol=1e-12)
    return model.module.last.weight.grad.numpy().copy()


def test_passes_that_reduce_nothing_are_not_shadowed():
    one, two = run_distributed(2, check_other_passes)
    np.testing.assert_array_equal(one, two)


def throw():
    with pytest.raises(RuntimeError) as caught:
        train([4, 2], throw_on_early_termination=True)
    return str(caught.value)


def test_throwing_names_the_rank():
    active, ended = run_distributed(2, throw)
    assert active.endswith("Throwing across all ranks. Exhausted: rank 1")
    assert ended == "Rank 1 exhausted all inputs. Still active: rank 0"


def check_with_others():
    """DDP behind another joinable, which then is the one that votes."""
    rank = dist.get_rank()
    one, two = DDP(fresh()), DDP(fresh())
    with Join([one, two], divide_by_initial_world_size=False):
        for i in range((1, 2)[rank]):
            for model in (one, two):
                model.zero_grad()
                (model(batch(rank, i)) ** 2).mean().backward()
    return [p.grad.numpy().copy() for model in (one, two) for p in model.parameters()]


def test_two_models_in_one_block():
    found = run_distributed(2, check_with_others)
    alone = fresh()
    (alone(batch(1, 1)) ** 2).mean().backward()
    for grads in found:
        for a, b in zip(grads, [p.grad.numpy() for p in alone.parameters()] * 2, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12)
