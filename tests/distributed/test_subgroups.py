"""Groups of groups: who is in which, in which order, and the sentences for doing it wrong."""

from __future__ import annotations

import pytest

import dtrain as torch
import dtrain.distributed as dist
from dtrain.testing.distributed import run_distributed


def members(group):
    """The global ranks of those who take part in a collective of `group`."""
    t = torch.zeros(dist.get_world_size(), dtype=torch.int64)
    t[dist.get_rank()] = 1
    dist.all_reduce(t, group=group)
    return t.nonzero().flatten().tolist()


def check_new_subgroups():
    mine, groups = dist.new_subgroups(2)
    first = dist.get_rank() // 2 * 2
    assert members(mine) == dist.get_process_group_ranks(mine) == [first, first + 1]
    assert [g is mine for g in groups] == [first == 0, first == 2]
    assert groups[first == 0] is dist.GroupMember.NON_GROUP_MEMBER
    assert dist.get_pg_count() == 2
    dist.destroy_process_group(mine)
    assert dist.get_pg_count() == 1
    for size, sentence in ((0, "must be positive"), (5, "must not exceed"), (3, "be divisible by")):
        with pytest.raises(ValueError, match=sentence):
            dist.new_subgroups(size)
    with pytest.raises(ValueError, match="Default group size"):
        dist.new_subgroups()


def check_enumeration():
    rank = dist.get_rank()
    mine, groups = dist.new_subgroups_by_enumeration([[0, 3], [1]], timeout=20)
    assert len(groups) == 2
    assert (mine is None) == (rank == 2)
    if mine is not None:
        assert members(mine) == ([1] if rank == 1 else [0, 3])
    with pytest.raises(ValueError, match=r"Rank 3 has appeared in both subgroup \[0, 3\] and"):
        dist.new_subgroups_by_enumeration([[0, 3], [3]])
    with pytest.raises(ValueError, match="cannot be empty"):
        dist.new_subgroups_by_enumeration([])


def check_split():
    """A part of a part, by ranks of the parent, in the order of the list."""
    rank = dist.get_rank()
    outer = dist.split_group(split_ranks=[[3, 2, 1]], group_desc="outer")
    assert (outer is None) == (rank == 0)
    if outer is None:
        return
    assert outer.group_desc == "outer"
    assert dist.get_process_group_ranks(outer) == [3, 2, 1]
    inner = dist.split_group(outer, [[1, 0], [2]])
    assert dist.get_process_group_ranks(inner) == ([1] if rank == 1 else [2, 3])
    assert members(inner) == ([1] if rank == 1 else [2, 3])
    for parts, sentence in (
        (None, "None or empty"),
        ([[]], "cannot be empty"),
        ([[0, 0]], "duplicate ranks"),
        ([[0, 3]], "not ranks of the parent"),
        ([[0, 1, 2], [2, 1, 0]], "in more than one part"),
    ):
        with pytest.raises(ValueError, match=sentence):
            dist.split_group(outer, parts)


def check_shrink_after_a_death():
    """Rank 1 of 4 dies in a collective: the others go on as ranks 0, 1, 2 of a new default."""
    rank, other = dist.get_rank(), dist.new_group()
    if rank == 1:
        dist.group.WORLD.arrays.abandon()
        return None
    with pytest.raises(dist.DistError):
        dist.barrier()
    made = dist.shrink_group([1])
    assert made is dist.group.WORLD
    assert (dist.get_world_size(), dist.get_pg_count()) == (3, 1)
    with pytest.raises(dist.DistError, match="closed"):
        dist.barrier(other)
    pair = dist.new_group([0, 2])
    x = torch.tensor([float(rank)])
    dist.all_reduce(x)
    if dist.get_rank() != 1:
        dist.all_reduce(x, group=pair)
    return dist.get_rank(), x.item()


@pytest.mark.parametrize("transport", ["local", "shm", "zmq"])
def test_the_rest_goes_on_without_a_rank_that_died(transport):
    ended = run_distributed(4, check_shrink_after_a_death, transport=transport)
    assert ended == [(0, 10.0), None, (1, 5.0), (2, 10.0)]


def check_shrink_a_part():
    """Of the group [3, 1, 0], without its rank 1; the default group stays as it is."""
    rank, default = dist.get_rank(), dist.group.WORLD
    part = dist.new_group([3, 1, 0], sort_ranks=False)
    if rank in (0, 3):
        late = dist.irecv(torch.zeros(1), group=part, group_src=1)
        small = dist.shrink_group([1], part, dist.SHRINK_ABORT)
        assert dist.get_process_group_ranks(small) == [3, 0]
        assert members(small) == [0, 3]
        with pytest.raises(dist.DistError, match="the group is shrunk: ranks"):
            late.wait()
    assert (dist.group.WORLD, dist.get_rank()) == (default, rank)
    dist.barrier()


def check_shrink_refusals():
    for ranks, flags, error, sentence in (
        ((1,), 0, TypeError, "must be a list"),
        ([], 0, ValueError, "cannot be empty"),
        ([9], 0, ValueError, "out of bounds for group size 4"),
        ([1, 1], 0, ValueError, "Duplicate rank"),
        ([0, 1, 2, 3], 0, ValueError, "Cannot exclude all 4 ranks"),
        ([dist.get_rank()], 0, RuntimeError, "is in the exclusion list"),
        ([1], 7, ValueError, "Invalid shrink_flags value: 7"),
    ):
        with pytest.raises(error, match=sentence):
            dist.shrink_group(ranks, shrink_flags=flags)
    dist.barrier()


@pytest.mark.parametrize("check", [check_shrink_a_part, check_shrink_refusals])
def test_shrinking(check):
    run_distributed(4, check)


@pytest.mark.parametrize("check", [check_new_subgroups, check_enumeration, check_split])
@pytest.mark.parametrize("transport", ["local", "zmq"])
def test_subgroups(check, transport):
    run_distributed(4, check, transport=transport)
