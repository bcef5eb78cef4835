"""Users' own ways to move gradients and parameters of a unit, in place of the engine's.

Owns: `GradientHook` and `ReduceScatter`, what a hook of `FullyShardedDataParallel` and a custom
reduce-scatter of `fully_shard` are asked, and the layout they see. Rules: 1. They get flat tensors
of equal parts, one for each rank, each the rank's rows of all parameters one after the other and
zeros behind, so that a reduce-scatter of tensors does it. 2. They run where they are called, in
backward, and nothing beside them. 3. Which parameters any rank has a gradient of is told apart, by
a sum of one number for each. Source: torch.distributed.fsdp.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any, Protocol

import numpy as np

from dtrain import dtypes
from dtrain.autograd.node import make
from dtrain.comm.collectives import AllReduce
from dtrain.comm.parts import Cuts, length, packed, unpack
from dtrain.device import CPU
from dtrain.distributed.fsdp.meter import Issued
from dtrain.distributed.world import ProcessGroup
from dtrain.flat import Array
from dtrain.ops.create import empty
from dtrain.tensor import Tensor


class Reduction(Protocol):
    """How gradients become this rank's part of their sum or mean."""

    def allocate(self, count: int, dtype: np.dtype[Any]) -> Tensor:
        """A flat tensor of that many elements, uninitialised."""
        ...

    def reduce(self, grad: Tensor, output: Tensor, group: ProcessGroup, op: Any) -> None:
        """Fill `output` with this rank's part of `grad`, of all ranks."""
        ...


class GradientHook:
    """`hook(state, grad, output)` where gradients are sharded, `hook(state, grad)` where each rank
    keeps all of them. It divides by the number of ranks itself.
    """

    def __init__(self, hook: Callable[..., Any], state: Any) -> None:
        self._hook, self._state = hook, state

    def allocate(self, count: int, dtype: np.dtype[Any]) -> Tensor:
        return empty(count, dtype=dtypes.from_numpy(dtype))  # type: ignore[no-any-return]

    def reduce(self, grad: Tensor, output: Tensor, group: ProcessGroup, op: Any) -> None:
        self._hook(self._state, grad, output)

    def all_reduce(self, flat: Array) -> None:
        """Change gradients, in place, to what is to be kept of those of all ranks."""
        grad = make(flat)
        self._hook(self._state, grad)
        if grad._data is not flat:  # it cast them: `grad.data = `
            np.copyto(flat, grad._data, casting="same_kind")


class ReduceScatter:
    """`comm(output_tensor=, input_tensor=, group=, op=)`, in memory of `comm.allocate`."""

    def __init__(self, comm: Any) -> None:
        self._comm = comm

    def allocate(self, count: int, dtype: np.dtype[Any]) -> Tensor:
        return allocated(self._comm, count, dtype)

    def reduce(self, grad: Tensor, output: Tensor, group: ProcessGroup, op: Any) -> None:
        work = self._comm(output_tensor=output, input_tensor=grad, group=group, op=op)
        if work is not None:
            work.wait()


def allocated(comm: Any, count: int, dtype: np.dtype[Any]) -> Tensor:
    """Memory of a custom collective; RuntimeError when it is not what was asked for."""
    kind = dtypes.from_numpy(dtype)
    found: Tensor = comm.allocate((count,), dtype=kind, device=CPU)
    if tuple(found.shape) != (count,) or found.dtype is not kind:
        raise RuntimeError(
            f"{type(comm).__name__}.allocate(({count},), dtype={kind}) gave a tensor of shape "
            f"{list(found.shape)} and dtype {found.dtype}"
        )
    return found


def reduce_by(
    how: Reduction, room: Array, out: Array, cuts: Sequence[Cuts], group: ProcessGroup, op: Any
) -> Issued:
    """Reduce a unit's gradients `room` to this rank's, packed in `out`; behind both a flag for each
    parameter. Blocks for what `how` does, and for the flags.
    """
    began, rank = monotonic(), group.rank()
    longest, own = max(map(length, cuts)), length(cuts[rank])
    grad, output = how.allocate(group.size() * longest, out.dtype), how.allocate(longest, out.dtype)
    for part, pieces in zip(grad._data.reshape(len(cuts), longest), cuts, strict=True):
        part[: length(pieces)] = packed(room, pieces)
        part[length(pieces) :] = 0
    how.reduce(grad, output, group, op)
    if output.numel() != longest:
        raise RuntimeError(
            f"a communication hook left {list(output.shape)} in place of an output of {longest} "
            f"elements, on rank {rank} of the group"
        )
    np.copyto(out[:own], output._data[:own], casting="same_kind")
    out[own:] = room[room.size - (out.size - own) :]
    return Issued(group.issue(AllReduce(out[own:])), began, beside=False)


def gather_by(
    comm: Any, sent: Array, whole: Array, cuts: Sequence[Cuts], group: ProcessGroup
) -> None:
    """Fill `whole` with what all ranks send, by `comm(output_tensor=, input_tensor=, group=)`."""
    longest = max(map(length, cuts))
    given = allocated(comm, longest, whole.dtype)
    found = allocated(comm, longest * group.size(), whole.dtype)
    given._data[: sent.size] = sent
    given._data[sent.size :] = 0
    work = comm(output_tensor=found, input_tensor=given, group=group)
    if work is not None:
        work.wait()
    for part, pieces in zip(found._data.reshape(len(cuts), longest), cuts, strict=True):
        unpack(part[: length(pieces)], whole, pieces)
