"""The collectives on tensors: torch's functions over the comm tower's collectives on arrays.

Each function checks its tensors, submits one collective to the group, and returns None, or a
`Work` with `async_op=True`. Ranks in arguments (`src`, `dst`) are global, `group_src` and
`group_dst` are ranks of the group. They block until the call is complete on this rank, at most the
group's timeout, and raise `CollectiveMismatch`, `PeerLost` or `CollectiveTimeout`.
Gradients do not flow through them: a tensor in a graph is warned about.

Source: torch.distributed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dtrain.autograd.grad_mode import is_grad_enabled
from dtrain.comm import collectives as calls
from dtrain.comm.reduce import ReduceOp
from dtrain.distributed.work import Work, seconds
from dtrain.distributed.world import GroupMember, ProcessGroup, resolve
from dtrain.tensor import Tensor

Async = Work | None


def check_tensor(tensor: Any, name: str) -> Tensor:
    """`tensor` itself, or TypeError in torch's words."""
    if not isinstance(tensor, Tensor):
        raise TypeError(
            f"Invalid function argument. Expected parameter `{name}` of type torch.Tensor\n"
            f"             but got {type(tensor)} instead."
        )
    if is_grad_enabled() and tensor.grad_fn is not None:
        warnings.warn(
            f"`{name}` is part of a graph, and gradients do not flow through this collective: "
            "detach() it, or use dtrain.distributed.nn.functional",
            stacklevel=4,
        )
    return tensor


def check_list(tensors: Any, name: str) -> list[Tensor]:
    """A list of tensors, or TypeError in torch's words."""
    if not isinstance(tensors, (list, tuple)) or not all(isinstance(t, Tensor) for t in tensors):
        kinds = [type(t) for t in tensors] if isinstance(tensors, (list, tuple)) else type(tensors)
        raise TypeError(
            f"Invalid function argument. Expected parameter `{name}` of type List[torch.Tensor]\n"
            f"             but got {kinds} instead."
        )
    return list(tensors)


class Landing:
    """Where results arrive: a tensor's own memory, or a contiguous copy that goes back after."""

    def __init__(self) -> None:
        self.steps: list[Callable[[], None]] = []
        self.tensors: list[Tensor] = []

    def into(self, tensor: Tensor, *, read: bool = True) -> np.ndarray:
        """An array to receive into for `tensor`; `read`: its values are an input as well."""
        self.tensors.append(tensor)
        data = tensor._data
        if data.flags.c_contiguous:
            self.steps.append(tensor._bump_version)
            return data
        staged = np.ascontiguousarray(data) if read else np.empty(data.shape, data.dtype)
        self.steps.append(lambda: tensor.set_array(staged))
        return staged

    def into_each(self, tensors: Sequence[Tensor]) -> np.ndarray:
        """One flat array whose consecutive parts go to `tensors`."""
        if not tensors:
            return np.empty(0, np.float32)
        self.tensors.extend(tensors)
        flat = np.empty(sum(t._data.size for t in tensors), tensors[0]._data.dtype)

        def spread() -> None:
            start = 0
            for tensor in tensors:
                end = start + tensor._data.size
                tensor.set_array(flat[start:end].reshape(tensor._data.shape))
                start = end

        self.steps.append(spread)
        return flat

    def finish(self) -> None:
        for step in self.steps:
            step()


def _contiguous(tensor: Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor._data)


def _joined(tensors: Sequence[Tensor]) -> np.ndarray:
    """The elements of several tensors of one dtype, one after the other."""
    if not tensors:
        return np.empty(0, np.float32)
    kinds = {t._data.dtype for t in tensors}
    if len(kinds) > 1:
        raise ValueError(
            f"Invalid usage of tensors with different dtypes. Found {sorted(map(str, kinds))}"
        )
    return np.concatenate([t._data.reshape(-1) for t in tensors])


def submit(
    group: ProcessGroup, call: Any, landing: Landing, async_op: bool, timeout: float | None = None
) -> Async:
    """Submit a collective; None, or the Work when `async_op`."""
    work = group.arrays.submit(call, async_op=async_op, timeout=timeout)
    handle = Work(work, landing.tensors, landing.finish)
    if async_op:
        return handle
    handle.wait()
    return None


