"""DTensor as a container: cuts, moves between placements, gradients, memory, parameters, refusals.

The oracle of the values is the whole tensor.
"""

from __future__ import annotations

import copy
import io
import itertools

import numpy as np
import pytest

import dtrain as torch
import dtrain.distributed as dist
from dtrain import nn
from dtrain.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
    full,
    local_box,
    ones,
    rand,
    randn,
    zeros,
)
from dtrain.distributed.tensor.placement_types import _StridedShard
from dtrain.testing.distributed import run_distributed

WHOLE = np.arange(35.0, dtype=np.float32).reshape(5, 7)
CUTS = [Replicate(), Shard(0), Shard(1)]
PAIRS = [*itertools.product(CUTS, CUTS), (_StridedShard(0, split_factor=2), Shard(0))]
SUMS = [Partial(), Partial("avg"), Partial("max")]


def grid():
    return dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))


def line():
    return dist.init_device_mesh("cpu", (dist.get_world_size(),))


def part_of(spec):
    offsets, sizes = local_box(spec)
    return WHOLE[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))]


def contributions(mesh, placements):
    """(a DTensor of contributions that depend on the place along partial axes, its value)."""
    place, values = mesh.get_coordinate(), []
    cut = [Replicate() if p.is_partial() else p for p in placements]
    local = distribute_tensor(torch.tensor(WHOLE), mesh, cut).to_local()
    axes = [a for a, p in enumerate(placements) if p.is_partial()]
    local = local * (1 + sum(place[a] * 3**a for a in axes))
    for where in itertools.product(*[range(2) if a in axes else [0] for a in range(mesh.ndim)]):
        values.append(WHOLE * (1 + sum(where[a] * 3**a for a in axes)))
    combine = {"sum": np.sum, "avg": np.mean, "max": np.max}[placements[axes[0]].reduce_op]
    made = DTensor.from_local(local, mesh, placements, shape=WHOLE.shape)
    return made, combine(values, axis=0)


def check_moves():
    mesh, mine = grid(), torch.tensor(WHOLE) * (dist.get_rank() == 0)
    for before in PAIRS:
        given = distribute_tensor(mine, mesh, before)
        assert given.shape == (5, 7)
        assert given.numel() == 35
        assert np.array_equal(given.full_tensor().numpy(), WHOLE)
        for after in PAIRS:
            moved = given.redistribute(placements=after)
            assert moved.placements == after
            assert np.array_equal(moved.to_local().numpy(), part_of(moved._spec)), (before, after)
    for one, other in itertools.product(SUMS, CUTS):
        for before in ((one, other), (other, one)):
            given, value = contributions(mesh, before)
            for after in PAIRS:
                found = given.redistribute(placements=after)
                assert np.allclose(found.full_tensor().numpy(), value), (before, after)


def check_gradients_of_moves():
    """sum(weights * moved) has the gradient `weights`, whatever lies between."""
    mesh, weights = grid(), torch.tensor(WHOLE[::-1].copy())
    for before, after in itertools.product(PAIRS, PAIRS):
        leaf = distribute_tensor(torch.tensor(WHOLE), mesh, before).requires_grad_()
        moved = leaf.redistribute(placements=after)
        (moved.full_tensor() * weights).sum().backward()
        assert leaf.grad.placements == leaf.placements
        assert np.array_equal(leaf.grad.full_tensor().numpy(), WHOLE[::-1]), (before, after)
    for op, share in (("sum", 1.0), ("avg", 0.5)):
        for after in CUTS:
            local = torch.ones(5, 7, requires_grad=True)
            given = DTensor.from_local(local, mesh, [Partial(op), Replicate()])
            moved = given.redistribute(placements=[after, Replicate()])
            (moved.full_tensor() * weights).sum().backward()
            assert np.array_equal(local.grad.numpy(), WHOLE[::-1] * np.float32(share))
    given, _ = contributions(mesh, (Partial("max"), Replicate()))
    lost = given.detach().requires_grad_().full_tensor().sum()
    with pytest.raises(RuntimeError, match=r"Partial\(max\) has no gradient here"):
        lost.backward()


