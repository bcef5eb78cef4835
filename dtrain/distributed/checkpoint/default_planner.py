"""The planners that `save` and `load` use: every chunk once, wherever it lies.

Saving: a tensor that several ranks have (a plain one, or a replicated DTensor) is taken to be equal
on them. A large one is written by the rank with least to write, a small one by the lowest: the
running statistics of a batch norm, which DDP takes from rank 0, are rank 0's. Values must be equal:
what differs belongs under a key with the rank in it. Loading: each rank reads the boxes it has,
from whatever chunks there are. Source: torch.distributed.checkpoint.default_planner.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from difflib import get_close_matches
from hashlib import sha256
from typing import Any

import numpy as np

from dtrain import dtypes
from dtrain.autograd.node import make
from dtrain.autograd.value import need_whole
from dtrain.distributed.checkpoint._nested_dict import (
    Path,
    flatten_state_dict,
    is_tensor,
    set_element,
)
from dtrain.distributed.checkpoint._values import dumped, from_json
from dtrain.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from dtrain.distributed.checkpoint.planner import (
    BytesIOWriteData,
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from dtrain.distributed.checkpoint.planner_helpers import (
    check_cover,
    create_read_items_for_chunk_list,
)
from dtrain.distributed.tensor import DTensor
from dtrain.ops.inplace import bump
from dtrain.tensor import Size, Tensor

# Bytes from which pieces that several ranks have are shared out among them.
_LARGE = 1 << 20


def whole_shape(tensor: Any) -> Size:
    """The shape of a tensor, of the whole one for a DTensor."""
    return Size(tensor.shape)


def own_chunk(fqn: str, tensor: Any) -> ChunkStorageMetadata | None:
    """The box of the tensor that this rank has; None where that is nothing."""
    if not isinstance(tensor, DTensor):
        return ChunkStorageMetadata(Size([0] * tensor.ndim), Size(tensor.shape))
    spec = tensor._spec
    if 0 in spec.shape:  # no rank has anything of it, so each may say so
        return ChunkStorageMetadata(Size([0] * len(spec.shape)), Size(spec.shape))
    if spec.is_partial:
        raise RuntimeError(
            f"{fqn} has contributions that are not combined yet ({spec}): redistribute it first"
        )
    if spec.mesh.get_coordinate() is None:
        return None
    return ChunkStorageMetadata(*map(Size, spec.box))


def array_of(tensor: Any) -> Any:
    """The memory of a tensor on this rank. NotImplementedError where it has no values."""
    if isinstance(tensor, Tensor) and tensor.is_meta:
        need_whole("a checkpoint", tensor)
    return tensor._data if isinstance(tensor, Tensor) else tensor


def _properties(tensor: Any) -> TensorProperties:
    gradient = isinstance(tensor, Tensor) and tensor.requires_grad
    return TensorProperties(dtypes.from_numpy(array_of(tensor).dtype), gradient)


def _written(fqn: str, leaf: Any) -> WriteItem | None:
    """What this rank could write of a leaf."""
    if not is_tensor(leaf):
        size = BytesIOWriteData(len(dumped(leaf, fqn)))
        return WriteItem(MetadataIndex(fqn), WriteItemType.BYTE_IO, bytes_io_data=size)
    chunk, whole = own_chunk(fqn, leaf), whole_shape(leaf)
    if chunk is None or (chunk.volume == 0 and chunk.sizes != whole):
        return None
    kind = WriteItemType.SHARD if isinstance(leaf, DTensor) else WriteItemType.TENSOR
    data = TensorWriteData(chunk, _properties(leaf), whole)
    return WriteItem(MetadataIndex(fqn, chunk.offsets), kind, tensor_data=data)


def create_default_local_save_plan(
    state_dict: Mapping[str, Any], is_coordinator: bool = False
) -> SavePlan:
    """All that this rank has of a flat state dict. TypeError names a value that JSON does not know.

    Every rank proposes what it has, values too; `create_default_global_save_plan` chooses.
    """
    found = (_written(fqn, leaf) for fqn, leaf in state_dict.items())
    return SavePlan([item for item in found if item is not None])


def create_default_global_save_plan(
    all_plans: list[SavePlan], rewrite_index_hints: bool = True, lowest: bool = False
) -> tuple[list[SavePlan], Metadata]:
    """Each piece once, and what all of them are together.

    ValueError when ranks disagree about a tensor, or its pieces do not cover it exactly once.
    """
    plans = _without_copies(all_plans, lowest)
    content: dict[str, STORAGE_TYPES] = {}
    for plan in plans:
        for item in plan.items:
            _add(content, item)
    for fqn, entry in content.items():
        if isinstance(entry, TensorStorageMetadata):
            check_cover(fqn, entry.size, entry.chunks)
    return plans, Metadata(content)


def _add(content: dict[str, STORAGE_TYPES], item: WriteItem) -> None:
    fqn, data = item.index.fqn, item.tensor_data
    if data is None:
        content[fqn] = BytesStorageMetadata()
        return
    entry = content.setdefault(fqn, TensorStorageMetadata(data.properties, data.size, []))
    same = isinstance(entry, TensorStorageMetadata) and entry.size == data.size
    if not same or entry.properties.dtype is not data.properties.dtype:  # type: ignore[union-attr]
        raise ValueError(
            f"{fqn}: ranks have different things under this name: "
            f"{data.properties.dtype} {list(data.size)} and {entry}"
        )
    entry.chunks.append(data.chunk)  # type: ignore[union-attr]


def _without_copies(plans: list[SavePlan], lowest: bool) -> list[SavePlan]:
    """The plans with each piece in one of them: the lowest rank's, or if large the least busy's."""
    holders: dict[MetadataIndex, list[int]] = {}
    items: dict[tuple[int, MetadataIndex], WriteItem] = {}
    for rank, plan in enumerate(plans):
        for item in plan.items:
            holders.setdefault(item.index, []).append(rank)
            items[rank, item.index] = item
    kept: list[list[WriteItem]] = [[] for _ in plans]
    loads = [0] * len(plans)
    for index, ranks in sorted(holders.items(), key=lambda pair: len(pair[1]) > 1):
        small = items[ranks[0], index].nbytes < _LARGE
        rank = ranks[0] if lowest or small else min(ranks, key=loads.__getitem__)
        kept[rank].append(items[rank, index])
        loads[rank] += items[rank, index].nbytes
    return [SavePlan(kept[r], p.storage_data, p.planner_data) for r, p in enumerate(plans)]


class DefaultSavePlanner(SavePlanner):
    """Saves a nested state dict of tensors, DTensors, arrays and JSON values.

    `flatten_state_dict=False` takes dicts and lists with tensors in them for errors.
    `dedup_save_to_lowest_rank`: large pieces that several ranks have are written by the lowest one
    too, instead of the one with least to write. Accepted and ignored: `flatten_sharded_tensors`,
    `dedup_replicated_tensors` (always), `enable_plan_caching`.
    """

    def __init__(
        self,
        flatten_state_dict: bool = True,
        flatten_sharded_tensors: bool = True,
        dedup_replicated_tensors: bool | None = None,
        dedup_save_to_lowest_rank: bool = False,
        enable_plan_caching: bool = False,
    ) -> None:
        self.flatten_state_dict = flatten_state_dict
        self.dedup_save_to_lowest_rank = dedup_save_to_lowest_rank
        self.state_dict: dict[str, Any] = {}
        self.mappings: dict[str, Path] = {}

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        storage_meta: StorageMeta | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Take the state dict, flat from here on."""
        self.state_dict, self.mappings = _flat(state_dict, self.flatten_state_dict)
        self.is_coordinator = is_coordinator

    def create_local_plan(self) -> SavePlan:
        """All that this rank has, with a digest of each value."""
        plan = create_default_local_save_plan(self.state_dict, self.is_coordinator)
        values = {
            i.index.fqn: sha256(self.resolve_data(i).read()).hexdigest()  # type: ignore[union-attr]
            for i in plan.items
            if i.type is WriteItemType.BYTE_IO
        }
        return SavePlan(plan.items, planner_data=(self.mappings, values))

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Each piece on one rank. ValueError when ranks have different values under one name."""
        mappings: dict[str, Path] = {}
        values: dict[str, tuple[int, str]] = {}
        for rank, plan in enumerate(all_plans):
            mappings.update(plan.planner_data[0])
            for fqn, digest in plan.planner_data[1].items():
                first, other = values.setdefault(fqn, (rank, digest))
                if other != digest:
                    raise ValueError(
                        f"{fqn} has different values on ranks {first} and {rank}, and only one "
                        f"would be saved: put the rank into its key, as in '{fqn}.{rank}'"
                    )
        lowest = self.dedup_save_to_lowest_rank
        plans, metadata = create_default_global_save_plan(all_plans, lowest=lowest)
        metadata.planner_data = mappings
        return plans, metadata

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """As it is."""
        return new_plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        """The leaf of the state dict."""
        return self.state_dict[index.fqn]

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        """What is written for a leaf: this rank's part, or the JSON text."""
        if write_item.type is WriteItemType.BYTE_IO:
            return io.BytesIO(dumped(object, write_item.index.fqn))
        return make(array_of(object))

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        """This rank's part of a tensor, sharing memory, or a value's JSON text."""
        found = self.transform_object(write_item, self.lookup_object(write_item.index))
        return found  # type: ignore[no-any-return]


