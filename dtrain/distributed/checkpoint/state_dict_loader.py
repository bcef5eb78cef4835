"""load: a checkpoint of any number of ranks into the state dict of this one, in place.

Every rank of the group calls it. Before anything is changed, the ranks verify every byte of the
checkpoint (each its share of the files) and plan; a checkpoint that is damaged gives way to the
one before it, with a warning. What then fails (the disk, while reading) leaves a state dict that
is partly loaded, on all ranks an error, and is to be loaded again. Cost: all bytes read once
among the ranks, then each rank's own once more, as a rule from the page cache; 5 exchanges.
Source: torch.distributed.checkpoint.state_dict_loader.
"""

from __future__ import annotations

import warnings
from collections.abc import MutableMapping
from typing import Any

from dtrain.distributed.checkpoint._together import Together
from dtrain.distributed.checkpoint.api import CheckpointException, DamagedCheckpoint
from dtrain.distributed.checkpoint.default_planner import DefaultLoadPlanner
from dtrain.distributed.checkpoint.filesystem import FileSystemReader
from dtrain.distributed.checkpoint.metadata import Metadata
from dtrain.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from dtrain.distributed.checkpoint.stateful import Stateful
from dtrain.distributed.checkpoint.storage import CheckpointId, StorageReader


def load(
    state_dict: MutableMapping[str, Any],
    *,
    checkpoint_id: CheckpointId = None,
    storage_reader: StorageReader | None = None,
    planner: LoadPlanner | None = None,
    process_group: Any = None,
    no_dist: bool = False,
) -> None:
    """Fill the tensors of a nested state dict in place, replace its values, load Stateful objects.

    Only what `state_dict` has is loaded; what the checkpoint does not have is an error. A Stateful
    object is asked for its state, which is filled and handed to its `load_state_dict`. Tensors may
    be cut otherwise than they were saved. Blocks until all ranks have loaded.
    CheckpointException, on all ranks, whose `failures` are DamagedCheckpoint (missing, truncated,
    changed files, none before it that is whole), RuntimeError (another model) or OSError.
    """
    ranks = Together(process_group, no_dist)
    if storage_reader is None:
        if checkpoint_id is None:
            raise RuntimeError(
                "`checkpoint_id` must be specified if storage_reader is not specified."
            )
        storage_reader = FileSystemReader(checkpoint_id)
    storage_reader.reset(checkpoint_id)
    _run_load(ranks, state_dict, storage_reader, planner or DefaultLoadPlanner())


def load_state_dict(
    state_dict: MutableMapping[str, Any],
    storage_reader: StorageReader,
    process_group: Any = None,
    coordinator_rank: int = 0,
    no_dist: bool = False,
    planner: LoadPlanner | None = None,
) -> None:
    """`load` under its old name; `coordinator_rank` of the group reads the manifest."""
    storage_reader.reset()
    ranks = Together(process_group, no_dist, coordinator_rank)
    _run_load(ranks, state_dict, storage_reader, planner or DefaultLoadPlanner())


def _run_load(
    ranks: Together,
    state_dict: MutableMapping[str, Any],
    reader: StorageReader,
    planner: LoadPlanner,
) -> None:
    stated: dict[str, Any] = {}
    metadata = verified(ranks, reader)

    def propose() -> LoadPlan:
        for key, value in state_dict.items():
            stated[key] = value.state_dict() if isinstance(value, Stateful) else value
        planner.set_up_planner(stated, metadata, ranks.is_coordinator)
        return reader.prepare_local_plan(planner.create_local_plan())

    def read() -> None:
        reader.read_data(planner.finish_plan(plans[ranks.rank]), planner).wait()
        for key, value in state_dict.items():
            if isinstance(value, Stateful):
                value.load_state_dict(stated[key])
            else:
                state_dict[key] = stated[key]

    proposed = ranks.each("planning to load", propose)
    plans = ranks.first(
        "planning to load",
        lambda: reader.prepare_global_plan(planner.create_global_plan(proposed)),
    )
    ranks.each("reading the checkpoint", read)


def verified(ranks: Together, reader: StorageReader) -> Metadata:
    """The content of the checkpoint, or of the newest undamaged one before it; all verified."""
    damage: list[CheckpointException] = []
    older: list[str] = []
    while True:
        try:
            metadata = ranks.first("reading the manifest", reader.read_metadata)
            reader.set_up_storage_reader(metadata, ranks.is_coordinator)
            ranks.each("verifying the checkpoint", lambda: reader.verify(ranks.rank, ranks.size))
        except CheckpointException as error:
            if not all(isinstance(e, DamagedCheckpoint) for e, _ in error.failures.values()):
                raise
            if not damage:
                older = ranks.first("looking for older ones", lambda: list(reader.older()))
            damage.append(error)
            if not older:
                raise damage[0] from damage[-1]
            reader.reset(older.pop(0))
            continue
        if damage and ranks.is_coordinator:
            where = getattr(reader, "checkpoint_id", "an older one")
            warnings.warn(
                f"loading the checkpoint {where} instead, because newer ones are damaged:\n  "
                + "\n  ".join(map(str, damage)),
                stacklevel=5,
            )
        return metadata
