"""Averagers, PostLocalSGDOptimizer and DiLoCo against the same steps written in NumPy."""

from __future__ import annotations

import numpy as np
import pytest

import dtrain as torch
import dtrain.distributed as dist
from dtrain.distributed.algorithms.model_averaging import utils
from dtrain.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from dtrain.distributed.algorithms.model_averaging.diloco import DiLoCoAverager
from dtrain.distributed.algorithms.model_averaging.hierarchical_model_averager import (
    HierarchicalModelAverager,
)
from dtrain.distributed.optim import PostLocalSGDOptimizer
from dtrain.testing.distributed import run_distributed

nn, SGD = torch.nn, torch.optim.SGD
RATE, STEPS = 0.05, 7


def parameter(value, grad=0.0, dtype=torch.float64):
    made = nn.Parameter(torch.tensor([float(value)], dtype=dtype))
    made.grad = None if grad is None else torch.tensor([float(grad)], dtype=dtype)
    return made


def check_average():
    """Only parameters with a gradient; one all-reduce a dtype; in place, the sum in rank order."""
    rank = dist.get_rank()
    params = [
        parameter(rank),
        parameter(10 * rank, dtype=torch.float32),
        parameter(rank, None),
        parameter([1.0, 1e-16, 1e-16][rank]),
    ]
    memory = [p.data_ptr() for p in params]
    calls = dist.group.WORLD.arrays.statistics
    before = calls().calls["all_reduce"].count if "all_reduce" in calls().calls else 0
    utils.average_parameters_or_parameter_groups([{"params": params}], None)
    assert calls().calls["all_reduce"].count - before == 2
    assert [p.item() for p in params] == [1.0, 10.0, rank, (1.0 + 1e-16 + 1e-16) / 3]
    assert [p.data_ptr() for p in params] == memory
    assert utils.get_params_to_average(params) == [params[0], params[1], params[3]]
    with pytest.raises(NotImplementedError, match="Parameter input of type"):
        utils.get_params_to_average([3])
    utils.average_parameters(iter(params), dist.GroupMember.NON_GROUP_MEMBER)


def test_the_mean_of_parameters():
    run_distributed(3, check_average)


def when(averager, steps):
    """After which of the steps parameters were averaged (each rank moves by its rank)."""
    param = parameter(0)
    found = []
    for step in range(steps):
        with torch.no_grad():
            param += dist.get_rank() + 1.0
        before = param.item()
        averager.average_parameters(iter([param]))
        if param.item() != before:
            found.append((step, round(param.item(), 6)))
    return found


def test_periods_begin_after_the_warm_up():
    def rank():
        return [step for step, _ in when(PeriodicModelAverager(3, warmup_steps=2), 9)]

    assert run_distributed(2, rank) == [[2, 5, 8]] * 2


def check_hierarchy():
    averager = HierarchicalModelAverager({2: 2, 4: 4}, warmup_steps=1)
    return when(averager, 5)


def test_the_largest_period_that_divides_the_step_averages_in_its_group():
    """At step 2 pairs have moved 3 times, by 1.5 and 3.5 on average; at step 4 all by 2.5."""
    pairs = run_distributed(4, check_hierarchy)
    assert pairs[0] == pairs[1] == [(2, 4.5), (4, 12.5)]
    assert pairs[2] == pairs[3] == [(2, 10.5), (4, 12.5)]


def check_refusals():
    for build, sentence in (
        (lambda: PeriodicModelAverager(0), "Arg ``period`` must be a positive value"),
        (lambda: PeriodicModelAverager(2, -1), "``warmup_steps`` must be a non-negative number"),
        (lambda: DiLoCoAverager([], 0), "Arg ``period`` must be a positive value"),
        (lambda: HierarchicalModelAverager({}), "must not be empty"),
        (lambda: HierarchicalModelAverager({0: 2}), "minimum period .* must be a positive value"),
        (lambda: HierarchicalModelAverager({2: 4}), "The last value .* 4 must be equal .* 2"),
        (lambda: HierarchicalModelAverager({4: 1, 2: 2}), "must grow together"),
        (lambda: HierarchicalModelAverager({4: 2}, -1), "``warmup_steps`` must be a non-negative"),
    ):
        with pytest.raises(ValueError, match=sentence):
            build()


def test_what_averagers_refuse():
    run_distributed(2, check_refusals)


def test_a_period_of_1_is_warned_of():
    def rank():
        with pytest.warns(UserWarning, match="When period is 1, no need to use model averaging"):
            PeriodicModelAverager(1)
        with pytest.warns(UserWarning, match="the maximum period in arg .* is 1, no need"):
            HierarchicalModelAverager({1: 1})

    run_distributed(1, rank)


# --- against NumPy: least squares on each rank's own rows -----------------------------------------

RANKS = 3


def rows(rank):
    random = np.random.RandomState(rank)
    return random.randn(4, 5), random.randn(4)


def local_gradient(weight, rank):
    a, b = rows(rank)
    return 2 / len(b) * a.T @ (a @ weight - b)


def start():
    return np.linspace(-1, 1, 5)


