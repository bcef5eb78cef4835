"""Plans: which rank writes or reads which pieces; and planners, which make them.

A planner knows the state dict, a storage knows files, and plans are what they tell each other.
Plans travel between ranks as plain data, so what a planner or storage of one's own puts into
`planner_data` and `storage_data` must be plain too. Source: torch.distributed.checkpoint.planner.
"""

from __future__ import annotations

import abc
import io
import math
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from dtrain.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
)
from dtrain.tensor import Size, Tensor


class WriteItemType(Enum):
    """A whole tensor, a part of one, or a value."""

    TENSOR = auto()
    SHARD = auto()
    BYTE_IO = auto()


class LoadItemType(Enum):
    """A tensor, or a value."""

    TENSOR = auto()
    BYTE_IO = auto()


@dataclass(frozen=True)
class BytesIOWriteData:
    """How many bytes a value has as JSON."""

    nbytes: int


@dataclass(frozen=True)
class TensorWriteData:
    """The box that is written, the dtype, and the shape of the whole tensor."""

    chunk: ChunkStorageMetadata
    properties: TensorProperties
    size: Size


@dataclass(frozen=True)
class WriteItem:
    """One thing to write."""

    index: MetadataIndex
    type: WriteItemType
    bytes_io_data: BytesIOWriteData | None = None
    tensor_data: TensorWriteData | None = None

    def tensor_storage_size(self) -> int | None:
        """Bytes of the tensor's piece, None for a value."""
        if self.tensor_data is None:
            return None
        return math.prod(self.tensor_data.chunk.sizes) * self.tensor_data.properties.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of it, tensor or value."""
        value = 0 if self.bytes_io_data is None else self.bytes_io_data.nbytes
        return self.tensor_storage_size() or value


@dataclass(frozen=True)
class ReadItem:
    """One piece to read: `lengths` elements from an offset in a stored chunk to one in ours."""

    type: LoadItemType
    dest_index: MetadataIndex
    dest_offsets: Size
    storage_index: MetadataIndex
    storage_offsets: Size
    lengths: Size


@dataclass(frozen=True)
class SavePlan:
    """What one rank writes."""

    items: list[WriteItem]
    storage_data: Any = None
    planner_data: Any = None


@dataclass(frozen=True)
class LoadPlan:
    """What one rank reads."""

    items: list[ReadItem]
    storage_data: Any = None
    planner_data: Any = None


class SavePlanner(abc.ABC):
    """Decides what is written. `create_global_plan` runs on the coordinator only."""

    @abc.abstractmethod
    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        storage_meta: StorageMeta | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Take the state dict to be saved."""

    @abc.abstractmethod
    def create_local_plan(self) -> SavePlan:
        """What this rank could write."""

    @abc.abstractmethod
    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """What each rank does write, and what the checkpoint then contains."""

    @abc.abstractmethod
    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """Take the plan that came from the coordinator."""

    @abc.abstractmethod
    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        """The tensor, which shares memory, or the JSON bytes of a value."""


class LoadPlanner(abc.ABC):
    """Decides what is read, and where it goes."""

    @abc.abstractmethod
    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Take the state dict to be filled, and what the checkpoint contains."""

    @abc.abstractmethod
    def create_local_plan(self) -> LoadPlan:
        """What this rank wants to read; raises when the checkpoint does not have it."""

    @abc.abstractmethod
    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """All ranks' plans, on the coordinator."""

    @abc.abstractmethod
    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        """Take the plan that came from the coordinator."""

    @abc.abstractmethod
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Take a value's JSON bytes."""

    @abc.abstractmethod
    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """The tensor into which the piece is read: a view of the state dict's, of its lengths."""

    @abc.abstractmethod
    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """The tensor of `resolve_tensor` is filled."""
