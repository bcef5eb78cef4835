"""Messages between two ranks: `send`, `recv`, `isend`, `irecv`, `batch_isend_irecv`.

A send does not wait for its receiver, only until the tensor may be changed again. Messages of one
pair and tag arrive in the order they were sent. Source: torch.distributed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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


class P2POp:
    """One `isend` or `irecv` for `batch_isend_irecv`. Source: torch.distributed.P2POp.

    `peer` is a global rank, `group_peer` one of the group; both are set afterwards, or None for a
    receive from any source.
    """

    def __init__(
        self,
        op: Callable[..., Work],
        tensor: Tensor,
        peer: int | None = None,
        group: Any = None,
        tag: int = 0,
        group_peer: int | None = None,
    ) -> None:
        if op not in (isend, irecv):
            raise ValueError(
                "Invalid ``op``. Expected ``op`` to be of type ``torch.distributed.isend`` or "
                "``torch.distributed.irecv``."
            )
        self.op, self.tensor, self.tag = op, check_tensor(tensor, "tensor"), tag
        self.group = resolve(group)
        self.group_peer: int | None = None
        if op is isend or peer is not None or group_peer is not None:
            self.group_peer = _peer(self.group, peer, group_peer, "dst" if op is isend else "src")
        self.peer = None if self.group_peer is None else self.group.ranks[self.group_peer]

    def start(self) -> Work:
        """Issue the call."""
        return self.op(self.tensor, None, self.group, self.tag, self.group_peer)

    def __repr__(self) -> str:
        shape = tuple(self.tensor.shape)
        return f"P2POp({self.op.__name__}, {shape}, peer={self.peer}, tag={self.tag})"


def batch_isend_irecv(p2p_op_list: list[P2POp]) -> list[Work]:
    """Start several sends and receives at once; their Works, in the order given.

    The order in the list cannot deadlock: receives are posted before anything is sent, and no send
    waits for its receiver. Calls of one direction, pair and tag are matched in list order, which
    must therefore be that of the other rank's list.
    """
    if not isinstance(p2p_op_list, list) or not all(isinstance(op, P2POp) for op in p2p_op_list):
        raise ValueError(
            "Invalid ``p2p_op_list``. Each op is expected to to be of type "
            "``torch.distributed.P2POp``."
        )
    if len({id(op.group) for op in p2p_op_list}) > 1:
        raise ValueError("All ops need to use the same group.")
    order = sorted(range(len(p2p_op_list)), key=lambda i: p2p_op_list[i].op is isend)
    works = {i: p2p_op_list[i].start() for i in order}
    return [works[i] for i in range(len(p2p_op_list))]


def isend(
    tensor: Tensor, dst: int | None = None, group: Any = None, tag: int = 0,
    group_dst: int | None = None,
) -> Work:  # fmt: skip
    """Start sending `tensor` to rank `dst`; it must not change before the Work is complete."""
    check_tensor(tensor, "tensor")
    where = resolve(group)
    landing = Landing()
    call = Send(landing.read(tensor), _peer(where, dst, group_dst, "dst"), tag)
    return Work(where.issue(call, async_op=True, inputs=landing.inputs), [tensor])


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
    work = where.issue(call, async_op=True, outputs=landing.tensors)
    return Work(work, [tensor], landing.finish)


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