def local_sgd(period, warmup):
    """Weights of all ranks after STEPS steps of SGD with averaging."""
    weights = [start() for _ in range(RANKS)]
    for step in range(STEPS):
        weights = [w - RATE * local_gradient(w, r) for r, w in enumerate(weights)]
        if step >= warmup and (step - warmup) % period == 0:
            weights = [np.mean(weights, axis=0)] * RANKS
    return weights


def diloco(period, rate, momentum):
    """The paper's Algorithm 1 with Nesterov momentum in torch's form."""
    shared, velocity = start(), np.zeros(5)
    weights = [shared] * RANKS
    for step in range(1, STEPS + 1):
        weights = [w - RATE * local_gradient(w, r) for r, w in enumerate(weights)]
        if step % period == 0:
            delta = np.mean([shared - w for w in weights], axis=0)
            velocity = delta if step == period else momentum * velocity + delta
            shared = shared - rate * (delta + momentum * velocity)
            weights = [shared] * RANKS
    return weights


def train(make_averager, steps=STEPS, state=None):
    a, b = (torch.tensor(x) for x in rows(dist.get_rank()))
    model = nn.Linear(5, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(torch.tensor(start()).reshape(1, 5))
    optimizer = PostLocalSGDOptimizer(SGD(model.parameters(), lr=RATE), make_averager(model))
    if state is not None:
        model.load_state_dict(state[0])
        optimizer.load_state_dict(state[1])
        if isinstance(optimizer.averager, DiLoCoAverager):
            optimizer.averager.load_state_dict(state[2])
    for _ in range(steps):
        optimizer.zero_grad()
        ((model(a).squeeze(1) - b) ** 2).mean().backward()
        optimizer.step()
    averager = optimizer.averager
    extra = averager.state_dict() if isinstance(averager, DiLoCoAverager) else None
    state = (model.state_dict(), optimizer.state_dict(), extra)
    return model.weight.detach().numpy().reshape(5).copy(), state


@pytest.mark.parametrize(("period", "warmup"), [(2, 0), (3, 1)])
def test_post_local_sgd_equals_the_reference(period, warmup):
    found = run_distributed(RANKS, train, lambda model: PeriodicModelAverager(period, warmup))
    for (ours, _), theirs in zip(found, local_sgd(period, warmup), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)


def test_diloco_equals_the_reference():
    found = run_distributed(RANKS, train, lambda model: DiLoCoAverager(model.parameters(), 3))
    for (ours, _), theirs in zip(found, diloco(3, 0.7, 0.9), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)


def test_diloco_with_plain_outer_sgd_is_local_sgd():
    def averager(model):
        return DiLoCoAverager(model.parameters(), 3, lambda params: SGD(params, lr=1.0))

    found = run_distributed(RANKS, train, averager)
    for (ours, _), theirs in zip(found, local_sgd(3, 2), strict=True):  # after 3 steps: step 2
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)


@pytest.mark.parametrize(
    "averager",
    [lambda model: DiLoCoAverager(model.parameters(), 3), lambda m: PeriodicModelAverager(3, 2)],
    ids=["diloco", "periodic"],
)
def test_a_run_that_was_saved_goes_on_with_the_same_bits(averager):
    whole = run_distributed(RANKS, train, averager)
    half = run_distributed(RANKS, train, averager, 4)
    states = [state for _, state in half]

    def rest():
        return train(averager, STEPS - 4, states[dist.get_rank()])

    for (ours, _), (theirs, _) in zip(run_distributed(RANKS, rest), whole, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def check_diloco():
    """The first rank's parameters are copied; only outer steps send; others' lists are refused."""
    param = parameter(dist.get_rank() + 5)
    averager = DiLoCoAverager([param], 2)
    assert param.item() == 5.0
    sent = dist.group.WORLD.arrays.statistics
    before = sent().completed
    averager.average_parameters([param])
    assert sent().completed == before
    averager.average_parameters([{"params": [param]}])
    assert sent().completed == before + 1
    with pytest.raises(ValueError, match=r"made for 1 .* given 2 that are not the same"):
        averager.average_parameters([param, param])


def test_diloco_sends_in_outer_steps_alone():
    run_distributed(2, check_diloco)


def check_wrapper():
    param, later = parameter(1.0), parameter(1.0)
    optimizer = PostLocalSGDOptimizer(SGD([param], lr=1.0), PeriodicModelAverager(4))
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append("step"))
    optimizer.add_param_group({"params": [later], "lr": 2.0})
    later.grad = param.grad = torch.tensor([1.0], dtype=torch.float64)
    assert optimizer.step(lambda: "loss") == "loss"
    assert (param.item(), later.item(), seen) == (0.0, -1.0, ["step"])
    assert optimizer.state is optimizer.optim.state
    assert repr(optimizer) == repr(optimizer.optim)
    state = optimizer.state_dict()
    assert state.pop("step") == 1
    with pytest.warns(UserWarning, match="does not contain a step counter for an averager"):
        optimizer.load_state_dict(state)
    assert optimizer.averager.step == 0
    torch.optim.lr_scheduler.StepLR(optimizer, 1)  # takes it for the optimizer that it is
    optimizer.zero_grad()
    assert param.grad is None


def test_the_wrapper_is_the_optimizer():
    run_distributed(1, check_wrapper)
