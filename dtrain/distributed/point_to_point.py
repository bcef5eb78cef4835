"""Messages between two ranks: `send`, `recv`, `isend`, `irecv`.

A send does not wait for its receiver, only until the tensor may be changed again. Messages of one
pair and tag arrive in the order they were sent. Source: torch.distributed.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dtrain.comm.point_to_point import Recv, Send
from dtrain.distributed.staging import Landing, check_tensor, root_of
from dtrain.distributed.work import Work
from dtrain.distributed.world import ProcessGroup, resolve
from dtrain.tensor import Tensor


def _peer(group: ProcessGroup, given: int | None, in_group: int | None, name: str) -> int:
    if given is None and in_group is None:
        raise ValueError(f"`{name}` must be specified")
    peer = root_of(group, given, in_group, name)
    if peer == group.rank():
        what = "destination" if name == "dst" else "source"
        raise ValueError(
            f"Invalid {what} rank: {what} rank should not be the same as the rank of the current "
            "process."
        )
    return peer


def isend(
    tensor: Tensor, dst: int | None = None, group: Any = None, tag: int = 0,
    group_dst: int | None = None,
) -> Work:  # fmt: skip
    """Start sending `tensor` to rank `dst`; it must not change before the Work is complete."""
    check_tensor(tensor, "tensor")
    where = resolve(group)
    call = Send(np.ascontiguousarray(tensor._data), _peer(where, dst, group_dst, "dst"), tag)
    return Work(where.issue(call, async_op=True), [tensor])


def irecv(
    tensor: Tensor, src: int | None = None, group: Any = None, tag: int = 0,
    group_src: int | None = None,
) -> Work:  # fmt: skip
    """Start receiving into `tensor` from rank `src`, or from whoever sends first."""
    check_tensor(tensor, "tensor")
    where, landing = resolve(group), Landing()
    source = None
    if src is not None or group_src is not None:
        source = _peer(where, src, group_src, "src")
    call = Recv(landing.into(tensor, read=False), source, tag)
    return Work(where.issue(call, async_op=True), [tensor], landing.finish)


def send(
    tensor: Tensor, dst: int | None = None, group: Any = None, tag: int = 0,
    group_dst: int | None = None,
) -> None:  # fmt: skip
    """Send `tensor` to rank `dst`."""
    isend(tensor, dst, group, tag, group_dst).wait()


def recv(
    tensor: Tensor, src: int | None = None, group: Any = None, tag: int = 0,
    group_src: int | None = None,
) -> int:  # fmt: skip
    """Receive into `tensor` from rank `src` (None: any); returns the sender's global rank."""
    where = resolve(group)
    work = irecv(tensor, src, where, tag, group_src)
    work.wait()
    return where.ranks[work.source_rank()]
