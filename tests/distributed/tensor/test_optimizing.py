"""Training with parameters that are DTensors: norms, clipping, optimizers and their state.

The oracle is the same computation with whole tensors on one rank.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

import dtrain as torch
import dtrain.distributed as dist
from dtrain import nn
from dtrain.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from dtrain.nn.utils import clip_grad_norm_, get_total_norm
from dtrain.testing.distributed import run_distributed

CUTS = [Replicate(), Shard(0), Shard(1)]


def drawn(*shapes):
    state = np.random.RandomState(1)
    return [state.randn(*shape).astype(np.float32) for shape in shapes]


def grid():
    return dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))


def check_norms():
    mesh, arrays = grid(), drawn((5, 7), (3, 3), (1, 4), (2, 2))
    flat = np.concatenate([a.reshape(-1) for a in arrays])
    for order, cuts in itertools.product((1.0, 2.0, 3.0, math.inf), itertools.product(CUTS, CUTS)):
        many = [distribute_tensor(torch.tensor(a), mesh, cuts) for a in arrays[:2]]
        many.append(distribute_tensor(torch.tensor(arrays[2]), mesh["tp"], [Shard(1)]))
        total = get_total_norm([*many, torch.tensor(arrays[3])], order)
        assert not isinstance(total, DTensor)
        assert np.isclose(total.item(), np.linalg.norm(flat, order), rtol=1e-6)
        total = get_total_norm(many[:2], order)
        assert isinstance(total, DTensor)
        expected = np.linalg.norm(flat[: 5 * 7 + 9], order)
        assert np.isclose(total.full_tensor().item(), expected, rtol=1e-6)
    contribution = DTensor.from_local(torch.ones(2, 2), mesh, [Partial(), Replicate()])
    with pytest.raises(RuntimeError, match="the norm of contributions"):
        get_total_norm([contribution])


def check_clipping():
    mesh, (first, second) = grid(), drawn((5, 7), (3, 3))
    leaves = [
        nn.Parameter(distribute_tensor(torch.tensor(first), mesh, [Shard(0), Shard(1)])),
        nn.Parameter(distribute_tensor(torch.tensor(second), mesh, [Replicate(), Shard(0)])),
    ]
    whole = [nn.Parameter(torch.tensor(a)) for a in (first, second)]
    sum((p.full_tensor() ** 2).sum() for p in leaves).backward()
    sum((p**2).sum() for p in whole).backward()
    norm, expected = clip_grad_norm_(leaves, 0.5), clip_grad_norm_(whole, 0.5)
    assert np.isclose(norm.item(), expected.item(), rtol=1e-6)
    for mine, other in zip(leaves, whole, strict=True):
        assert np.allclose(mine.grad.full_tensor().numpy(), other.grad.numpy(), rtol=1e-6)


MAKERS = [
    lambda params: torch.optim.SGD(params, 0.1, momentum=0.9),
    lambda params: torch.optim.AdamW(params, 0.1),
    lambda params: torch.optim.Adagrad(params, 0.1),
    lambda params: torch.optim.RMSprop(params, 0.1),
]


def stepped(maker, cuts, mesh, saved=None):
    """A parameter and its optimizer after two steps (further ones, of a saved state)."""
    (values,) = drawn((5, 7))
    tensor = torch.tensor(values)
    leaf = nn.Parameter(tensor if cuts is None else distribute_tensor(tensor, mesh, cuts))
    optimizer = maker([leaf])
    if saved is not None:
        optimizer.load_state_dict(saved)
    for _ in range(2):
        optimizer.zero_grad()
        whole = leaf if cuts is None else leaf.full_tensor()
        (whole**3).sum().backward()
        optimizer.step()
    return leaf, optimizer


def check_optimizers():
    mesh = grid()
    for maker in MAKERS:
        plain, whole = stepped(maker, None, mesh)
        for cuts in ([Shard(0), Shard(0)], [Replicate(), Shard(1)]):
            leaf, optimizer = stepped(maker, cuts, mesh)
            assert np.array_equal(leaf.full_tensor().detach().numpy(), plain.detach().numpy())
            state = optimizer.state_dict()
            for name, value in state["state"][0].items():
                if getattr(value, "ndim", 0):
                    assert value.placements == leaf.placements, name
                    theirs = whole.state_dict()["state"][0][name].numpy()
                    assert np.array_equal(value.full_tensor().numpy(), theirs)
            for saved in (
                whole.state_dict(),
                state,
                stepped(maker, [Shard(1)] * 2, mesh)[1].state_dict(),
            ):
                again, _ = stepped(maker, cuts, mesh, saved)
                expected, _ = stepped(maker, None, mesh, whole.state_dict())
                found = again.full_tensor().detach().numpy()
                assert np.array_equal(found, expected.detach().numpy())


@pytest.mark.parametrize("check", [check_norms, check_clipping, check_optimizers])
def test_optimizing(check):
    run_distributed(4, check)
