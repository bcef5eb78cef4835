"""The backend "fake": one rank of many, alone. Shapes and order of calls are right, results not."""

from __future__ import annotations

import pytest

import dtrain as torch
import dtrain.distributed as dist
from dtrain.distributed.world import own_world


@pytest.fixture
def rank_3_of_8():
    with own_world():
        dist.init_process_group("fake", rank=3, world_size=8, store=dist.FakeStore())
        yield


def test_every_call_returns_at_once(rank_3_of_8):
    assert (dist.get_rank(), dist.get_world_size(), dist.get_backend()) == (3, 8, "fake")
    x = torch.tensor([1.0, 2.0])
    dist.all_reduce(x)
    dist.broadcast(x, 7)
    assert x.tolist() == [1.0, 2.0]
    out = torch.zeros(16)
    dist.all_gather_into_tensor(out, x)
    assert out.tolist() == [1.0, 2.0] * 8
    part = torch.zeros(2)
    dist.reduce_scatter_tensor(part, out)
    dist.send(x, 4)
    assert dist.recv(x) == 4
    work = dist.barrier(async_op=True)
    assert work.wait()
    assert dist.group.WORLD.arrays.statistics().calls["all_reduce"].count == 1


def test_arguments_are_checked_as_ever(rank_3_of_8):
    with pytest.raises(ValueError, match="expected a list of 8 tensors"):
        dist.all_gather([torch.zeros(1)] * 3, torch.zeros(1))
    with pytest.raises(ValueError, match="on 'fake' are on it, not 'zmq'"):
        dist.new_group(backend="zmq")


def test_groups_and_meshes_of_a_world_that_is_not_there(rank_3_of_8):
    mesh = dist.init_device_mesh("cpu", (2, 4), mesh_dim_names=("dp", "tp"))
    assert dist.get_process_group_ranks(mesh.get_group("dp")) == [3, 7]
    assert mesh.get_local_rank("tp") == 3
    group = mesh.get_group("tp")
    group.abort("enough")
    with pytest.raises(dist.DistError, match="was aborted: enough"):
        dist.barrier(group)
    dist.barrier()


def test_a_rank_that_is_not_of_the_world():
    with own_world(), pytest.raises(ValueError, match=r"rank 8 is not in range\(8\)"):
        dist.init_process_group("fake", rank=8, world_size=8)
