"""ZeroRedundancyOptimizer: the bits of the plain optimizer, a share of its state on each rank."""

from __future__ import annotations

import functools

import numpy as np
import pytest

import dtrain as torch
import dtrain.distributed as dist
from dtrain.distributed.algorithms.join import Join
from dtrain.distributed.optim import ZeroRedundancyOptimizer
from dtrain.distributed.optim.carriers import owners
from dtrain.nn.parallel import DistributedDataParallel as DDP
from dtrain.testing.distributed import run_distributed

nn, optim = torch.nn, torch.optim
N = 3

OPTIMIZERS = {
    "SGD": (optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    "Adam": (optim.Adam, {"lr": 0.01}),
    "AdamW": (optim.AdamW, {"lr": 0.01, "amsgrad": True}),
}


def make_model():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 7), nn.Tanh(), nn.Linear(7, 2))


def groups_of(model):
    """Two groups with learning rates of their own."""
    first, *others = model.parameters()
    return [{"params": [first], "lr": 0.05}, {"params": others}]


def backward(model, step, rank=None):
    generator = torch.Generator().manual_seed(
        10 * step + (dist.get_rank() if rank is None else rank)
    )
    model.zero_grad()
    model(torch.randn(4, 5, generator=generator)).square().sum().backward()


def train(cls, options, zero, steps=5, views=False):
    """Parameters after a few steps with a schedule, and the whole state on rank 1."""
    model = DDP(make_model())
    if zero:
        optimizer = ZeroRedundancyOptimizer(
            groups_of(model), cls, parameters_as_bucket_view=views, **options
        )
    else:
        optimizer = cls(groups_of(model), **options)
    schedule = optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    for step in range(steps):
        backward(model, step)
        optimizer.step()
        schedule.step()
    if zero:
        optimizer.consolidate_state_dict(to=1)
    state = optimizer.state_dict() if not zero or dist.get_rank() == 1 else None
    return [p.detach().numpy().copy() for p in model.parameters()], state


def assert_same(ours, theirs):
    """Equal structure, equal bits."""
    if isinstance(theirs, dict):
        assert set(ours) == set(theirs)
        for key in theirs:
            assert_same(ours[key], theirs[key])
    elif isinstance(theirs, torch.Tensor):
        assert ours.dtype == theirs.dtype
        assert ours.tolist() == theirs.tolist()
    elif isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert_same(a, b)
    else:
        assert ours == theirs


