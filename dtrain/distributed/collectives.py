"""The collectives on tensors: torch's functions over the comm tower's collectives on arrays.

Each function checks its tensors, submits one collective to the group, and returns None, or a
`Work` with `async_op=True`. Ranks in arguments (`src`, `dst`) are global, `group_src` and
`group_dst` are ranks of the group. They block until the call is complete on this rank, at most the
group's timeout, and raise `CollectiveMismatch`, `PeerLost` or `CollectiveTimeout`.
Gradients do not flow through them: a tensor in a graph is warned about.

Source: torch.distributed.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dtrain import dtypes
from dtrain.autograd.node import make
from dtrain.comm import collectives as calls
from dtrain.comm.monitored import MonitoredBarrier
from dtrain.comm.reduce import ReduceOp
from dtrain.distributed.staging import (
    Async,
    Landing,
    check_list,
    check_parts,
    check_tensor,
    outside,
    root_of,
    submit,
)
from dtrain.distributed.work import seconds
from dtrain.distributed.world import ProcessGroup, resolve
from dtrain.ops.create import numpy_dtype, shape_of
from dtrain.tensor import Tensor

SAYING = 2.0  # seconds in which a monitored barrier's error must have reached all ranks


def broadcast(
    tensor: Tensor, src: int | None = None, group: Any = None, async_op: bool = False,
    group_src: int | None = None,
) -> Async:  # fmt: skip
    """Copy `tensor` of rank `src` (default 0) into `tensor` on all ranks."""
    check_tensor(tensor, "tensor")
    if outside(group):
        return None
    where, landing = resolve(group), Landing()
    root = root_of(where, src, group_src, "src")
    return submit(where, calls.Broadcast(landing.into(tensor), root), landing, async_op)


def all_reduce(
    tensor: Tensor, op: ReduceOp = ReduceOp.SUM, group: Any = None, async_op: bool = False
) -> Async:
    """Combine `tensor` of all ranks, in rank order, and leave the result in it everywhere."""
    check_tensor(tensor, "tensor")
    if outside(group):
        return None
    where, landing = resolve(group), Landing()
    return submit(where, calls.AllReduce(landing.into(tensor), op), landing, async_op)


def reduce(
    tensor: Tensor, dst: int | None = None, op: ReduceOp = ReduceOp.SUM, group: Any = None,
    async_op: bool = False, group_dst: int | None = None,
) -> Async:  # fmt: skip
    """Combine `tensor` of all ranks into `tensor` of rank `dst`; elsewhere it keeps its values."""
    check_tensor(tensor, "tensor")
    if outside(group):
        return None
    where, landing = resolve(group), Landing()
    root = root_of(where, dst, group_dst, "dst")
    return submit(where, calls.Reduce(landing.into(tensor), root, op), landing, async_op)


def all_gather(
    tensor_list: list[Tensor], tensor: Tensor, group: Any = None, async_op: bool = False
) -> Async:
    """Put `tensor` of rank i into `tensor_list[i]`, on all ranks.

    Beyond torch, tensors may differ in their first dimension: `tensor_list` says how, alike on all
    ranks. Each part is then sent padded to the largest.
    """
    check_list(tensor_list, "tensor_list")
    check_tensor(tensor, "tensor")
    if outside(group):
        return None
    where, landing = resolve(group), Landing()
    if len({part._data.shape for part in tensor_list}) > 1:
        _check_uneven(tensor_list, tensor, where)
        width = max(part._data.size for part in tensor_list)
        padded = np.zeros(width, tensor._data.dtype)
        padded[: tensor._data.size] = landing.read(tensor).reshape(-1)
        call = calls.AllGather(padded, landing.into_rows(tensor_list, width))
    else:
        check_parts(tensor_list, tensor, where, "all_gather")
        call = calls.AllGather(landing.read(tensor), landing.into_each(tensor_list))
    return submit(where, call, landing, async_op)


def _check_uneven(parts: list[Tensor], tensor: Tensor, group: ProcessGroup) -> None:
    """ValueError unless parts differ in dim 0 alone, and this rank's is like `tensor`."""
    if len(parts) == group.size():
        own, data = parts[group.rank()]._data, tensor._data
        same = [p._data.shape[1:] == data.shape[1:] and p._data.ndim for p in parts]
        if own.shape == data.shape and own.dtype == data.dtype and all(same):
            return
    raise ValueError(
        f"all_gather: expected {group.size()} tensors that differ in their "
        f"first dimension alone, number {group.rank()} like this rank's "
        f"{calls.describe(tensor._data)}, got {[calls.describe(p._data) for p in parts]}"
    )


