"""The mean of parameters over ranks: one all-reduce for each dtype.

Rules: sums in rank order, so that all ranks get the same bits; only parameters with a gradient
take part, and those must be the same ones on all ranks (else: CollectiveMismatch).
Source: torch.distributed.algorithms.model_averaging.utils.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dtrain.comm.collectives import AllReduce
from dtrain.comm.reduce import ReduceOp
from dtrain.distributed.world import GroupMember, ProcessGroup, resolve
from dtrain.flat import FlatBuffer
from dtrain.nn.parameter import Parameter


def flat_of(tensors: Iterable[Any], group: ProcessGroup) -> list[tuple[list[Any], FlatBuffer]]:
    """Tensors by dtype, with copies of them in a flat array that the ranks of `group` share."""
    by_dtype: dict[Any, list[Any]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor._data.dtype, []).append(tensor)
    return [
        (same, FlatBuffer.of([t._data for t in same], allocate=group.arrays.empty))
        for same in by_dtype.values()
    ]


def average_parameters(params: Iterable[Any], process_group: Any) -> None:
    """Overwrite every parameter with its mean over the ranks of the group (None: the default).

    Blocks until all ranks have come; sends about twice the parameters' bytes. Ranks outside of the
    group do nothing.
    """
    if process_group is GroupMember.NON_GROUP_MEMBER:
        return
    group = resolve(process_group)
    for tensors, flat in flat_of(params, group):
        group.issue(AllReduce(flat.array, ReduceOp.AVG))
        for tensor, mean in zip(tensors, flat.views, strict=True):
            tensor.set_array(mean)


def get_params_to_average(params: Iterable[Any]) -> list[Any]:
    """The parameters that have a gradient, of a model's parameters or an optimizer's groups."""
    found: list[Any] = []
    for entry in params:
        if isinstance(entry, Parameter):
            found.append(entry)
        elif isinstance(entry, dict):
            found += entry["params"]
        else:
            raise NotImplementedError(f"Parameter input of type {type(entry)} is not supported")
    return [param for param in found if param.grad is not None]


def average_parameters_or_parameter_groups(params: Iterable[Any], process_group: Any) -> None:
    """`average_parameters` of a model's parameters, or of an optimizer's groups."""
    average_parameters(get_params_to_average(params), process_group)
