"""Differentiable collectives: gradients against closed forms and against finite differences.

What is differentiated is the sum of the losses of all ranks. The numerical check moves one element
on one rank at a time, to first and to second order, in float64.
"""

from __future__ import annotations

import numpy as np
import pytest

import dtrain as torch
import dtrain.distributed as dist
from dtrain.distributed import _functional_collectives as fc
from dtrain.distributed.nn import functional as F
from dtrain.testing.distributed import run_distributed

N = 3
STEP = 1e-4
OPS = (dist.ReduceOp.SUM, dist.ReduceOp.AVG, dist.ReduceOp.PREMUL_SUM(0.5))


def me():
    return dist.get_rank()


def empty(*shape):
    return torch.empty(*shape, dtype=torch.float64)


def chunks(x):
    return list(torch.chunk(x, N))


SPLITS = [[(a + b) % 3 for b in range(N)] for a in range(N)]  # rows from rank a to rank b


def uneven(x):
    given, taken = SPLITS[me()], [row[me()] for row in SPLITS]
    return F.all_to_all_single(empty(sum(taken), 2), x[: sum(given)], taken, given)


# {name: what a rank does with its 6 x 2 input}
CALLS = {
    "broadcast": lambda x: F.broadcast(x, 1),
    "gather": lambda x: torch.cat(F.gather(x, 1)),
    "scatter": lambda x: F.scatter(chunks(x), 1),
    "all_gather": lambda x: torch.cat(F.all_gather(x)),
    "_all_gather_base": lambda x: F._all_gather_base(empty(N * 6, 2), x),
    "all_to_all": lambda x: torch.cat(F.all_to_all([empty(2, 2) for _ in range(N)], chunks(x))),
    "all_to_all_single": lambda x: F.all_to_all_single(empty(6, 2), x),
    "all_to_all_single, uneven": uneven,
    "all_gather_single_autograd": lambda x: fc.all_gather_single_autograd(x, 1, None),
    "reduce_scatter_single_autograd": lambda x: fc.reduce_scatter_single_autograd(
        x.t(), "avg", 1, None
    ),
    "all_to_all_single_autograd": lambda x: fc.all_to_all_single_autograd(x, None, None, None),
    "transposed": lambda x: F.all_reduce(x.t()),
    **{f"reduce {op}": lambda x, op=op: F.reduce(x, 1, op) for op in OPS},
    **{f"all_reduce {op}": lambda x, op=op: F.all_reduce(x, op) for op in OPS},
    **{
        f"reduce_scatter {op}": lambda x, op=op: F.reduce_scatter(empty(2, 2), chunks(x), op)
        for op in OPS
    },
}


def inputs():
    rng = np.random.default_rng(me())
    return rng.normal(size=(6, 2)), rng.normal(size=(6, 2))


def loss(call, x):
    """Different on every rank, and with a second derivative."""
    y = call(x)
    weights = torch.arange(y.numel(), dtype=torch.float64).reshape(*y.shape) + me()
    return (weights * y**3).sum()


def total(value):
    """The sum over all ranks of a number."""
    value = torch.tensor(value.item(), dtype=torch.float64)
    dist.all_reduce(value)
    return value.item()


def slope(function, x):
    """Finite differences of total(function) by every element of every rank; this rank's part."""
    found = np.zeros_like(x)
    for rank in range(N):
        for place in np.ndindex(x.shape):
            ends = []
            for step in (STEP, -STEP):
                moved = x.copy()
                moved[place] += step * (rank == me())
                ends.append(total(function(torch.tensor(moved))))
            if rank == me():
                found[place] = (ends[0] - ends[1]) / (2 * STEP)
    return found


def check_gradients(name):
    call, (x, v) = CALLS[name], inputs()
    expected = slope(lambda t: loss(call, t), x)
    t = torch.tensor(x, requires_grad=True)
    (g,) = torch.autograd.grad(loss(call, t), t)
    np.testing.assert_allclose(g.numpy(), expected, rtol=1e-6, atol=1e-6)

    def along(t):
        """The derivative of the loss in direction v."""
        t = t.detach().requires_grad_()
        (g,) = torch.autograd.grad(loss(call, t), t, create_graph=True)
        return t, (g * torch.tensor(v)).sum()

    expected = slope(lambda t: along(t)[1], x)
    t, d = along(t)
    (second,) = torch.autograd.grad(d, t)
    np.testing.assert_allclose(second.numpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CALLS)
def test_gradients_to_second_order(name):
    run_distributed(N, check_gradients, name)


def check_closed_forms():
    """Loss r is (r + 1) sum(y); the weights add up to 6."""
    x = torch.ones(2, requires_grad=True)
    ((me() + 1.0) * F.all_reduce(x)).sum().backward()
    assert x.grad.tolist() == [6.0, 6.0]
    x.grad = None
    ((me() + 1.0) * F.broadcast(x, 2)).sum().backward()
    assert x.grad.tolist() == ([6.0, 6.0] if me() == 2 else [0.0, 0.0])
    x.grad = None
    y = F.all_gather(x)
    ((me() + 1.0) * y[1]).sum().backward()  # the other parts are not used
    assert x.grad.tolist() == ([6.0, 6.0] if me() == 1 else [0.0, 0.0])


@pytest.mark.parametrize("transport", ["local", "zmq"])
def test_closed_forms(transport):
    run_distributed(N, check_closed_forms, transport=transport)


def check_order():
    """Ranks add up independent results in different orders: backward still matches."""
    x = torch.ones(2, requires_grad=True)
    parts = [F.all_reduce(x * k, dist.ReduceOp.SUM) for k in range(4)]
    parts += [F.broadcast(x, 1)]
    order = parts if me() else parts[::-1]
    sum((p.sum() for p in order), torch.zeros(())).backward()
    assert x.grad.tolist() == [(0 + 1 + 2 + 3) * N + N * (me() == 1)] * 2


def test_backward_order_does_not_depend_on_the_use_of_results():
    run_distributed(N, check_order)


def check_world_matches_one_process():
    """A linear layer split by columns over ranks has the gradients of the whole one."""
    torch.manual_seed(0)
    w, x = torch.randn(6, 4), torch.randn(5, 4)
    whole = w.clone().requires_grad_()
    ((x @ whole.t()) ** 2).sum().backward()
    mine = w[2 * me() : 2 * me() + 2].clone().requires_grad_()
    y = torch.cat(F.all_gather(x @ mine.t()), dim=1)
    ((y**2).sum() / N).backward()
    expected = whole.grad[2 * me() : 2 * me() + 2].numpy()
    np.testing.assert_allclose(mine.grad.numpy(), expected, rtol=1e-5, atol=1e-5)


def test_a_split_layer_has_the_gradients_of_the_whole():
    run_distributed(N, check_world_matches_one_process)


def check_refusals():
    x = torch.ones(2, requires_grad=True)
    for call in (
        lambda: F.all_reduce(x, dist.ReduceOp.MAX),
        lambda: F.reduce(x, 0, dist.ReduceOp.PRODUCT),
        lambda: F.reduce_scatter(torch.ones(1), [x] * N, dist.ReduceOp.MIN),
    ):
        with pytest.raises(ValueError, match="has no gradient here"):
            call()
    with pytest.raises(ValueError, match="expected 3 tensors, got 1"):
        F.scatter([x])
    dist.barrier()


def test_refusals():
    run_distributed(N, check_refusals)


def test_the_faces_show_the_same():
    assert dist.nn.all_reduce is dist.nn.functional.all_reduce is F.all_reduce
