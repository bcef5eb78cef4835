"""One file of `torch.save` as a checkpoint: a rank reads it, all get their parts of its tensors.

Owns: `BroadcastingTorchSaveReader` and `DynamicMetaLoadPlanner`, which format_utils shows. Rules:
1. Only the coordinator opens the file; whole tensors travel one after the other, in an order that
it alone decides, and each rank keeps what it has of them. 2. What is wrong with the file is an
error on all ranks before the first tensor. Source: torch.distributed.checkpoint.format_utils.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dtrain import dtypes
from dtrain.comm import collectives as calls
from dtrain.distributed.checkpoint._nested_dict import flatten_state_dict, is_tensor
from dtrain.distributed.checkpoint._together import Together
from dtrain.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    array_of,
    whole_shape,
)
from dtrain.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from dtrain.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner
from dtrain.distributed.checkpoint.storage import CheckpointId, StorageReader
from dtrain.futures import Future
from dtrain.serialization import load as load_file
from dtrain.tensor import Size


def _described(tensor: Any) -> TensorStorageMetadata:
    """A tensor in one chunk."""
    shape = whole_shape(tensor)
    kind = TensorProperties(dtypes.from_numpy(array_of(tensor).dtype))
    return TensorStorageMetadata(kind, shape, [ChunkStorageMetadata(Size([0] * len(shape)), shape)])


def _no_tensor(key: str, refuser: Any) -> RuntimeError:
    return RuntimeError(
        f"Non-tensor value identified at {key}. At this time {type(refuser).__name__} only "
        "supports loading Tensors."
    )


class BroadcastingTorchSaveReader(StorageReader):
    """Reads a file of `torch.save`, on one rank of the default group, for all of them.

    `coordinator_rank`: it must be the rank that coordinates the load. Memory: the file on that
    rank, and one whole tensor on each. Tensors only; the names in it are those of the state dict,
    nested ones joined by dots. Read with `weights_only`: no code runs.
    """

    def __init__(self, checkpoint_id: CheckpointId = None, coordinator_rank: int = 0) -> None:
        self.checkpoint_id, self.coordinator_rank = checkpoint_id, coordinator_rank
        self._content: dict[str, Any] = {}
        self._agree = True

    def reset(self, checkpoint_id: CheckpointId = None) -> None:
        """Another file, if one is given."""
        self._content = {}
        if checkpoint_id is not None:
            self.checkpoint_id = checkpoint_id

    def read_metadata(self) -> Metadata:
        """The tensors of the file."""
        if self.checkpoint_id is None:
            raise ValueError("checkpoint_id must be set before reading data: the path of a file")
        flat, _ = flatten_state_dict(load_file(self.checkpoint_id))
        self._content = {name: leaf for name, leaf in flat.items() if is_tensor(leaf)}
        return Metadata({name: _described(leaf) for name, leaf in self._content.items()})

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool) -> None:
        """Keep who coordinates."""
        self._agree = is_coordinator == Together(first=self.coordinator_rank).is_coordinator

    def verify(self, rank: int, size: int) -> None:
        """AssertionError when another rank coordinates than was said; all ranks hear of it."""
        if not self._agree:
            raise AssertionError(
                f"Coordinator rank mismatch: expected {self.coordinator_rank}, on rank {rank}"
            )

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """As it is. RuntimeError for a value that is no tensor."""
        for item in plan.items:
            if item.type is LoadItemType.BYTE_IO:
                raise _no_tensor(item.storage_index.fqn, self)
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """As they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Hand each tensor that the coordinator's state dict has to all ranks, who take their part.

        CheckpointException on all ranks for one that the file does not have, or of another shape.
        """
        ranks = Together(first=self.coordinator_rank)
        listed = ranks.first("reading a file of torch.save", lambda: self._listed(planner))
        wanted: dict[str, list[Any]] = {}
        for item in plan.items:
            wanted.setdefault(item.storage_index.fqn, []).append(item)
        for name, shape, kind in listed:
            whole: Any
            if ranks.is_coordinator:
                whole = np.asarray(array_of(self._content[name]), order="C")
            else:
                whole = np.empty(tuple(shape), dtypes.BY_NAME[kind].numpy)
            ranks.issue(calls.Broadcast(whole, self.coordinator_rank))
            for item in wanted.get(name, ()):
                pairs = zip(item.storage_offsets, item.lengths, strict=True)
                box = tuple(slice(begin, begin + n) for begin, n in pairs)
                piece = whole[(*box, ...)]
                target = planner.resolve_tensor(item)
                np.copyto(target._data, piece, casting="unsafe")
                planner.commit_tensor(item, target)
        self._content = {}
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _listed(self, planner: Any) -> list[tuple[str, list[int], str]]:
        found, wrong = [], []
        for name, leaf in planner.state_dict.items():
            stored = self._content.get(name)
            if stored is None:
                if not planner.allow_partial_load:
                    wrong.append(f"it has no tensor {name}")
            elif tuple(stored.shape) != tuple(whole_shape(leaf)):
                wrong.append(f"{name} is {list(stored.shape)}, expected {list(whole_shape(leaf))}")
            else:
                dtype = dtypes.from_numpy(array_of(stored).dtype)
                found.append((name, list(stored.shape), dtype.name))
        if wrong:
            raise RuntimeError(f"{self.checkpoint_id} is of another state dict: {'; '.join(wrong)}")
        return found


class DynamicMetaLoadPlanner(DefaultLoadPlanner):
    """A planner that takes the checkpoint to contain what the state dict has, for storages that do
    not say what they contain. RuntimeError for a state dict with anything but tensors.
    """

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Take the state dict, and make the metadata of it."""
        super().set_up_planner(state_dict, metadata, is_coordinator)
        for key, leaf in self.state_dict.items():
            if not is_tensor(leaf):
                raise _no_tensor(key, self)
        self.metadata = Metadata({key: _described(leaf) for key, leaf in self.state_dict.items()})