def _flat(state_dict: dict[str, Any], flatten: bool) -> tuple[dict[str, Any], dict[str, Path]]:
    if flatten:
        return flatten_state_dict(state_dict)
    return dict(state_dict), {key: (key,) for key in state_dict}


def create_default_local_load_plan(
    state_dict: Mapping[str, Any], metadata: Metadata, strict: bool = True
) -> LoadPlan:
    """What to read for a flat state dict.

    RuntimeError names everything that the checkpoint does not have (unless not `strict`), or has
    in another shape or kind. What the checkpoint has besides is left alone, as in torch.
    """
    items: list[ReadItem] = []
    wrong: list[str] = []
    for fqn, leaf in state_dict.items():
        stored = metadata.state_dict_metadata.get(fqn)
        complaint = _complaint(fqn, leaf, stored, metadata.state_dict_metadata)
        if complaint and (strict or stored is not None):
            wrong.append(complaint)
        elif isinstance(stored, TensorStorageMetadata):
            chunk = own_chunk(fqn, leaf)
            if chunk is not None:
                items += create_read_items_for_chunk_list(fqn, stored, [chunk])
        elif stored is not None:
            index = MetadataIndex(fqn)
            zero = Size([0])
            items.append(ReadItem(LoadItemType.BYTE_IO, index, zero, index, zero, zero))
    if wrong:
        shown = [*wrong[:20], *([f"... and {len(wrong) - 20} more"] if len(wrong) > 20 else [])]
        raise RuntimeError("the checkpoint is of another state dict:\n    " + "\n    ".join(shown))
    return LoadPlan(items)


