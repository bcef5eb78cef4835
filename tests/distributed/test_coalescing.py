"""Coalesced calls: one message for many tensors, and blocks that wait once at their end."""

from __future__ import annotations

import pytest

import dtrain as torch
import dtrain.distributed as dist
from dtrain.testing.distributed import run_distributed

N = 3


def sent():
    return dist.group.WORLD.arrays.statistics().messages_sent


def check_all_reduce():
    tensors = [torch.ones(2), torch.full((2, 2), 2.0).t(), torch.tensor(3.0), torch.zeros(0)]
    before = sent()
    dist.all_reduce_coalesced(tensors)
    assert sent() - before == N - 1
    assert [t.tolist() for t in tensors] == [[3.0, 3.0], [[6.0, 6.0], [6.0, 6.0]], 9.0, []]
    work = dist.all_reduce_coalesced(tensors, dist.ReduceOp.MAX, async_op=True)
    assert work.result()[2].item() == 9.0
    with pytest.raises(ValueError, match="different dtypes"):
        dist.all_reduce_coalesced([torch.ones(1), torch.ones(1, dtype=torch.float64)])


def check_all_gather():
    rank = dist.get_rank()
    mine = [torch.full((2,), rank), torch.full((1, 3), 10 + rank)]
    every = [[torch.zeros_like(t) for t in mine] for _ in range(N)]
    dist.all_gather_coalesced(every, mine)
    for r, (one, two) in enumerate(every):
        assert (one.tolist(), two.tolist()) == ([r] * 2, [[10 + r] * 3])
    with pytest.raises(ValueError, match="expected 3 lists of"):
        dist.all_gather_coalesced(every[:2], mine)
    with pytest.raises(ValueError, match="expected 3 lists of"):
        dist.all_gather_coalesced([part[::-1] for part in every], mine)


def batch_that_fails(tensor):
    with dist._coalescing_manager():
        dist.all_reduce(tensor)
        dist.broadcast(tensor, 9)


def check_manager():
    tensors = [torch.ones(2) * k for k in range(4)]
    with dist._coalescing_manager() as batch:
        for t in tensors:
            assert dist.all_reduce(t) is None
        assert len(batch.works) == 4
    assert [t[0].item() for t in tensors] == [0.0, 3.0, 6.0, 9.0]
    with dist._coalescing_manager(async_ops=True) as batch:
        dist.broadcast(tensors[1], 0)
        assert dist.barrier(async_op=True) is batch.works[1]
    batch.wait()
    assert all(work.is_completed() for work in batch.works)
    with pytest.raises(ValueError, match="Global rank 9"):
        batch_that_fails(tensors[0])
    assert dist.all_reduce(tensors[0]) is None  # outside: it waits again, in the same order
    assert tensors[0].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("check", [check_all_reduce, check_all_gather, check_manager])
@pytest.mark.parametrize("transport", ["local", "zmq"])
def test_coalescing(check, transport):
    run_distributed(N, check, transport=transport)
