"""`DistributedDataParallel`: every rank has the whole model, gradients are averaged.

buckets.py says which gradients travel together, reducer.py when; here are the class, what is
checked and copied when a model is wrapped, and buffers.
Source: torch.nn.parallel.DistributedDataParallel; Li et al., VLDB 2020.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from dtrain.comm.collectives import Broadcast
from dtrain.distributed.objects import all_gather_object
from dtrain.distributed.world import ProcessGroup, resolve
from dtrain.flat import FlatBuffer
from dtrain.nn.modules.module import Module
from dtrain.nn.parallel.buckets import MIB
from dtrain.nn.parallel.reducer import Reducer


class DistributedDataParallel(Module):
    """Wrap `module` so that backward leaves the mean of all ranks' gradients on every rank.

    Construction, forward and backward must happen on all ranks, in the same order. Construction
    checks that all ranks have the same parameters (names, shapes, dtypes), then copies parameters
    and buffers of rank 0 to all. It blocks until all ranks have come, at most the group's timeout.

    Gradients live in buckets: after a backward pass `param.grad` is a view into one, and is the
    sum over ranks, in rank order, divided by their number. Reductions run while backward goes on.
    Parameters that took no part on any rank keep their gradient as it was; nothing has to be
    declared for that.

    process_group   the ranks that share the model, default all.
    bucket_cap_mb   size of a bucket in MiB; None: 25, and 1 for the first.
    broadcast_buffers  copy rank 0's buffers to all before each forward in training mode that
                    synchronizes.
    init_sync       False leaves out the check and the first copy: the caller vouches for them.
    device_ids, output_device, dim, check_reduction   accepted and ignored: there is one device.
    find_unused_parameters, static_graph   accepted and ignored: both are found without them.
    gradient_as_bucket_view   accepted and ignored: it is always so.
    """

    def __init__(
        self,
        module: Module,
        device_ids: Sequence[Any] | None = None,
        output_device: Any = None,
        dim: int = 0,
        broadcast_buffers: bool = True,
        init_sync: bool = True,
        process_group: ProcessGroup | None = None,
        bucket_cap_mb: float | None = None,
        find_unused_parameters: bool = False,
        check_reduction: bool = False,
        gradient_as_bucket_view: bool = False,
        static_graph: bool = False,
    ) -> None:
        super().__init__()
        named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        if not named:
            raise RuntimeError(
                "DistributedDataParallel is not needed when a module doesn't have any parameter "
                "that requires a gradient."
            )
        if bucket_cap_mb is not None and bucket_cap_mb <= 0:
            raise ValueError(f"bucket_cap_mb must be positive, got {bucket_cap_mb}")
        self.process_group = resolve(process_group)
        self.module = module
        self.broadcast_buffers = broadcast_buffers
        self.require_backward_grad_sync = True
        if init_sync:
            check_same_parameters(named, self.process_group)
            copy_from_first([p for _, p in module.named_parameters()], self.process_group)
            copy_from_first([b for _, b in module.named_buffers()], self.process_group)
        cap = None if bucket_cap_mb is None else int(bucket_cap_mb * MIB)
        self.reducer = Reducer([p for _, p in named], self.process_group, cap)

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """The module's forward, after the buffers have been copied from rank 0."""
        self.reducer.prepare(self.require_backward_grad_sync)
        if self.broadcast_buffers and self.training and self.require_backward_grad_sync:
            copy_from_first([b for _, b in self.module.named_buffers()], self.process_group)
        return self.module(*inputs, **kwargs)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Inside, forward and backward leave each rank its own gradients, accumulated.

        The first pass outside reduces what has been accumulated. The forward pass must be inside
        too. Source: torch's DDP.no_sync.
        """
        before = self.require_backward_grad_sync
        self.require_backward_grad_sync = False
        try:
            yield
        finally:
            self.require_backward_grad_sync = before


def describe(name: str, parameter: Any) -> list[Any]:
    """What must be equal on all ranks for a parameter."""
    return [name, str(parameter.dtype), list(parameter.shape)]


def check_same_parameters(named: Sequence[tuple[str, Any]], group: ProcessGroup) -> None:
    """RuntimeError on every rank, naming the first parameter that differs from rank 0's."""
    own = [describe(name, parameter) for name, parameter in named]
    everyone: list[Any] = [None] * group.size()
    all_gather_object(everyone, own, group)
    for rank, theirs in enumerate(everyone[1:], 1):
        if theirs != everyone[0]:
            raise RuntimeError(_difference(everyone[0], theirs, group.ranks[rank]))


def _difference(first: list[Any], other: list[Any], rank: int) -> str:
    def show(entries: list[Any], i: int) -> str:
        if i >= len(entries):
            return "no such parameter"
        name, dtype, shape = entries[i]
        return f"'{name}' ({dtype}{shape})"

    place = next(
        i for i in range(max(len(first), len(other))) if first[i : i + 1] != other[i : i + 1]
    )
    return (
        f"DDP expects same model across all ranks, but Rank 0 has {len(first)} params, while rank "
        f"{rank} has inconsistent {len(other)} params. The first difference is parameter {place}: "
        f"rank 0 has {show(first, place)}, rank {rank} has {show(other, place)}."
    )


def copy_from_first(tensors: Sequence[Any], group: ProcessGroup) -> None:
    """Overwrite `tensors` with those of the group's first rank, one message per dtype."""
    if group.size() == 1:
        return
    by_dtype: dict[np.dtype[Any], list[Any]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor._data.dtype, []).append(tensor)
    for same in by_dtype.values():
        flat = FlatBuffer.of([t._data for t in same], align=1)
        group.issue(Broadcast(flat.array, 0))
        if group.rank() != 0:
            for tensor, view in zip(same, flat.views, strict=True):
                tensor.set_array(view)