def _complaint(fqn: str, leaf: Any, stored: Any, content: Mapping[str, Any]) -> str:
    """Why a leaf cannot be loaded; empty when it can."""
    if stored is None:
        near = get_close_matches(fqn, content, 1)
        return f"Missing key in checkpoint state_dict: {fqn}" + (
            f" (it has {near[0]})" if near else ""
        )
    if is_tensor(leaf) != isinstance(stored, TensorStorageMetadata):
        kinds = ("a value", "a tensor")
        return f"{fqn} is {kinds[is_tensor(leaf)]}, in the checkpoint {kinds[not is_tensor(leaf)]}"
    if not is_tensor(leaf):
        return ""
    if whole_shape(leaf) != stored.size:
        return (
            f"Size mismatch between saved {list(stored.size)} and current: "
            f"{list(whole_shape(leaf))} for {fqn}"
        )
    saved, own = stored.properties.dtype.numpy, array_of(leaf).dtype
    if not np.can_cast(saved, own, "same_kind") and "bfloat16" not in (saved.name, own.name):
        return f"{fqn} is {own.name}, in the checkpoint {saved.name}: values would be lost"
    if not array_of(leaf).flags.writeable:
        return f"{fqn} is read-only: loading writes into it"
    return ""


def create_default_global_load_plan(all_plans: list[LoadPlan]) -> list[LoadPlan]:
    """As they are: ranks read independently."""
    return all_plans


class DefaultLoadPlanner(LoadPlanner):
    """Fills a nested state dict in place.

    `allow_partial_load`: what the checkpoint does not have stays as it is, instead of an error.
    `flatten_sharded_tensors` is accepted and ignored.
    """

    def __init__(
        self,
        flatten_state_dict: bool = True,
        flatten_sharded_tensors: bool = True,
        allow_partial_load: bool = False,
    ) -> None:
        self.flatten_state_dict = flatten_state_dict
        self.allow_partial_load = allow_partial_load
        self.original_state_dict: dict[str, Any] = {}
        self.state_dict: dict[str, Any] = {}
        self.mappings: dict[str, Path] = {}
        self.metadata: Metadata | None = None

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Take the state dict and what the checkpoint contains."""
        self.original_state_dict, self.metadata = state_dict, metadata
        self.state_dict, self.mappings = _flat(state_dict, self.flatten_state_dict)
        self.is_coordinator = is_coordinator

    def create_local_plan(self) -> LoadPlan:
        """The boxes that this rank has, and the values."""
        assert self.metadata is not None
        strict = not self.allow_partial_load
        return create_default_local_load_plan(self.state_dict, self.metadata, strict)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """As they are."""
        return create_default_global_load_plan(global_plan)

    def finish_plan(self, new_plan: LoadPlan) -> LoadPlan:
        """As it is."""
        return new_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Put a value into its place in the state dict."""
        fqn = read_item.dest_index.fqn
        found = from_json(json.loads(value.read()))
        self.state_dict[fqn] = found
        set_element(self.original_state_dict, self.mappings[fqn], found)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """This rank's part of a tensor, sharing memory."""
        return make(array_of(self.state_dict[index.fqn]))  # type: ignore[no-any-return]

    def transform_tensor(self, read_item: ReadItem, tensor: Tensor) -> Tensor:
        """The box of this rank's part into which the piece goes."""
        pairs = zip(read_item.dest_offsets, read_item.lengths, strict=True)
        box = tuple(slice(begin, begin + n) for begin, n in pairs)
        return make(tensor._data[(*box, ...)])  # type: ignore[no-any-return]

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """Where the piece goes."""
        return self.transform_tensor(read_item, self.lookup_tensor(read_item.dest_index))

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Count the change, so that backward notices when it needed the old values."""
        changed = self.state_dict[read_item.dest_index.fqn]
        if isinstance(changed, Tensor):
            bump(changed)
