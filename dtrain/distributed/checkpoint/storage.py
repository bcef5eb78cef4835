"""StorageWriter and StorageReader: what a place for checkpoints must do.

`save` and `load` call the methods in the order in which they stand here. Failures of any rank
reach all ranks, as one CheckpointException. Source: torch.distributed.checkpoint.storage.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

from dtrain.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from dtrain.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from dtrain.futures import Future

CheckpointId = str | PathLike[str] | None


@dataclass(frozen=True)
class WriteResult:
    """What was written: which piece, its bytes, and what the storage wants to know of it."""

    index: MetadataIndex
    size_in_bytes: int
    storage_data: Any


class StorageWriter(abc.ABC):
    """Writes checkpoints somewhere."""

    @abc.abstractmethod
    def reset(self, checkpoint_id: CheckpointId = None) -> None:
        """A new save begins; `checkpoint_id` says where, None where the last one was."""

    @abc.abstractmethod
    def set_up_storage_writer(self, is_coordinator: bool) -> None:
        """On every rank, before the plans."""

    @abc.abstractmethod
    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """On every rank: change its plan."""

    @abc.abstractmethod
    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On the coordinator: change all plans."""

    @abc.abstractmethod
    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """On every rank: write its items."""

    @abc.abstractmethod
    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the coordinator: everything is written; make it a checkpoint."""

    def give_up(self) -> None:  # noqa: B027  # nothing to do is a fine answer
        """On the coordinator: a rank failed; take away what was written. Not in torch."""

    def storage_meta(self) -> StorageMeta | None:
        """Told to planners."""
        return None


class StorageReader(abc.ABC):
    """Reads checkpoints from somewhere."""

    @abc.abstractmethod
    def reset(self, checkpoint_id: CheckpointId = None) -> None:
        """A new load begins; `checkpoint_id` says from where, None from where the last one was."""

    @abc.abstractmethod
    def read_metadata(self) -> Metadata:
        """On the coordinator: what the checkpoint contains."""

    @abc.abstractmethod
    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool) -> None:
        """On every rank, before the plans."""

    def verify(self, rank: int, size: int) -> None:  # noqa: B027  # storages may have no digests
        """Rank `rank` of `size` checks its share; DamagedCheckpoint. Not in torch."""

    def older(self) -> Sequence[str]:
        """On the coordinator: checkpoints to fall back to, newest first. Not in torch."""
        return ()

    @abc.abstractmethod
    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """On every rank: change its plan."""

    @abc.abstractmethod
    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """On the coordinator: change all plans."""

    @abc.abstractmethod
    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """On every rank: read its items into what the planner gives."""
