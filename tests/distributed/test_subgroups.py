"""Many groups at once: who is in which, in which order, and the sentences for doing it wrong."""

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


@pytest.mark.parametrize("check", [check_new_subgroups, check_enumeration, check_split])
@pytest.mark.parametrize("transport", ["local", "zmq"])
def test_subgroups(check, transport):
    run_distributed(4, check, transport=transport)