def check_memory():
    mesh = line()
    leaf = distribute_tensor(torch.tensor(WHOLE), mesh, [Shard(0)]).requires_grad_()
    assert leaf.is_leaf
    assert leaf.to_local().data_ptr() == leaf.data_ptr() == leaf.detach().data_ptr()
    (leaf.to_local() * 2).sum().backward()
    first = leaf.grad
    assert isinstance(first, DTensor)
    assert first is leaf.grad
    leaf.full_tensor().sum().backward()
    assert leaf.grad is first
    assert (first.to_local() == 3).all()
    leaf.grad = None
    with pytest.raises(TypeError, match="expected to be a DTensor"):
        leaf.grad = torch.zeros(5, 7)
    with pytest.raises(RuntimeError, match="attempting to assign a gradient"):
        leaf.grad = zeros(5, 7, device_mesh=mesh)
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        leaf.to_local().mul_(2)
    with torch.no_grad():
        leaf.to_local().mul_(2)
        assert np.array_equal(leaf.full_tensor().numpy(), WHOLE * 2)
        leaf.copy_(distribute_tensor(torch.tensor(WHOLE), mesh, [Shard(1)]))
        assert np.array_equal(leaf.full_tensor().numpy(), WHOLE)
        leaf.fill_(4)
        assert (leaf.full_tensor() == 4).all()
    with pytest.raises(RuntimeError, match="cannot be changed in place where"):
        leaf.fill_(0)
    seen = []
    leaf.register_hook(lambda grad: seen.append(grad.placements) or grad)
    leaf.full_tensor().sum().backward()
    assert seen == [(Shard(0),)]
    twice = leaf.full_tensor().sum()
    grads = torch.ones(5, 7) * (dist.get_rank() + 1)
    leaf.grad = None
    same = distribute_tensor(torch.tensor(WHOLE), mesh, None).requires_grad_()
    (same.to_local(grad_placements=[Partial()]) * grads).sum().backward()
    assert (same.grad.to_local() == 3).all()
    assert twice.item() == 140


def check_second_derivatives():
    """A penalty on the gradient; and the gradient of a leaf goes to it, not by way of its part."""
    values = np.random.RandomState(0).randn(4, 6)
    wholes = [torch.tensor(values, requires_grad=True), torch.tensor(values[:2])]
    parts = [
        nn.Parameter(distribute_tensor(wholes[0].detach(), line(), [Shard(0)])),
        distribute_tensor(wholes[1], line()),
    ]
    found = []
    for weight, x in (wholes, parts):
        y = nn.functional.linear(x, weight)
        assert y._node.edges[1] is weight
        (y**3).sum().backward(create_graph=True)
        first = weight.grad
        weight.grad = None
        (first**2).sum().backward()
        found.append(weight.grad)
    assert np.allclose(found[1].full_tensor().numpy(), found[0].numpy())


def check_parameters():
    mesh = line()
    leaf = nn.Parameter(distribute_tensor(torch.tensor(WHOLE), mesh, [Shard(1)]))
    assert isinstance(leaf, nn.Parameter)
    assert isinstance(leaf, DTensor)
    assert leaf.requires_grad
    assert repr(leaf).startswith("Parameter containing:\nDTensor(local_tensor=tensor(")
    assert "placements=(Shard(dim=1),))" in repr(leaf)
    other = copy.deepcopy(leaf)
    assert isinstance(other, nn.Parameter)
    assert other._spec == leaf._spec
    assert other.data_ptr() != leaf.data_ptr()
    model = distribute_module(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), mesh)
    assert all(isinstance(t, DTensor) for t in model.state_dict().values())
    same = model[0].weight.to_local()
    rows = [torch.zeros(4, 3) for _ in range(2)]
    dist.all_gather(rows, same.detach())
    assert np.array_equal(rows[0].numpy(), rows[1].numpy())


