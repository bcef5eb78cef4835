"""Groups made from groups: `new_subgroups`, `new_subgroups_by_enumeration`, `split_group`,
`shrink_group`.

As with `new_group`, only the members of a group take part in making it; of the others a rank sees
`GroupMember.NON_GROUP_MEMBER`. Source: torch.distributed.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from dtrain.distributed.groups import get_rank, new_group
from dtrain.distributed.world import GroupMember, ProcessGroup, current_world, resolve

SHRINK_DEFAULT, SHRINK_ABORT = 0, 1


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


def shrink_group(
    ranks_to_exclude: list[int],
    group: Any = None,
    shrink_flags: int = SHRINK_DEFAULT,
    pg_options: Any = None,
) -> ProcessGroup:
    """A new group of the ranks of `group` but those (ranks of the group), which may have died.

    The ranks that stay call it, with the same list; it blocks until all of them have come, at most
    the group's timeout. `group` is closed then; with SHRINK_ABORT its calls under way fail first.
    The default group is replaced, its ranks are numbered anew, and all other groups are closed.
    The store through which the ranks met must be alive: with `env://` rank 0 serves it.
    `pg_options` is accepted and changes nothing. Source: torch.distributed.shrink_group.
    """
    parent, world = resolve(group), current_world()
    stay = _who_stays(ranks_to_exclude, shrink_flags, parent)
    if shrink_flags == SHRINK_ABORT:
        parent.abort(f"the group is shrunk: ranks {ranks_to_exclude} leave it")
    arrays = parent.arrays.split(stay)
    if parent is world.default:
        ranks: Sequence[int] = range(len(stay))
        desc, left = "default_pg", list(world.made)
    else:
        ranks = [parent.ranks[rank] for rank in stay]
        desc, left = f"{parent.group_desc}:shrunken", [parent]
    made = ProcessGroup(arrays, ranks, parent.backend, desc)
    for old in reversed(left):
        world.made.remove(old)
        old.arrays.close()
    world.add(made)
    if parent is world.default:
        world.default = made
    return made


def _who_stays(ranks: list[int], flags: int, parent: ProcessGroup) -> list[int]:
    """The group ranks that are not in `ranks`; the errors are torch's."""
    size = parent.size()
    if not isinstance(ranks, list) or not all(isinstance(rank, int) for rank in ranks):
        raise TypeError(f"ranks_to_exclude must be a list of integers, but got {ranks!r}")
    if not ranks:
        raise ValueError("ranks_to_exclude cannot be empty: specify at least one rank to exclude")
    if flags not in (SHRINK_DEFAULT, SHRINK_ABORT):
        raise ValueError(
            f"Invalid shrink_flags value: {flags}. Must be one of: SHRINK_DEFAULT "
            f"({SHRINK_DEFAULT}) or SHRINK_ABORT ({SHRINK_ABORT})."
        )
    for rank in ranks:
        if not 0 <= rank < size:
            raise ValueError(f"Rank {rank} is out of bounds for group size {size}.")
    if len(set(ranks)) != len(ranks):
        raise ValueError(f"Duplicate rank found in ranks_to_exclude: {ranks}")
    if len(ranks) >= size:
        raise ValueError(f"Cannot exclude all {size} ranks from process group.")
    if parent.rank() in ranks:
        raise RuntimeError(
            f"Current rank {parent.rank()} is in the exclusion list and should not call "
            "shrink_group()."
        )
    return [rank for rank in range(size) if rank not in ranks]
