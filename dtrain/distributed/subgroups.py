"""Many groups at once: `new_subgroups`, `new_subgroups_by_enumeration`, `split_group`.

As with `new_group`, only the members of a group take part in making it; of the others a rank sees
`GroupMember.NON_GROUP_MEMBER`. Source: torch.distributed.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from dtrain.distributed.groups import get_rank, new_group
from dtrain.distributed.world import GroupMember, ProcessGroup, resolve


def new_subgroups_by_enumeration(
    ranks_per_subgroup_list: Sequence[Sequence[int]],
    timeout: timedelta | float | None = None,
    backend: str | None = None,
    pg_options: Any = None,
    group_desc: str | None = None,
) -> tuple[ProcessGroup | None, list[Any]]:
    """A group for each list of global ranks, none of which may overlap.

    The caller's group (None if it is in none), and all of them in order. `pg_options` is accepted
    and changes nothing.
    """
    if not ranks_per_subgroup_list:
        raise ValueError("The arg 'ranks_per_subgroup_list' cannot be empty")
    where: dict[int, Sequence[int]] = {}
    for ranks in ranks_per_subgroup_list:
        for rank in ranks:
            if rank in where:
                raise ValueError(
                    f"Rank {rank} has appeared in both subgroup {where[rank]} and {ranks}"
                )
            where[rank] = ranks
    groups = [
        new_group(ranks, timeout, backend, group_desc=group_desc)
        for ranks in ranks_per_subgroup_list
    ]
    mine = [group for group in groups if group is not GroupMember.NON_GROUP_MEMBER]
    return (mine[0] if mine else None), groups


def new_subgroups(
    group_size: int | None = None,
    group: Any = None,
    timeout: timedelta | float | None = None,
    backend: str | None = None,
    pg_options: Any = None,
    group_desc: str | None = None,
) -> tuple[ProcessGroup | None, list[Any]]:
    """Cut `group` in consecutive groups of `group_size` ranks; see `new_subgroups_by_enumeration`.

    The caller is a member of `group`, and `group_size` divides its size.
    """
    if group_size is None:
        raise ValueError(
            "Default group size only takes effect when CUDA is available. "
            "If your subgroup using a backend that does not depend on CUDA, "
            "please pass in 'group_size' correctly."
        )
    ranks = resolve(group).ranks
    if group_size <= 0:
        raise ValueError(f"The arg 'group_size' ({group_size}) must be positive")
    if len(ranks) < group_size:
        raise ValueError(
            f"The arg 'group_size' ({group_size}) must not exceed the world size ({len(ranks)})"
        )
    if len(ranks) % group_size != 0:
        raise ValueError(f"The world size ({len(ranks)}) must be divisible by '{group_size=}'")
    parts = [ranks[i : i + group_size] for i in range(0, len(ranks), group_size)]
    return new_subgroups_by_enumeration(parts, timeout, backend, pg_options, group_desc)


def split_group(
    parent_pg: Any = None,
    split_ranks: Sequence[Sequence[int]] | None = None,
    timeout: timedelta | float | None = None,
    pg_options: Any = None,
    group_desc: str | None = None,
    backend: str | None = None,
) -> ProcessGroup | None:
    """The caller's part of `parent_pg` (default: all), None when it is in no part.

    `split_ranks`: lists of ranks of the parent group; rank i of a part is the i-th of its list.
    `pg_options` is accepted and changes nothing.
    """
    parent = resolve(parent_pg)
    if not split_ranks:
        raise ValueError("split_ranks cannot be None or empty")
    for part in split_ranks:
        if not part:
            raise ValueError("the split group cannot be empty")
        if len(part) != len(set(part)):
            raise ValueError("the split group cannot have duplicate ranks")
        if not set(part) <= set(range(parent.size())):
            raise ValueError(f"{list(part)} are not ranks of the parent (size {parent.size()})")
    mine = [part for part in split_ranks if parent.rank() in part]
    if not mine:
        return None
    if len(mine) > 1:
        raise ValueError(f"rank {parent.rank()} is in more than one part: {mine}")
    ranks = [parent.ranks[rank] for rank in mine[0]]
    assert get_rank() in ranks
    return new_group(  # type: ignore[no-any-return]
        ranks, timeout, backend, group_desc=group_desc, sort_ranks=False
    )
