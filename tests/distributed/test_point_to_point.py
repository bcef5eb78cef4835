"""send, recv, isend, irecv, batches: order, tags, any source, wrong peers."""

from __future__ import annotations

import pytest

import dtrain as torch
import dtrain.distributed as dist
from dtrain.testing.distributed import run_distributed


def check_ring():
    """Each rank passes its number on; after one hop rank r has r - 1."""
    rank, n = dist.get_rank(), dist.get_world_size()
    got = torch.zeros(1)
    work = dist.isend(torch.tensor([float(rank)]), (rank + 1) % n)
    assert dist.recv(got, (rank - 1) % n) == (rank - 1) % n
    work.wait()
    assert got.item() == (rank - 1) % n


def check_order_and_tags():
    """Tag 5 overtakes, messages of one tag do not."""
    if dist.get_rank() == 0:
        for value, tag in ((1.0, 0), (2.0, 0), (3.0, 5)):
            dist.send(torch.tensor([value]), 1, tag=tag)
    elif dist.get_rank() == 1:
        got = torch.zeros(1)
        seen = []
        for tag in (5, 0, 0):
            dist.recv(got, 0, tag=tag)
            seen.append(got.item())
        assert seen == [3.0, 1.0, 2.0]


def check_any_source():
    """Rank 0 hears from everybody without naming anybody."""
    if dist.get_rank():
        dist.send(torch.tensor([float(dist.get_rank())]), 0)
        return
    got = torch.zeros(1)
    seen = {}
    for _ in range(dist.get_world_size() - 1):
        source = dist.recv(got)
        seen[source] = got.item()
    assert seen == {1: 1.0, 2: 2.0}


def check_wrong_peers():
    rank = dist.get_rank()
    with pytest.raises(ValueError, match="should not be the same as the rank of the current"):
        dist.send(torch.ones(1), rank)
    with pytest.raises(ValueError, match="must be specified"):
        dist.isend(torch.ones(1))
    with pytest.raises(ValueError, match="Global rank 7 is not part of group"):
        dist.recv(torch.ones(1), 7)


def check_strided():
    """Received values land in a non-contiguous tensor."""
    if dist.get_rank() == 0:
        dist.send(torch.arange(4).reshape(2, 2), 1)
    elif dist.get_rank() == 1:
        base = torch.zeros(2, 2, dtype=torch.int64)
        dist.irecv(base.t(), 0).wait()
        assert base.tolist() == [[0, 2], [1, 3]]


def check_batch():
    """Every rank sends to and receives from both neighbours; sends stand first in the list."""
    rank, n = dist.get_rank(), dist.get_world_size()
    after, before = (rank + 1) % n, (rank - 1) % n
    got = {peer: torch.zeros(1000) for peer in (after, before)}
    ops = [
        dist.P2POp(dist.isend, torch.full((1000,), 10.0 * rank), after),
        dist.P2POp(dist.isend, torch.full((1000,), 10.0 * rank + 1), group_peer=before, tag=1),
        dist.P2POp(dist.irecv, got[before], before),
        dist.P2POp(dist.irecv, got[after], after, tag=1),
    ]
    works = dist.batch_isend_irecv(ops)
    for work in works:
        work.wait()
    assert works[2].source_rank() == before
    assert got[before].unique().tolist() == [10.0 * before]
    assert got[after].unique().tolist() == [10.0 * after + 1]
    assert repr(ops[0]) == f"P2POp(isend, (1000,), peer={after}, tag=0)"
    assert dist.batch_isend_irecv([]) == []


def check_batch_in_order():
    """Two messages of one pair and tag arrive in the order of the lists."""
    if dist.get_rank() == 0:
        ops = [dist.P2POp(dist.isend, torch.tensor([k]), 1) for k in (1, 2)]
    elif dist.get_rank() == 1:
        ops = [dist.P2POp(dist.irecv, torch.tensor([0]), peer) for peer in (None, 0)]
    else:
        return
    for work in dist.batch_isend_irecv(ops):
        work.wait()
    assert [op.tensor.item() for op in ops] == [1, 2]


def check_wrong_batches():
    rank, x = dist.get_rank(), torch.ones(1)
    with pytest.raises(ValueError, match="Invalid ``op``"):
        dist.P2POp(dist.all_reduce, x, 0)
    with pytest.raises(ValueError, match="same as the rank of the current"):
        dist.P2POp(dist.isend, x, rank)
    with pytest.raises(ValueError, match="Invalid ``p2p_op_list``"):
        dist.batch_isend_irecv([x])
    peer = (rank + 1) % 3
    mixed = [dist.P2POp(dist.isend, x, peer, group) for group in (None, dist.new_group())]
    with pytest.raises(ValueError, match="All ops need to use the same group"):
        dist.batch_isend_irecv(mixed)


CHECKS = [
    *(check_ring, check_order_and_tags, check_any_source, check_wrong_peers, check_strided),
    *(check_batch, check_batch_in_order, check_wrong_batches),
]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("transport", ["local", "zmq"])
def test_point_to_point(check, transport):
    run_distributed(3, check, transport=transport)
