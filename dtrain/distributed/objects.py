"""Object collectives: Python objects as bytes, over the same calls as tensors.

Objects travel as plain data (`codec`), so that receiving them runs no code. Pickle, which torch
uses, runs whatever a sender puts into it: it is used for what is not plain data only, and only
after `allow_pickle()`, on the ranks that send it and on those that receive it. `weights_only=True`
refuses it for one call all the same. Sizes are agreed first, in one small collective, then the
bytes move in a second one. `device` is accepted and ignored.

Source: torch.distributed.
"""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np

from dtrain.comm import collectives as calls
from dtrain.comm.point_to_point import Recv, Send
from dtrain.distributed.codec import decode, encode
from dtrain.distributed.staging import root_of
from dtrain.distributed.world import GroupMember, ProcessGroup, resolve
from dtrain.errors import DistBackendError

# More is an error, or a rank that sends nonsense: objects are for small things.
MAX_BYTES = 1 << 32
PICKLE = b"\xc1pickle"  # msgpack never begins with 0xc1


def allow_pickle(group: Any = None, allow: bool = True) -> None:
    """Let object collectives of `group` pickle, on this rank, what is not plain data. Not in torch.

    For a job all of whose ranks are trusted: what a rank receives may then run any code. All ranks
    of the group call it; groups made from this one do not inherit it.
    """
    resolve(group).pickles = allow


def _bytes_of(value: Any, group: ProcessGroup, weights_only: bool) -> np.ndarray:
    try:
        data = encode(value)
    except TypeError as error:
        if group.pickles and not weights_only:
            data = PICKLE + pickle.dumps(value)
        else:
            raise TypeError(f"{error}, or call dtrain.distributed.allow_pickle() on all ranks, if "
                            "all of them are trusted: it runs code") from None  # fmt: skip
    if len(data) > MAX_BYTES:
        raise ValueError(
            f"an object of {len(data)} bytes is too large for an object collective (limit "
            f"{MAX_BYTES}): send tensors"
        )
    return np.frombuffer(data, np.uint8)


def _value_of(array: np.ndarray, group: ProcessGroup, sender: int, weights_only: bool) -> Any:
    """The object in the bytes that group rank `sender` sent; DistBackendError names it."""
    data = array.tobytes()
    if data.startswith(PICKLE):
        if group.pickles and not weights_only:
            return pickle.loads(data[len(PICKLE) :])
        raise DistBackendError(
            f"rank {group.ranks[sender]} sent a pickle, which this rank does not load: it runs code"
            + (" (weights_only=True)" if weights_only else
               ". Call dtrain.distributed.allow_pickle() on all ranks, if all of them are trusted")
        )  # fmt: skip
    try:
        return decode(data)
    except ValueError as error:
        raise DistBackendError(f"rank {group.ranks[sender]} sent no object: {error}") from None


def _check_announced(nbytes: Any, group: ProcessGroup, sender: int) -> int:
    """The size of what group rank `sender` will send; DistBackendError if it is absurd."""
    if not 0 <= nbytes <= MAX_BYTES:
        raise DistBackendError(
            f"rank {group.ranks[sender]} announced an object of {nbytes} bytes (limit {MAX_BYTES})"
        )
    return int(nbytes)


def _sizes(group: ProcessGroup, own: int) -> np.ndarray:
    """How many bytes each rank brings (int64, one per rank)."""
    sizes = np.empty(group.size(), np.int64)
    group.issue(calls.AllGather(np.array([own], np.int64), sizes))
    for sender, size in enumerate(sizes):
        _check_announced(size, group, sender)
    return sizes


def _padded(data: np.ndarray, size: int) -> np.ndarray:
    out = np.zeros(size, np.uint8)
    out[: data.size] = data
    return out


def _split(
    rows: np.ndarray, sizes: np.ndarray, group: ProcessGroup, weights_only: bool
) -> list[Any]:
    parts = enumerate(zip(rows, sizes, strict=True))
    return [_value_of(row[:n], group, sender, weights_only) for sender, (row, n) in parts]


def all_gather_object(
    object_list: list[Any], obj: Any, group: Any = None, weights_only: bool = False
) -> None:
    """Put `obj` of rank i into `object_list[i]`, on all ranks; the list has one place per rank."""
    if group is GroupMember.NON_GROUP_MEMBER:
        return
    where = resolve(group)
    _check_length(object_list, where, "object_list")
    data = _bytes_of(obj, where, weights_only)
    sizes = _sizes(where, data.size)
    rows = np.empty((where.size(), int(sizes.max())), np.uint8)
    where.issue(calls.AllGather(_padded(data, rows.shape[1]), rows))
    object_list[:] = _split(rows, sizes, where, weights_only)


def _check_length(values: list[Any], group: ProcessGroup, name: str) -> None:
    if len(values) != group.size():
        raise ValueError(f"{name} must have one place per rank: {group.size()}, got {len(values)}")


