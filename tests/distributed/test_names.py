"""Names that programs find elsewhere than in `dtrain.distributed`; the lesser methods of works."""

from __future__ import annotations

import time

import pytest

import dtrain as torch
import dtrain.distributed as dist
from dtrain.distributed import distributed_c10d as c10d
from dtrain.distributed.constants import default_pg_timeout
from dtrain.testing.distributed import run_distributed


def test_the_file_where_torch_has_them():
    assert c10d.ReduceOp is dist.ReduceOp is dist.ReduceOp.RedOpType
    assert c10d.all_reduce is dist.all_reduce
    assert c10d.default_pg_timeout is dist.default_pg_timeout is default_pg_timeout
    assert {"P2POp", "_get_default_group"} <= set(dir(c10d))
    assert c10d._make_nccl_premul_sum(0.5) == dist.ReduceOp.PREMUL_SUM(0.5)
    assert dist._all_gather_base is dist.all_gather_into_tensor
    with pytest.raises(AttributeError, match="nonesuch"):
        _ = c10d.nonesuch
    with pytest.raises(ValueError, match="has not been initialized"):
        c10d._get_default_group()


def check_helpers():
    default = dist.group.WORLD
    assert c10d._get_default_group() is default
    assert c10d._get_default_store() is default.get_group_store()
    pair = dist.new_group([0])
    assert c10d._rank_not_in_group(pair) == (dist.get_rank() == 1)
    if dist.get_rank() == 0:
        assert c10d._resolve_process_group(c10d._get_process_group_name(pair)) is pair
    with pytest.raises(ValueError, match=r"Could not resolve .* name nobody"):
        c10d._resolve_process_group("nobody")


def check_works():
    before = time.monotonic()
    works = [dist.all_reduce(torch.ones(3), async_op=True) for _ in range(3)]
    for work in works:
        work.block_current_stream()
    assert [work._get_sequence_number() for work in works] == [0, 1, 2]
    for work in works:
        assert 0 <= work._get_duration() <= (time.monotonic() - before) * 1e3
    assert dist.Work.unbox(works[0].boxed()) is works[0]
    got = torch.zeros(1)
    receiving = dist.irecv(got, 1 - dist.get_rank())
    with pytest.raises(RuntimeError, match="has not finished"):
        receiving._get_duration()
    dist.barrier()  # nobody has sent before
    dist.send(torch.ones(1), 1 - dist.get_rank())
    receiving.wait()
    assert receiving._source_rank() == 1 - dist.get_rank()
    with pytest.raises(RuntimeError, match="only collectives have a number"):
        receiving._get_sequence_number()


@pytest.mark.parametrize("check", [check_helpers, check_works])
def test_on_two_ranks(check):
    run_distributed(2, check)