def check_refusals():
    mesh = line()
    cut = distribute_tensor(torch.tensor(WHOLE), mesh, [Shard(0)])
    same = distribute_tensor(torch.tensor(WHOLE), mesh)
    for call in (
        cut.numpy, cut.tolist, lambda: bool(cut), lambda: 3.0 in cut, lambda: np.exp(cut),
        lambda: np.asarray(cut), lambda: torch.equal(cut, cut), lambda: torch.allclose(cut, cut),
        lambda: torch.nonzero(cut), lambda: torch.unique(cut), lambda: torch.bernoulli(cut),
        lambda: torch.tensor(cut), lambda: torch.save(cut, io.BytesIO()), lambda: cut.t_(),
        lambda: dist.all_reduce(cut), lambda: dist.all_gather_object([None] * 2, cut),
        lambda: torch.autograd.grad(cut, cut), lambda: cut.__setitem__(slice(1), 1.0),
        lambda: torch.rand_like(cut), lambda: torch.zeros(5).copy_(cut), lambda: copy.copy(cut),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="is not supported for a DTensor"):
            call()
    assert same.numpy()[4, 6] == 34
    assert same.tolist() == WHOLE.tolist()
    assert full((), 2.5, device_mesh=mesh).item() == 2.5
    assert len(cut) == 5
    plain = torch.ones(5, 7)
    for call in (lambda: cut + plain, lambda: plain * same, lambda: torch.matmul(plain.T, cut)):
        with pytest.raises(RuntimeError, match=r"got mixed dtrain.Tensor and DTensor"):
            call()
    with pytest.raises(NotImplementedError, match=r"diagonal has no sharding rule for Spec"):
        torch.diagonal(cut)
    with pytest.raises(ValueError, match=r"rank . gave a part of shape"):
        DTensor.from_local(torch.ones(1, 7), mesh, [Shard(0)], shape=(5, 7))
    with pytest.raises(ValueError, match="must have the same length as"):
        distribute_tensor(plain, mesh, [Shard(0), Shard(1)])
    with pytest.raises(IndexError, match="does not fit a tensor of 2 dimensions"):
        distribute_tensor(plain, mesh, [Shard(2)])
    with pytest.raises(ValueError, match="Partial is no way to cut"):
        distribute_tensor(plain, mesh, [Partial()])
    with pytest.raises(ValueError, match="unknown reduce_op"):
        Partial("mean")


def check_factories():
    mesh = line()
    for made, value in ((zeros(5, 7, device_mesh=mesh, placements=[Shard(0)]), 0),
                        (ones((5, 7), device_mesh=mesh, placements=[Shard(1)]), 1),
                        (full((5, 7), 3.0, device_mesh=mesh, placements=[Shard(-1)]), 3),
                        ):  # fmt: skip
        assert made.shape == (5, 7)
        assert (made.full_tensor() == value).all()
    for make, plain in ((rand, torch.rand), (randn, torch.randn)):
        torch.manual_seed(3)
        made = make(5, 7, device_mesh=mesh, placements=[Shard(0)], requires_grad=True)
        assert made.requires_grad
        torch.manual_seed(3)
        assert np.array_equal(made.full_tensor().detach().numpy(), plain(5, 7).numpy())
    cut = distribute_tensor(torch.tensor(WHOLE), mesh, [Shard(0)])
    for made, value in ((torch.zeros_like(cut), 0), (torch.ones_like(cut), 1),
                        (torch.full_like(cut, 7), 7)):  # fmt: skip
        assert made.placements == cut.placements
        assert (made.full_tensor() == value).all()
    cut.normal_(generator=torch.Generator().manual_seed(5))
    expected = torch.zeros(5, 7).normal_(generator=torch.Generator().manual_seed(5))
    assert np.array_equal(cut.full_tensor().numpy(), expected.numpy())


def check_init():
    """Initial values do not depend on how a tensor is cut."""
    mesh = line()
    for name, arguments in {
        "normal_": (0.5, 2.0), "uniform_": (), "trunc_normal_": (0.0, 1.0, -1.0, 1.0),
        "xavier_normal_": (), "kaiming_uniform_": (), "orthogonal_": (), "sparse_": (0.4,),
        "eye_": (), "ones_": (), "constant_": (3.0,),
    }.items():  # fmt: skip
        fill = getattr(nn.init, name)
        torch.manual_seed(4)
        plain = fill(torch.zeros(5, 7), *arguments)
        after = torch.rand(1).item()
        for cut in CUTS:
            torch.manual_seed(4)
            leaf = nn.Parameter(zeros(5, 7, device_mesh=mesh, placements=[cut]))
            fill(leaf, *arguments)
            assert np.array_equal(leaf.full_tensor().detach().numpy(), plain.numpy()), name
            assert torch.rand(1).item() == after
    kernel = zeros(4, 2, 3, device_mesh=mesh, placements=[Shard(0)])
    expected = nn.init.dirac_(torch.zeros(4, 2, 3)).numpy()
    assert np.array_equal(nn.init.dirac_(kernel).full_tensor().numpy(), expected)


@pytest.mark.parametrize("check", [check_moves, check_gradients_of_moves])
def test_on_a_grid(check):
    run_distributed(4, check)


@pytest.mark.parametrize(
    "check",
    [
        check_memory,
        check_parameters,
        check_refusals,
        check_factories,
        check_init,
        check_second_derivatives,
    ],
)
def test_on_a_line(check):
    run_distributed(2, check)