def gather_object(
    obj: Any, object_gather_list: list[Any] | None = None, dst: int | None = None,
    group: Any = None, group_dst: int | None = None, weights_only: bool = False,
) -> None:  # fmt: skip
    """Put `obj` of rank i into `object_gather_list[i]` of rank `dst`."""
    if group is GroupMember.NON_GROUP_MEMBER:
        return
    where = resolve(group)
    root = root_of(where, dst, group_dst, "dst")
    at_root = where.rank() == root
    if at_root:
        if object_gather_list is None:
            raise ValueError(
                "Argument ``object_gather_list`` must be specified on destination rank."
            )
        _check_length(object_gather_list, where, "object_gather_list")
    elif object_gather_list is not None:
        raise ValueError(
            "Argument ``object_gather_list`` must NOT be specified on non-destination ranks."
        )
    data = _bytes_of(obj, where, weights_only)
    sizes = _sizes(where, data.size)
    width = int(sizes.max())
    rows = np.empty((where.size(), width), np.uint8) if at_root else None
    where.issue(calls.Gather(_padded(data, width), rows, root))
    if object_gather_list is not None and rows is not None:
        object_gather_list[:] = _split(rows, sizes, where, weights_only)


def broadcast_object_list(
    object_list: list[Any], src: int | None = None, group: Any = None, device: Any = None,
    group_src: int | None = None, weights_only: bool = False,
) -> None:  # fmt: skip
    """Replace the objects in `object_list` by those of rank `src`; lists of one length."""
    if group is GroupMember.NON_GROUP_MEMBER:
        return
    where = resolve(group)
    root = root_of(where, src, group_src, "src")
    data = None
    if where.rank() == root:
        data = _bytes_of(list(object_list), where, weights_only)
    size = np.array([0 if data is None else data.size], np.int64)
    where.issue(calls.Broadcast(size, root))
    announced = _check_announced(size[0], where, root)
    buffer = np.empty(announced, np.uint8) if data is None else data
    where.issue(calls.Broadcast(buffer, root))
    received = _value_of(buffer, where, root, weights_only)
    if len(received) != len(object_list):
        raise ValueError(
            f"broadcast_object_list: rank {where.ranks[root]} sent {len(received)} objects, this "
            f"rank's list has {len(object_list)}"
        )
    if data is None:
        object_list[:] = received


def scatter_object_list(
    scatter_object_output_list: list[Any],
    scatter_object_input_list: list[Any] | None = None,
    src: int | None = None,
    group: Any = None,
    group_src: int | None = None,
    weights_only: bool = False,
) -> None:
    """Put object i of rank `src`'s input list into place 0 of rank i's output list."""
    if group is GroupMember.NON_GROUP_MEMBER:
        return
    where = resolve(group)
    if not isinstance(scatter_object_output_list, list) or not scatter_object_output_list:
        raise ValueError(
            "Expected argument scatter_object_output_list to be a list of size at least 1."
        )
    root = root_of(where, src, group_src, "src")
    rows, sizes = None, np.empty(where.size() + 1, np.int64)
    if where.rank() == root:
        if scatter_object_input_list is None:
            raise ValueError("source rank must provide non-None scatter_object_input_list")
        _check_length(scatter_object_input_list, where, "scatter_object_input_list")
        parts = [_bytes_of(v, where, weights_only) for v in scatter_object_input_list]
        sizes[:-1], sizes[-1] = [p.size for p in parts], max(p.size for p in parts)
        rows = np.stack([_padded(p, int(sizes[-1])) for p in parts])
    where.issue(calls.Broadcast(sizes, root))
    out = np.empty(_check_announced(sizes[-1], where, root), np.uint8)
    where.issue(calls.Scatter(rows, out, root))
    mine = out[: int(sizes[where.rank()])]
    scatter_object_output_list[0] = _value_of(mine, where, root, weights_only)


def send_object_list(
    object_list: list[Any], dst: int | None = None, group: Any = None, device: Any = None,
    group_dst: int | None = None, use_batch: bool = False, weights_only: bool = False,
) -> None:  # fmt: skip
    """Send the objects of a list to rank `dst`. `use_batch` is accepted and changes nothing."""
    where = resolve(group)
    peer = root_of(where, dst, group_dst, "dst")
    data = _bytes_of(list(object_list), where, weights_only)
    where.issue(Send(np.array([data.size], np.int64), peer))
    where.issue(Send(data, peer))


def recv_object_list(
    object_list: list[Any], src: int | None = None, group: Any = None, device: Any = None,
    group_src: int | None = None, use_batch: bool = False, weights_only: bool = False,
) -> int:  # fmt: skip
    """Receive into `object_list` from rank `src` (None: any); returns the sender's global rank."""
    where = resolve(group)
    peer = None if src is None and group_src is None else root_of(where, src, group_src, "src")
    size = np.empty(1, np.int64)
    source = where.issue(Recv(size, peer)).source_rank()
    data = np.empty(_check_announced(size[0], where, source), np.uint8)
    where.issue(Recv(data, source))
    object_list[:] = _value_of(data, where, source, weights_only)
    return where.ranks[source]
