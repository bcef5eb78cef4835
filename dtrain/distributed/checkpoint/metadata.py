"""What a checkpoint contains, as data: tensors with their chunks, and values.

A tensor is a set of chunks, boxes that cover it exactly once; how many ranks wrote them appears
nowhere. `MetadataIndex` names one chunk of one tensor. Source:
torch.distributed.checkpoint.metadata.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

from dtrain import dtypes
from dtrain.tensor import Size


@dataclass(frozen=True)
class ChunkStorageMetadata:
    """A box of a tensor: where it begins, and its shape."""

    offsets: Size
    sizes: Size

    @property
    def volume(self) -> int:
        """How many elements it has."""
        return math.prod(self.sizes)

    def __str__(self) -> str:
        ends = zip(self.offsets, self.sizes, strict=True)
        return "[" + ", ".join(f"{o}:{o + s}" for o, s in ends) + "]"


@dataclass(frozen=True)
class TensorProperties:
    """The dtype. torch's layout, memory format and pinning have one value each here."""

    dtype: dtypes.dtype
    requires_grad: bool = False

    @staticmethod
    def create_from_tensor(tensor: Any) -> TensorProperties:
        """Those of a tensor."""
        return TensorProperties(tensor.dtype, tensor.requires_grad)


@dataclass(frozen=True)
class TensorStorageMetadata:
    """A tensor: its properties, the shape of the whole, its chunks."""

    properties: TensorProperties
    size: Size
    chunks: list[ChunkStorageMetadata]


@dataclass(frozen=True)
class BytesStorageMetadata:
    """A value that is no tensor: JSON, in the manifest."""


STORAGE_TYPES = TensorStorageMetadata | BytesStorageMetadata


@dataclass(frozen=True)
class MetadataIndex:
    """A chunk of a tensor by its offset, or a value (no offset). `index` is only a hint."""

    fqn: str
    offset: Size | None = None
    index: int | None = field(default=None, compare=False)

    def __init__(
        self, fqn: str, offset: Sequence[int] | None = None, index: int | None = None
    ) -> None:
        object.__setattr__(self, "fqn", fqn)
        object.__setattr__(self, "offset", None if offset is None else Size(offset))
        object.__setattr__(self, "index", index)


@dataclass
class StorageMeta:
    """Which checkpoint, and names for one save and one load of it."""

    checkpoint_id: str | PathLike[str] | None = None
    save_id: str | None = None
    load_id: str | None = None
    modules: list[str] = field(default_factory=list)


@dataclass
class Metadata:
    """A whole checkpoint: what is in it, and for its reader where.

    `planner_data`: {flat key: path in the nested state dict}. `storage_data` is the storage's.
    """

    state_dict_metadata: dict[str, STORAGE_TYPES]
    planner_data: Any = None
    storage_data: Any = None
    storage_meta: StorageMeta | None = None
    version: str | None = None
