"""save and async_save: a state dict of all ranks as one checkpoint, complete or not at all.

Every rank of the group calls it. `save` returns on all ranks when the checkpoint has its name and
is on the disk, or raises on all of them the same CheckpointException; then nothing is left behind
and an earlier checkpoint is as it was. Cost: 4 exchanges of plans and results, each rank's own
bytes once to the disk. `async_save` copies the state and does the same in a thread, over a group of
its own, so that its calls never stand between training's; a failure is in the Future, and in the
log, should nobody look there. Source: torch.distributed.checkpoint.state_dict_saver.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass
from enum import Enum
from typing import Any
from weakref import WeakKeyDictionary

from dtrain.distributed.checkpoint._together import Together
from dtrain.distributed.checkpoint.default_planner import DefaultSavePlanner
from dtrain.distributed.checkpoint.filesystem import FileSystemWriter
from dtrain.distributed.checkpoint.metadata import Metadata
from dtrain.distributed.checkpoint.planner import SavePlan, SavePlanner
from dtrain.distributed.checkpoint.staging import (
    AsyncStager,
    DefaultStager,
    StagingOptions,
    in_background,
)
from dtrain.distributed.checkpoint.stateful import Stateful
from dtrain.distributed.checkpoint.storage import CheckpointId, StorageWriter, WriteResult
from dtrain.distributed.groups import is_initialized, new_group
from dtrain.distributed.world import ProcessGroup, resolve

_log = logging.getLogger("dtrain.distributed")


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
    writer = _writer_for(storage_writer, checkpoint_id)
    return _run_save(ranks, lambda: _stated(state_dict), writer, planner)


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
    return _run_save(ranks, lambda: _stated(state_dict), storage_writer, planner)


def _writer_for(writer: StorageWriter | None, checkpoint_id: CheckpointId) -> StorageWriter:
    """The writer given, at `checkpoint_id` if given; or one of folders."""
    if writer is None:
        if checkpoint_id is None:
            raise RuntimeError(
                "`checkpoint_id` must be specified if storage_writer is not specified."
            )
        writer = FileSystemWriter(checkpoint_id)
    writer.reset(checkpoint_id)
    return writer


def _stated(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v.state_dict() if isinstance(v, Stateful) else v for k, v in state_dict.items()}


def _run_save(
    ranks: Together,
    state: Callable[[], dict[str, Any]],
    writer: StorageWriter,
    planner: SavePlanner | None,
) -> Metadata:
    """What `save` does, step by step; in each, a failing rank fails all."""
    planner = planner or DefaultSavePlanner()

    def propose() -> SavePlan:
        planner.set_up_planner(state(), writer.storage_meta(), ranks.is_coordinator)
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


# --- in the background ---


class AsyncCheckpointerType(Enum):
    """torch's kinds. Both are accepted; it is a thread: writing and hashing leave the GIL."""

    THREAD = "thread"
    PROCESS = "process"


@dataclass
class AsyncSaveResponse:
    """`staging_completion`: the state may change again; `upload_completion`: it is on the disk."""

    staging_completion: Future[None]
    upload_completion: Future[Metadata]


class _Lane:
    """What one group's background saves have in common."""

    def __init__(self, group: ProcessGroup | None) -> None:
        self.group = group
        self.last: Future[Metadata] | None = None


_alone = _Lane(None)
_lanes: WeakKeyDictionary[ProcessGroup, _Lane] = WeakKeyDictionary()


def _lane_of(process_group: Any, no_dist: bool) -> _Lane:
    if no_dist or not is_initialized():
        return _alone
    group = resolve(process_group)
    if group not in _lanes:
        _lanes[group] = _Lane(new_group(group.ranks, sort_ranks=False, group_desc="checkpoints"))
    return _lanes[group]


def async_save(
    state_dict: Mapping[str, Any],
    *,
    checkpoint_id: CheckpointId = None,
    storage_writer: StorageWriter | None = None,
    planner: SavePlanner | None = None,
    process_group: Any = None,
    async_checkpointer_type: AsyncCheckpointerType = AsyncCheckpointerType.THREAD,
    async_stager: AsyncStager | None = None,
    no_dist: bool = False,
    use_collectives: bool = True,
) -> Future[Metadata] | AsyncSaveResponse:
    """`save`, whose larger part happens while training goes on; all ranks call it.

    By default the state is copied before it returns, so it may change at once; the Future is done
    when the checkpoint has its name and is on the disk, `result()` raises what `save` would. With
    an `async_stager` (or a `storage_writer` that is one) whose `stage` returns a Future, an
    AsyncSaveResponse says when the state may change. Waits for the save before it, if that is not
    done. The group is one over the ranks of `process_group`, made at the first call.
    `use_collectives` is accepted and changes nothing, as is `async_checkpointer_type`.
    """
    lane = _lane_of(process_group, no_dist)
    if lane.last is not None:
        wait([lane.last])
    writer = _writer_for(storage_writer, checkpoint_id)
    stager: Any = async_stager
    if stager is None:
        own = isinstance(storage_writer, AsyncStager)
        stager = storage_writer if own else DefaultStager(StagingOptions(use_async_staging=False))
    state, staging = _staged(stager, state_dict)

    def upload() -> Metadata:
        return _run_save(Together(lane.group, no_dist), state, writer, planner)

    lane.last = done = in_background(upload, "checkpoint-save")
    done.add_done_callback(lambda _: _tell(done, writer))
    if staging is not None:
        return AsyncSaveResponse(_without_value(staging), done)
    if stager.should_synchronize_after_execute:
        stager.synchronize_staging()
    return done


def _staged(
    stager: Any, state_dict: Mapping[str, Any]
) -> tuple[Callable[[], dict[str, Any]], Future[Any] | None]:
    """What gives the copy, or raises why there is none: on all ranks, when they plan the save."""
    try:
        staged = stager.stage(_stated(state_dict))
    except Exception as error:
        failed: Future[Any] = Future()
        failed.set_exception(error)
        return failed.result, None
    return (staged.result, staged) if isinstance(staged, Future) else (lambda: staged, None)


def _tell(done: Future[Metadata], writer: StorageWriter) -> None:
    error = done.exception()
    if error is not None:
        where = getattr(writer, "checkpoint_id", "a checkpoint")
        _log.error("async_save of %s failed: %s", where, error)


def _without_value(future: Future[Any]) -> Future[None]:
    told: Future[None] = Future()

    def tell(_: Future[Any]) -> None:
        error = future.exception()
        if error is None:
            told.set_result(None)
        else:
            told.set_exception(error)

    future.add_done_callback(tell)
    return told
