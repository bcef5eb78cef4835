"""Collectives that return their result: values, the forms of a group, and no gradient unless asked.

The gradients of those that end in `_autograd` are tested with `nn.functional`'s.
"""

from __future__ import annotations

import pytest

import dtrain as torch
import dtrain.distributed as dist
from dtrain.distributed import _functional_collectives as fc
from dtrain.testing.distributed import run_distributed

N = 4


def me():
    return dist.get_rank()


def check_values():
    x = torch.tensor([[1.0, 2.0]], requires_grad=True) * (me() + 1)
    world = dist.group.WORLD
    assert fc.all_reduce(x, "sum", world).tolist() == [[10.0, 20.0]]
    assert fc.all_reduce(x, "max", world).tolist() == [[4.0, 8.0]]
    assert fc.broadcast(x, 2, world).tolist() == [[3.0, 6.0]]
    rows = [[r + 1.0, 2 * r + 2.0] for r in range(N)]
    assert fc.all_gather_tensor(x, 0, world).tolist() == rows
    assert fc.all_gather_single(x, 1, world).tolist() == [[n for row in rows for n in row]]
    wide = torch.arange(8.0).reshape(2, 4) + me()
    assert fc.reduce_scatter_tensor(wide, "sum", 1, world).tolist() == [
        [4.0 * me() + 6.0],
        [4.0 * me() + 22.0],
    ]
    swapped = fc.all_to_all_single(torch.arange(4.0) + 10 * me(), None, None, world)
    assert swapped.tolist() == [10.0 * r + me() for r in range(N)]
    turned = fc.permute_tensor(x, [1, 2, 3, 0], world)
    assert turned.tolist() == [rows[me() - 1]]
    assert fc.wait_tensor(turned) is turned
    assert not turned.requires_grad
    assert not fc.all_gather_single(x, 0, world).requires_grad
    assert fc.all_gather_single_autograd(x, 0, world).requires_grad
    assert x.tolist() == [rows[me()]]
    sums = fc.all_reduce_coalesced([x, wide], "avg", world)
    assert [s.tolist() for s in sums] == [
        [[2.5, 5.0]],
        (torch.arange(8.0).reshape(2, 4) + 1.5).tolist(),
    ]
    assert fc.all_gather_into_tensor_coalesced([x], world)[0].tolist() == rows
    parts = fc.reduce_scatter_tensor_coalesced([wide], "sum", [1], world)
    assert parts[0].shape == (2, 1)


def check_groups():
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    x, line = torch.tensor([float(me())]), me() // 2 * 2
    pair = mesh.get_group("tp")
    made = dist.get_pg_count()
    for group in (pair, mesh["tp"], (mesh, 1), pair.group_name, [line, line + 1]):
        assert fc.all_reduce(x, "sum", group).item() == 2 * line + 1
    assert dist.get_pg_count() == made
    assert fc.all_reduce(x, "sum", [3, 2, 1, 0]).item() == 6
    assert dist.get_pg_count() == made + 1
    for call, sentence in (
        (lambda: fc.all_reduce(x, "mean", pair), "unsupported reduce op 'mean'"),
        (lambda: fc.all_reduce(x, "sum", "nobody"), "no process group of this rank is named"),
        (lambda: fc.permute_tensor(x, [0, 0], pair), "not a permutation of range"),
        (lambda: fc.reduce_scatter_single(x, "sum", 0, pair), "must be a multiple of the group's"),
    ):
        with pytest.raises(ValueError, match=sentence):
            call()
    dist.barrier()


@pytest.mark.parametrize("check", [check_values, check_groups])
def test_functional_collectives(check):
    run_distributed(N, check)