def all_gather_into_tensor(
    output_tensor: Tensor, input_tensor: Tensor, group: Any = None, async_op: bool = False
) -> Async:
    """Put `input_tensor` of all ranks one after the other into `output_tensor`, on all ranks."""
    check_tensor(output_tensor, "output_tensor")
    check_tensor(input_tensor, "input_tensor")
    if outside(group):
        return None
    where, landing = resolve(group), Landing()
    out = landing.into(output_tensor, read=False)
    return submit(where, calls.AllGather(landing.read(input_tensor), out), landing, async_op)


all_gather_single = _all_gather_base = all_gather_into_tensor


def gather(
    tensor: Tensor, gather_list: list[Tensor] | None = None, dst: int | None = None,
    group: Any = None, async_op: bool = False, group_dst: int | None = None,
) -> Async:  # fmt: skip
    """Put `tensor` of rank i into `gather_list[i]` of rank `dst`; elsewhere the list is None."""
    check_tensor(tensor, "tensor")
    if outside(group):
        return None
    where, landing = resolve(group), Landing()
    root = root_of(where, dst, group_dst, "dst")
    out = None
    if where.rank() == root:
        parts = check_list(gather_list, "gather_list")
        check_parts(parts, tensor, where, "gather")
        out = landing.into_each(parts)
    elif gather_list:
        raise ValueError("Argument ``gather_list`` must NOT be specified on non-destination ranks.")
    return submit(where, calls.Gather(landing.read(tensor), out, root), landing, async_op)


def gather_single(
    output_tensor: Tensor | None, input_tensor: Tensor, dst: int | None = None, group: Any = None,
    async_op: bool = False, group_dst: int | None = None,
) -> Async:  # fmt: skip
    """Put `input_tensor` of all ranks one after the other into `output_tensor` of rank `dst`.

    Elsewhere `output_tensor` is None.
    """
    check_tensor(input_tensor, "input_tensor")
    if outside(group):
        return None
    where, landing = resolve(group), Landing()
    root = root_of(where, dst, group_dst, "dst")
    out = None
    if where.rank() == root:
        out = landing.into(check_tensor(output_tensor, "output_tensor"), read=False)
    elif output_tensor is not None:
        raise ValueError("output_tensor must be None on all ranks but the destination.")
    return submit(where, calls.Gather(landing.read(input_tensor), out, root), landing, async_op)


gather_into_tensor = gather_single


def scatter(
    tensor: Tensor, scatter_list: list[Tensor] | None = None, src: int | None = None,
    group: Any = None, async_op: bool = False, group_src: int | None = None,
) -> Async:  # fmt: skip
    """Put `scatter_list[i]` of rank `src` into `tensor` of rank i; elsewhere the list is None."""
    check_tensor(tensor, "tensor")
    if outside(group):
        return None
    where, landing = resolve(group), Landing()
    root = root_of(where, src, group_src, "src")
    inp = None
    if where.rank() == root:
        parts = check_list(scatter_list, "scatter_list")
        check_parts(parts, tensor, where, "scatter")
        inp = landing.read_each(parts)
    elif scatter_list:
        raise ValueError("Argument ``scatter_list`` must NOT be specified on non-source ranks.")
    out = landing.into(tensor, read=False)
    return submit(where, calls.Scatter(inp, out, root), landing, async_op)


def reduce_scatter(
    output: Tensor, input_list: list[Tensor], op: ReduceOp = ReduceOp.SUM, group: Any = None,
    async_op: bool = False,
) -> Async:  # fmt: skip
    """Combine `input_list[i]` of all ranks into `output` of rank i; all of one shape."""
    check_tensor(output, "output")
    parts = check_list(input_list, "input_list")
    if outside(group):
        return None
    where, landing = resolve(group), Landing()
    check_parts(parts, output, where, "reduce_scatter")
    out = landing.into(output, read=False)
    return submit(where, calls.ReduceScatter(landing.read_each(parts), out, op), landing, async_op)


