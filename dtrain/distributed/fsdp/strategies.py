"""From a sharding strategy and the groups a user names to the mesh that the engine divides over.

Every strategy is one mesh: 1-D, whose ranks share; or 2-D, whose second dimension shares and whose
first replicates. Without sharding the second has one rank. Source: torch.distributed.fsdp.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dtrain.distributed.device_mesh import DeviceMesh
from dtrain.distributed.fsdp.api import ShardingStrategy
from dtrain.distributed.objects import all_gather_object
from dtrain.distributed.world import ProcessGroup, resolve
from dtrain.env import local_world_size

HYBRID = (ShardingStrategy.HYBRID_SHARD, ShardingStrategy._HYBRID_SHARD_ZERO2)
_STAYS_WHOLE = (
    ShardingStrategy.SHARD_GRAD_OP,
    ShardingStrategy._HYBRID_SHARD_ZERO2,
    ShardingStrategy.NO_SHARD,
)


def reshard_after_forward(strategy: ShardingStrategy) -> bool | None:
    """Whether whole parameters are given back after forward; None: not those of the root."""
    return False if strategy in _STAYS_WHOLE else None


def mesh_for(
    strategy: ShardingStrategy, process_group: Any, device_mesh: DeviceMesh | None
) -> DeviceMesh:
    """The mesh of a wrapper. ValueError for a group, or a mesh, that does not go with `strategy`.

    Waits for all ranks when a hybrid mesh is made of two groups.
    """
    if process_group is not None and device_mesh is not None:
        raise ValueError(
            "Cannot pass both process_group and device_mesh at the same time. Please just pass only"
            " one of them."
        )
    if strategy in HYBRID:
        return _hybrid(strategy, process_group, device_mesh)
    if isinstance(process_group, tuple) or (device_mesh is not None and device_mesh.ndim != 1):
        given = "a tuple of groups" if device_mesh is None else f"a mesh of {device_mesh.shape}"
        raise ValueError(f"{strategy.name} takes one group, or a 1-D mesh; got {given}")
    if device_mesh is None:
        device_mesh = DeviceMesh.from_group(resolve(process_group), "cpu")
    if strategy is ShardingStrategy.NO_SHARD:
        return DeviceMesh("cpu", device_mesh.ranks.reshape(-1, 1))
    return device_mesh


def _hybrid(strategy: ShardingStrategy, groups: Any, device_mesh: DeviceMesh | None) -> DeviceMesh:
    if device_mesh is not None:
        if device_mesh.ndim != 2:
            raise ValueError(f"{strategy.name} takes a 2-D mesh, got one of {device_mesh.shape}")
        return device_mesh
    if groups is None:
        return _hosts_and_ranks()
    if not (isinstance(groups, tuple) and len(groups) == 2):
        raise ValueError(
            f"Expected process_group to be passed in as either None or a tuple of two groups for "
            f"{strategy.name}: those who share, and those who replicate; got {groups!r}"
        )
    share, replicate = groups
    rows: list[Any] = [None] * replicate.size()
    all_gather_object(rows, list(share.ranks), group=replicate)
    return DeviceMesh.from_group([replicate, share], "cpu", mesh=np.array(rows, np.int32))


def _hosts_and_ranks() -> DeviceMesh:
    """All ranks: those of a host, as the launcher says, share."""
    world: ProcessGroup = resolve(None)
    local = local_world_size() or world.size()
    if world.size() % local:
        raise ValueError(
            f"hybrid sharding over {world.size()} ranks, {local} on this host: hosts need equal "
            "numbers of ranks; give a device_mesh"
        )
    return DeviceMesh("cpu", np.array(world.ranks, np.int32).reshape(-1, local))