@pytest.mark.parametrize("views", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bits_of_the_plain_optimizer(name, views):
    plain, state = run_distributed(N, functools.partial(train, *OPTIMIZERS[name], False))[0]
    results = run_distributed(N, functools.partial(train, *OPTIMIZERS[name], True, views=views))
    for parameters, _ in results:
        assert all((a == b).all() for a, b in zip(parameters, plain, strict=True))
    assert_same(results[1][1], state)


def test_owners_are_sorted_greedy():
    """8 to 0; 7 to 1; 6 to 2; 5 to 2, which has least, then 11: 4 to 1, 3 to 0."""
    loads = [0, 0, 0]
    assert owners([3, 8, 6, 5, 4, 7], loads) == [0, 0, 2, 2, 1, 1]
    assert loads == [11, 11, 11]
    assert owners([1, 1], loads) == [0, 1]


def shares():
    model = make_model()
    zero = ZeroRedundancyOptimizer(model.parameters(), optim.Adam, lr=0.1)
    backward(model, 0, rank=0)
    zero.step()
    return sorted(tuple(p.shape) for p in zero.state)


def test_each_rank_has_the_state_of_its_share():
    """Elements: 80 16 | 112 7 | 14 2: 112 to rank 0, 80 to 1, the rest, 39, to 2."""
    assert run_distributed(N, shares) == [
        [(7, 16)],
        [(16, 5)],
        [(2,), (2, 7), (7,), (16,)],
    ]


def bytes_of_a_step():
    model = nn.Linear(30, 40)
    zero = ZeroRedundancyOptimizer(model.parameters(), optim.SGD, lr=0.1)
    backward = model(torch.ones(1, 30)).sum().backward
    backward()
    statistics = dist.group.WORLD.arrays.statistics
    dist.barrier()
    before = statistics().bytes_sent
    zero.step()
    return statistics().bytes_sent - before


def test_a_step_sends_each_parameter_once_to_each_other():
    """Weight (1200 elements) by rank 0, bias (40) by rank 1."""
    assert run_distributed(2, bytes_of_a_step, transport="zmq") == [4800, 160]


def resumed(state, zero, ranks_model=make_model):
    """Three more steps after loading `state` (of another world)."""
    model = DDP(ranks_model())
    if zero:
        optimizer = ZeroRedundancyOptimizer(groups_of(model), optim.Adam, lr=0.5)
    else:
        optimizer = optim.Adam(groups_of(model), lr=0.5)
    optimizer.load_state_dict(state)
    assert [g["lr"] for g in optimizer.param_groups] == [0.0125, 0.0025]
    for step in range(3):
        backward(model, step)
        optimizer.step()
    return [p.detach().numpy().copy() for p in model.parameters()]


def test_states_go_from_one_to_the_other_and_to_another_number_of_ranks():
    _, state = run_distributed(3, functools.partial(train, *OPTIMIZERS["Adam"], True))[1]
    plain = run_distributed(2, functools.partial(resumed, state, False))
    shared = run_distributed(2, functools.partial(resumed, state, True))
    for theirs, ours in zip(plain, shared, strict=True):
        assert all((a == b).all() for a, b in zip(ours, theirs, strict=True))


def loading_errors():
    model = make_model()
    zero = ZeroRedundancyOptimizer(model.parameters(), optim.SGD, lr=0.1)
    with pytest.raises(RuntimeError, match="has not been consolidated on this rank"):
        zero.state_dict()
    zero.consolidate_state_dict()
    if dist.get_rank() == 0:
        assert zero.state_dict()["param_groups"][0]["lr"] == 0.1
    else:
        with pytest.raises(RuntimeError, match="has not been consolidated on this rank"):
            zero.state_dict()
    backward(model, 0, rank=0)
    zero.step()  # what was consolidated is out of date
    with pytest.raises(RuntimeError, match="has not been consolidated on this rank"):
        zero.state_dict()
    with pytest.raises(ValueError, match="to=2 is not a rank of the group"):
        zero.consolidate_state_dict(to=2)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        zero.load_state_dict({"state": {}, "param_groups": []})


def test_state_that_is_not_there_is_an_error():
    run_distributed(2, loading_errors)


def added(zero):
    model, other = make_model(), nn.Linear(5, 3)
    for p in other.parameters():
        nn.init.ones_(p)
    options = {"lr": 0.1, "momentum": 0.5}
    optimizer = (
        ZeroRedundancyOptimizer(model.parameters(), optim.SGD, **options)
        if zero
        else optim.SGD(model.parameters(), **options)
    )
    for step in range(4):
        if step == 1:
            optimizer.add_param_group({"params": other.parameters(), "lr": 0.01})
        backward(model, step, rank=0)
        other.zero_grad()
        other(torch.ones(2, 5)).square().sum().backward()
        optimizer.step()
    parameters = [*model.parameters(), *other.parameters()]
    return [p.detach().numpy().copy() for p in parameters], len(optimizer.state)


def test_groups_can_be_added():
    ((plain, count),) = run_distributed(1, functools.partial(added, False))
    results = run_distributed(2, functools.partial(added, True))
    for parameters, _ in results:
        assert all((a == b).all() for a, b in zip(parameters, plain, strict=True))
    assert sum(own for _, own in results) == count


def with_closure():
    """The closure runs on every rank, also on one that owns nothing: DDP's backward needs all."""
    model = DDP(nn.Linear(5, 1, bias=False))
    zero = ZeroRedundancyOptimizer(model.parameters(), optim.SGD, lr=0.1)

    def closure():
        zero.zero_grad()
        loss = model(torch.ones(1, 5)).sum()
        loss.backward()
        return loss

    before = model.module.weight.detach().clone()
    loss = zero.step(closure)
    assert loss.item() == pytest.approx(before.sum().item())
    return (before - model.module.weight).tolist()


def test_closures_and_more_ranks_than_parameters():
    for moved in run_distributed(N, with_closure):
        np.testing.assert_allclose(moved, [[0.1] * 5], rtol=1e-5)


def accumulated(zero):
    model = DDP(make_model())
    options = {"lr": 0.1}
    optimizer = (
        ZeroRedundancyOptimizer(model.parameters(), optim.Adam, **options)
        if zero
        else optim.Adam(model.parameters(), **options)
    )
    for _ in range(2):
        with model.no_sync():
            model(torch.full((1, 5), float(dist.get_rank()))).sum().backward()
        model(torch.ones(1, 5)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().numpy().copy() for p in model.parameters()]


def test_accumulated_gradients():
    plain = run_distributed(2, functools.partial(accumulated, False))[0]
    for parameters in run_distributed(2, functools.partial(accumulated, True)):
        assert all((a == b).all() for a, b in zip(parameters, plain, strict=True))


def uneven():
    """Rank 0 has one input, rank 1 three; the gradient is the same on both."""
    weight = nn.Parameter(torch.zeros(4))
    bias = nn.Parameter(torch.zeros(2))
    zero = ZeroRedundancyOptimizer([weight, bias], optim.SGD, lr=1.0)
    weight.grad, bias.grad = torch.ones(4), torch.ones(2)
    with Join([zero]):
        for _ in range(1 + 2 * dist.get_rank()):
            zero.step()
    return weight.tolist(), bias.tolist()


def test_uneven_inputs():
    assert run_distributed(2, uneven) == [([-3.0] * 4, [-3.0] * 2)] * 2


def bad_arguments():
    with pytest.raises(ValueError, match="got an empty parameter list"):
        ZeroRedundancyOptimizer([], optim.SGD)
    with pytest.raises(TypeError, match="iterable of Tensors or dicts, but got int"):
        ZeroRedundancyOptimizer(3, optim.SGD)
    mixed = [nn.Parameter(torch.zeros(2, dtype=d)) for d in (torch.float32, torch.float64)]
    with pytest.raises(ValueError, match=r"got both .*FloatTensor and .*DoubleTensor"):
        ZeroRedundancyOptimizer(mixed, optim.SGD)
    zero = ZeroRedundancyOptimizer(mixed[:1], optim.SGD, overlap_with_ddp=True, lr=0.1)
    with pytest.warns(UserWarning, match="should not be included in the training loop"):
        assert zero.step() is None


def test_bad_arguments():
    run_distributed(1, bad_arguments)
