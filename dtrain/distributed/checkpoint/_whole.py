"""Whole tensors out of cut ones on one rank, and from one rank to all: one tensor at a time.

All ranks of a `Together` call these functions, with nested state dicts of one structure. No rank
but the first ever holds more of a tensor that is cut than its own part and, in `spread_whole`, one
whole tensor. Cost: a message for each part that the first rank does not have; a broadcast a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from dtrain import dtypes
from dtrain.autograd.node import make
from dtrain.comm import collectives as calls
from dtrain.comm.point_to_point import Recv, Send
from dtrain.distributed.checkpoint._nested_dict import (
    flatten_state_dict,
    is_tensor,
    unflatten_state_dict,
)
from dtrain.distributed.checkpoint._together import Together
from dtrain.distributed.checkpoint.default_planner import (
    array_of,
    create_default_global_save_plan,
    create_default_local_save_plan,
)
from dtrain.distributed.checkpoint.metadata import (
    Metadata,
    MetadataIndex,
)
from dtrain.distributed.tensor import DTensor
from dtrain.tensor import Size

Array = np.ndarray[Any, Any]


class WholeTensors:
    """The tensors of a flat state dict, whole on the first rank, those of larger numbers first.

    `metadata` says what they are, before anything moves. CheckpointException where ranks disagree.
    """

    def __init__(self, flat: Mapping[str, Any], ranks: Together) -> None:
        self.ranks = ranks
        self.tensors = {key: leaf for key, leaf in flat.items() if is_tensor(leaf)}
        proposed = ranks.each(
            "gathering whole tensors", lambda: create_default_local_save_plan(self.tensors)
        )
        plans, metadata = create_default_global_save_plan(proposed, lowest=True)
        self.metadata: Metadata = metadata
        self._holders = {i.index: rank for rank, plan in enumerate(plans) for i in plan.items}

    def __iter__(self) -> Iterator[tuple[str, Array | None]]:
        """(name, array), on other ranks than the first (name, None). All ranks go on together.

        The array is the state dict's own where this rank has all of it. Blocks for the part of
        each rank, at most the group's timeout.
        """
        for fqn, _, _ in self.specs:
            yield fqn, self._collected(fqn)

    @property
    def specs(self) -> list[tuple[str, dtypes.dtype, Size]]:
        """(name, dtype, shape) of each, in the order in which they come."""
        entries: Any = self.metadata.state_dict_metadata.items()
        found = [(fqn, entry.properties.dtype, entry.size) for fqn, entry in entries]
        return sorted(found, key=lambda spec: (-spec[1].itemsize, spec[0]))

    def _collected(self, fqn: str) -> Array | None:
        entry: Any = self.metadata.state_dict_metadata[fqn]
        holders = [self._holders[MetadataIndex(fqn, chunk.offsets)] for chunk in entry.chunks]
        own = array_of(self.tensors[fqn]) if self.ranks.rank in holders else None
        if self.ranks.rank != 0:
            if own is not None:
                self.ranks.issue(Send(np.asarray(own, order="C"), 0))
            return None
        if own is not None and own.shape == entry.size:
            return own  # type: ignore[no-any-return]
        whole = np.empty(entry.size, entry.properties.dtype.numpy)
        for chunk, holder in zip(entry.chunks, holders, strict=True):
            part = own
            if holder != 0:
                part = np.empty(chunk.sizes, whole.dtype)
                self.ranks.issue(Recv(part, holder))
            box = tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))
            whole[box] = part
        return whole


def gather_whole(state: Mapping[str, Any], ranks: Together) -> dict[str, Any]:
    """The state dict with whole tensors on the first rank; {} on the others."""
    flat, paths = flatten_state_dict(state)
    found = dict(WholeTensors(flat, ranks))
    if ranks.rank != 0:
        return {}
    for key, array in found.items():
        if isinstance(flat.get(key), DTensor) or key not in flat:
            flat[key] = make(array)
    return unflatten_state_dict(flat, {key: paths.get(key, (key,)) for key in flat})


def spread_whole(
    state: Mapping[str, Any], ranks: Together, own_part: Callable[[str, Array], Any]
) -> dict[str, Any]:
    """The first rank's state dict on all ranks, with `own_part(key, whole)` for each tensor.

    The arrays that `own_part` gets are lent; the other ranks' state dicts are not looked at.
    """
    flat, paths = flatten_state_dict(state) if ranks.rank == 0 else ({}, {})

    def described() -> list[tuple[Any, ...]]:
        return [(key, paths[key], *_described(leaf)) for key, leaf in flat.items()]

    listed = ranks.first("spreading a state dict", described)
    leaves: dict[str, Any] = {}
    for key, path, value, shape, dtype in listed:
        paths[key] = tuple(path)
        if dtype is None:
            leaves[key] = value
            continue
        whole = np.empty(shape, dtypes.BY_NAME[dtype].numpy)
        if ranks.rank == 0:
            whole = np.asarray(array_of(flat[key]), order="C")
        ranks.issue(calls.Broadcast(whole, 0))
        leaves[key] = own_part(key, whole)
    return unflatten_state_dict(leaves, paths)


def _described(leaf: Any) -> tuple[Any, Any, Any]:
    """(value, None, None), or (None, shape, dtype) of a whole tensor."""
    if not is_tensor(leaf):
        return leaf, None, None
    array = array_of(leaf)
    if tuple(array.shape) != tuple(leaf.shape):
        raise TypeError("a DTensor in a full state dict: get it with full_state_dict=True")
    return None, list(array.shape), dtypes.from_numpy(array.dtype).name