def root_of(
    group: ProcessGroup,
    global_rank: int | None,
    group_rank: int | None,
    name: str,
    default: int = 0,
) -> int:
    """The group rank that `src`/`dst` or `group_src`/`group_dst` name; only one may be given."""
    if global_rank is not None and group_rank is not None:
        raise ValueError(f"Can't specify both group_{name} and {name}")
    if group_rank is not None:
        if not 0 <= group_rank < group.size():
            raise ValueError(f"Group rank {group_rank} is not part of group (size {group.size()})")
        return group_rank
    return group.group_rank_of(group.ranks[default] if global_rank is None else global_rank)


def _outside(group: Any) -> bool:
    """Whether the caller is not in the group: torch then warns and does nothing."""
    if group is not GroupMember.NON_GROUP_MEMBER:
        return False
    warnings.warn("Running a collective on a global rank which does not belong to the given group.",
                  stacklevel=3)  # fmt: skip
    return True


def broadcast(
    tensor: Tensor, src: int | None = None, group: Any = None, async_op: bool = False,
    group_src: int | None = None,
) -> Async:  # fmt: skip
    """Copy `tensor` of rank `src` (default 0) into `tensor` on all ranks."""
    check_tensor(tensor, "tensor")
    if _outside(group):
        return None
    where, landing = resolve(group), Landing()
    root = root_of(where, src, group_src, "src")
    return submit(where, calls.Broadcast(landing.into(tensor), root), landing, async_op)


def all_reduce(
    tensor: Tensor, op: ReduceOp = ReduceOp.SUM, group: Any = None, async_op: bool = False
) -> Async:
    """Combine `tensor` of all ranks, in rank order, and leave the result in it everywhere."""
    check_tensor(tensor, "tensor")
    if _outside(group):
        return None
    where, landing = resolve(group), Landing()
    return submit(where, calls.AllReduce(landing.into(tensor), op), landing, async_op)


def reduce(
    tensor: Tensor, dst: int | None = None, op: ReduceOp = ReduceOp.SUM, group: Any = None,
    async_op: bool = False, group_dst: int | None = None,
) -> Async:  # fmt: skip
    """Combine `tensor` of all ranks into `tensor` of rank `dst`; elsewhere it keeps its values."""
    check_tensor(tensor, "tensor")
    if _outside(group):
        return None
    where, landing = resolve(group), Landing()
    root = root_of(where, dst, group_dst, "dst")
    return submit(where, calls.Reduce(landing.into(tensor), root, op), landing, async_op)


def all_gather(
    tensor_list: list[Tensor], tensor: Tensor, group: Any = None, async_op: bool = False
) -> Async:
    """Put `tensor` of rank i into `tensor_list[i]`, on all ranks; all of one shape."""
    check_list(tensor_list, "tensor_list")
    check_tensor(tensor, "tensor")
    if _outside(group):
        return None
    where, landing = resolve(group), Landing()
    _check_parts(tensor_list, tensor, where, "all_gather")
    out = landing.into_each(tensor_list)
    return submit(where, calls.AllGather(_contiguous(tensor), out), landing, async_op)


def _check_parts(parts: list[Tensor], whole: Tensor, group: ProcessGroup, what: str) -> None:
    if len(parts) != group.size():
        raise ValueError(
            f"{what}: expected a list of {group.size()} tensors, one per rank, got {len(parts)}"
        )
    for i, part in enumerate(parts):
        if part._data.shape != whole._data.shape or part._data.dtype != whole._data.dtype:
            raise ValueError(
                f"{what}: tensor {i} of the list is {calls.describe(part._data)}, expected "
                f"{calls.describe(whole._data)} as on this rank"
            )


def all_gather_into_tensor(
    output_tensor: Tensor, input_tensor: Tensor, group: Any = None, async_op: bool = False
) -> Async:
    """Put `input_tensor` of all ranks one after the other into `output_tensor`, on all ranks."""
    check_tensor(output_tensor, "output_tensor")
    check_tensor(input_tensor, "input_tensor")
    if _outside(group):
        return None
    where, landing = resolve(group), Landing()
    out = landing.into(output_tensor, read=False)
    return submit(where, calls.AllGather(_contiguous(input_tensor), out), landing, async_op)


