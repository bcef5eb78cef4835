"""save: a state dict of all ranks as one checkpoint, complete or not at all.

Every rank of the group calls it. It returns on all ranks when the checkpoint has its name and is
on the disk, or raises on all of them the same CheckpointException; then nothing is left behind and
an earlier checkpoint is as it was. Cost: 4 exchanges of plans and results, each rank's own bytes
once to the disk. Source: torch.distributed.checkpoint.state_dict_saver.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dtrain.distributed.checkpoint._together import Together
from dtrain.distributed.checkpoint.default_planner import DefaultSavePlanner
from dtrain.distributed.checkpoint.filesystem import FileSystemWriter
from dtrain.distributed.checkpoint.metadata import Metadata
from dtrain.distributed.checkpoint.planner import SavePlan, SavePlanner
from dtrain.distributed.checkpoint.stateful import Stateful
from dtrain.distributed.checkpoint.storage import CheckpointId, StorageWriter, WriteResult


def save(
    state_dict: Mapping[str, Any],
    *,
    checkpoint_id: CheckpointId = None,
    storage_writer: StorageWriter | None = None,
    planner: SavePlanner | None = None,
    process_group: Any = None,
    no_dist: bool = False,
    use_collectives: bool = True,
) -> Metadata:
    """Save a nested state dict: tensors, DTensors, arrays, JSON values, and Stateful objects.

    `checkpoint_id`: the folder, unless `storage_writer` has one. A DTensor's parts are written by
    the ranks that have them; plain tensors and values, which are the same everywhere, by one.
    `no_dist`: this rank alone, also in a job. Blocks until the disk has everything and all ranks
    know. CheckpointException, on all ranks. `use_collectives` is accepted and changes nothing.
    """
    ranks = Together(process_group, no_dist)
    writer = writer_for(storage_writer, checkpoint_id)
    return run_save(ranks, state_dict, writer, planner or DefaultSavePlanner())


def save_state_dict(
    state_dict: Mapping[str, Any],
    storage_writer: StorageWriter,
    process_group: Any = None,
    coordinator_rank: int = 0,
    no_dist: bool = False,
    planner: SavePlanner | None = None,
) -> Metadata:
    """`save` under its old name; `coordinator_rank` of the group writes the manifest."""
    storage_writer.reset()
    ranks = Together(process_group, no_dist, coordinator_rank)
    return run_save(ranks, state_dict, storage_writer, planner or DefaultSavePlanner())


def writer_for(writer: StorageWriter | None, checkpoint_id: CheckpointId) -> StorageWriter:
    """The writer given, at `checkpoint_id` if given; or one of folders."""
    if writer is None:
        if checkpoint_id is None:
            raise RuntimeError(
                "`checkpoint_id` must be specified if storage_writer is not specified."
            )
        writer = FileSystemWriter(checkpoint_id)
    writer.reset(checkpoint_id)
    return writer


def run_save(
    ranks: Together, state_dict: Mapping[str, Any], writer: StorageWriter, planner: SavePlanner
) -> Metadata:
    """What `save` does, step by step; in each, a failing rank fails all."""

    def propose() -> SavePlan:
        stated = {
            k: v.state_dict() if isinstance(v, Stateful) else v for k, v in state_dict.items()
        }
        planner.set_up_planner(stated, writer.storage_meta(), ranks.is_coordinator)
        writer.set_up_storage_writer(ranks.is_coordinator)
        return writer.prepare_local_plan(planner.create_local_plan())

    def settle() -> tuple[list[SavePlan], Metadata]:
        plans, metadata = planner.create_global_plan(proposed)
        return writer.prepare_global_plan(plans), metadata

    def write() -> list[WriteResult]:
        return writer.write_data(planner.finish_plan(plans[ranks.rank]), planner).wait()

    try:
        proposed = ranks.each("planning to save", propose)
        plans, metadata = ranks.first("planning to save", settle)
        results = ranks.each("writing the checkpoint", write)
        ranks.first("publishing the checkpoint", lambda: writer.finish(metadata, results))
    except BaseException:  # a rank that failed, or is gone
        if ranks.is_coordinator:
            writer.give_up()
        raise
    return metadata
