"""torch.distributed under the name of the file that it is written in.

Programs import from there what is public in `dtrain.distributed`, and a few helpers with an
underscore, which are below. Source: torch.distributed.distributed_c10d.
"""

from __future__ import annotations

from typing import Any

import dtrain.distributed as _public
from dtrain.comm.reduce import ReduceOp
from dtrain.comm.store.base import Store
from dtrain.distributed.constants import default_pg_timeout as default_pg_timeout
from dtrain.distributed.world import GroupMember, ProcessGroup, current_world, resolve

_make_nccl_premul_sum = ReduceOp.PREMUL_SUM


def _get_default_group() -> ProcessGroup:
    """The default group; ValueError before `init_process_group`."""
    return resolve(None)


def _get_default_store() -> Store:
    """The store through which the ranks met; ValueError before `init_process_group`."""
    return resolve(None).get_group_store()


def _rank_not_in_group(group: Any) -> bool:
    """Whether `group` is the marker of a group that this rank is not in."""
    return group is GroupMember.NON_GROUP_MEMBER


def _get_process_group_name(group: ProcessGroup) -> str:
    """The name of a group, the same on all its ranks."""
    return group.group_name


def _resolve_process_group(group_name: str) -> ProcessGroup:
    """The group of that name that this rank is in; ValueError when there is none."""
    for made in current_world().made:
        if made.group_name == group_name:
            return made
    raise ValueError(f"Could not resolve the process group registered under the name {group_name}")


def __getattr__(name: str) -> Any:
    return getattr(_public, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(_public)})