def reduce_scatter_tensor(
    output: Tensor, input: Tensor, op: ReduceOp = ReduceOp.SUM, group: Any = None,
    async_op: bool = False,
) -> Async:  # fmt: skip
    """Combine `input` of all ranks and leave part i of the result in `output` of rank i."""
    check_tensor(output, "output")
    check_tensor(input, "input")
    if outside(group):
        return None
    where, landing = resolve(group), Landing()
    out = landing.into(output, read=False)
    return submit(where, calls.ReduceScatter(landing.read(input), out, op), landing, async_op)


reduce_scatter_single = _reduce_scatter_base = reduce_scatter_tensor


def all_to_all(
    output_tensor_list: list[Tensor], input_tensor_list: list[Tensor], group: Any = None,
    async_op: bool = False,
) -> Async:  # fmt: skip
    """Send `input_tensor_list[i]` to rank i, receive into `output_tensor_list[i]` from rank i."""
    outputs = check_list(output_tensor_list, "output_tensor_list")
    inputs = check_list(input_tensor_list, "input_tensor_list")
    if outside(group):
        return None
    where, landing = resolve(group), Landing()
    for name, tensors in (("output", outputs), ("input", inputs)):
        if len(tensors) != where.size():
            raise ValueError(
                f"all_to_all: expected {where.size()} {name} tensors, one per rank, "
                f"got {len(tensors)}"
            )
    call = calls.AllToAll(
            landing.read_each(inputs), landing.into_each(outputs),
        [t._data.size for t in inputs], [t._data.size for t in outputs],
    )  # fmt: skip
    return submit(where, call, landing, async_op)


def all_to_all_single(
    output: Tensor, input: Tensor, output_split_sizes: list[int] | None = None,
    input_split_sizes: list[int] | None = None, group: Any = None, async_op: bool = False,
) -> Async:  # fmt: skip
    """Send part i of `input` to rank i and receive part i of `output` from it.

    Parts are along dim 0: equal ones, or of the given sizes.
    """
    check_tensor(output, "output")
    check_tensor(input, "input")
    if outside(group):
        return None
    where, landing = resolve(group), Landing()
    call = calls.AllToAll(
        landing.read(input), landing.into(output, read=False),
        input_split_sizes or None, output_split_sizes or None,
    )  # fmt: skip
    return submit(where, call, landing, async_op)


def barrier(
    group: Any = None, async_op: bool = False, device_ids: Any = None, timeout: Any = None
) -> Async:
    """Return when all ranks have called it. `device_ids` is accepted and ignored."""
    if outside(group):
        return None
    return submit(resolve(group), calls.Barrier(), Landing(), async_op, seconds(timeout))


def monitored_barrier(group: Any = None, timeout: Any = None, wait_all_ranks: bool = False) -> None:
    """A barrier whose timeout names all ranks that did not come, on every rank that did.

    `timeout` (seconds or timedelta, default the group's) is how long rank 0 of the group waits. A
    rank that is gone ends the wait at once (`PeerLost`), unless `wait_all_ranks`: then it is named
    with the others. A failure fails the group. Costs more than `barrier`: rank 0 hears from all.
    """
    if outside(group):
        return
    where = resolve(group)
    patience = seconds(timeout) or where.arrays.timeout
    call = MonitoredBarrier(where.ranks, patience, wait_all_ranks)
    # Rank 0 decides: the others give it time to say who is missing.
    where.issue(call, timeout=patience + (SAYING if where.rank() else 0.0))


def empty(*size: Any, dtype: dtypes.dtype | None = None, group: Any = None) -> Tensor:
    """An uninitialised tensor in memory that the ranks of `group` share, where they share a host.

    Collectives of that group on such tensors copy nothing. It is an ordinary tensor in all else,
    and where there is no such memory. Its memory is used again when it and its views are gone.
    Each rank gets its own; nothing waits. Not in torch.
    """
    tensor: Tensor = make(resolve(group).arrays.empty(shape_of(size), numpy_dtype(dtype)))
    return tensor
