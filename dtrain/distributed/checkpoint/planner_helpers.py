"""Arithmetic of boxes: which stored chunks a wanted box meets, whether chunks cover a tensor.

Pure functions; nothing here knows files or ranks. Source:
torch.distributed.checkpoint.planner_helpers and resharding.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from dtrain.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from dtrain.distributed.checkpoint.planner import LoadItemType, ReadItem
from dtrain.tensor import Size


def common(first: ChunkStorageMetadata, second: ChunkStorageMetadata) -> ChunkStorageMetadata:
    """The box that two boxes share; a size of 0 where they share nothing."""
    begins, sizes = [], []
    for o1, s1, o2, s2 in zip(
        first.offsets, first.sizes, second.offsets, second.sizes, strict=True
    ):
        begins.append(max(o1, o2))
        sizes.append(max(0, min(o1 + s1, o2 + s2) - begins[-1]))
    return ChunkStorageMetadata(Size(begins), Size(sizes))


def create_read_items_for_chunk_list(
    fqn: str, checkpoint_md: TensorStorageMetadata, local_chunks: list[ChunkStorageMetadata]
) -> list[ReadItem]:
    """What to read so that `local_chunks` of the tensor are complete."""
    items = []
    for wanted, (index, stored) in itertools.product(local_chunks, enumerate(checkpoint_md.chunks)):
        shared = common(wanted, stored)
        if shared.volume:
            items.append(
                ReadItem(
                    type=LoadItemType.TENSOR,
                    dest_index=MetadataIndex(fqn, wanted.offsets),
                    dest_offsets=_minus(shared.offsets, wanted.offsets),
                    storage_index=MetadataIndex(fqn, stored.offsets, index),
                    storage_offsets=_minus(shared.offsets, stored.offsets),
                    lengths=shared.sizes,
                )
            )
    return items


def _minus(first: Sequence[int], second: Sequence[int]) -> Size:
    return Size(a - b for a, b in zip(first, second, strict=True))


def check_cover(fqn: str, size: Sequence[int], chunks: Sequence[ChunkStorageMetadata]) -> None:
    """ValueError unless the chunks cover a tensor of `size` exactly once."""
    whole = ChunkStorageMetadata(Size([0] * len(size)), Size(size))
    for chunk in chunks:
        if len(chunk.sizes) != len(size) or common(whole, chunk) != chunk:
            raise ValueError(f"{fqn}: the chunk {chunk} is not inside a tensor of {list(size)}")
    for first, second in itertools.combinations(chunks, 2):
        if common(first, second).volume:
            raise ValueError(f"{fqn}: the chunks {first} and {second} overlap")
    found = sum(chunk.volume for chunk in chunks)
    if found != math.prod(size):
        raise ValueError(
            f"{fqn}: the chunks have {found} of {math.prod(size)} elements of {list(size)}; "
            "are all ranks of its mesh in the process group of the call?"
        )