all_gather_single = all_gather_into_tensor


def gather(
    tensor: Tensor, gather_list: list[Tensor] | None = None, dst: int | None = None,
    group: Any = None, async_op: bool = False, group_dst: int | None = None,
) -> Async:  # fmt: skip
    """Put `tensor` of rank i into `gather_list[i]` of rank `dst`; elsewhere the list is None."""
    check_tensor(tensor, "tensor")
    if _outside(group):
        return None
    where, landing = resolve(group), Landing()
    root = root_of(where, dst, group_dst, "dst")
    out = None
    if where.rank() == root:
        parts = check_list(gather_list, "gather_list")
        _check_parts(parts, tensor, where, "gather")
        out = landing.into_each(parts)
    elif gather_list:
        raise ValueError("Argument ``gather_list`` must NOT be specified on non-destination ranks.")
    return submit(where, calls.Gather(_contiguous(tensor), out, root), landing, async_op)


def scatter(
    tensor: Tensor, scatter_list: list[Tensor] | None = None, src: int | None = None,
    group: Any = None, async_op: bool = False, group_src: int | None = None,
) -> Async:  # fmt: skip
    """Put `scatter_list[i]` of rank `src` into `tensor` of rank i; elsewhere the list is None."""
    check_tensor(tensor, "tensor")
    if _outside(group):
        return None
    where, landing = resolve(group), Landing()
    root = root_of(where, src, group_src, "src")
    inp = None
    if where.rank() == root:
        parts = check_list(scatter_list, "scatter_list")
        _check_parts(parts, tensor, where, "scatter")
        inp = _joined(parts)
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
    if _outside(group):
        return None
    where, landing = resolve(group), Landing()
    _check_parts(parts, output, where, "reduce_scatter")
    out = landing.into(output, read=False)
    return submit(where, calls.ReduceScatter(_joined(parts), out, op), landing, async_op)


def reduce_scatter_tensor(
    output: Tensor, input: Tensor, op: ReduceOp = ReduceOp.SUM, group: Any = None,
    async_op: bool = False,
) -> Async:  # fmt: skip
    """Combine `input` of all ranks and leave part i of the result in `output` of rank i."""
    check_tensor(output, "output")
    check_tensor(input, "input")
    if _outside(group):
        return None
    where, landing = resolve(group), Landing()
    out = landing.into(output, read=False)
    return submit(where, calls.ReduceScatter(_contiguous(input), out, op), landing, async_op)


reduce_scatter_single = reduce_scatter_tensor


def all_to_all(
    output_tensor_list: list[Tensor], input_tensor_list: list[Tensor], group: Any = None,
    async_op: bool = False,
) -> Async:  # fmt: skip
    """Send `input_tensor_list[i]` to rank i, receive into `output_tensor_list[i]` from rank i."""
    outputs = check_list(output_tensor_list, "output_tensor_list")
    inputs = check_list(input_tensor_list, "input_tensor_list")
    if _outside(group):
        return None
    where, landing = resolve(group), Landing()
    for name, tensors in (("output", outputs), ("input", inputs)):
        if len(tensors) != where.size():
            raise ValueError(
                f"all_to_all: expected {where.size()} {name} tensors, one per rank, "
                f"got {len(tensors)}"
            )
    call = calls.AllToAll(
        _joined(inputs), landing.into_each(outputs),
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
    if _outside(group):
        return None
    where, landing = resolve(group), Landing()
    call = calls.AllToAll(
        _contiguous(input), landing.into(output, read=False),
        input_split_sizes or None, output_split_sizes or None,
    )  # fmt: skip
    return submit(where, call, landing, async_op)


def barrier(
    group: Any = None, async_op: bool = False, device_ids: Any = None, timeout: Any = None
) -> Async:
    """Return when all ranks have called it. `device_ids` is accepted and ignored."""
    if _outside(group):
        return None
    return submit(resolve(group), calls.Barrier(), Landing(), async_op, seconds(timeout))
