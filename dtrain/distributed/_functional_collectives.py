"""Collectives that return a new tensor and leave their argument as it is.

Owns: torch's functions of this module over `nn.functional` (those that end in `_autograd`) and over
the plain collectives (the others: gradients do not flow through them). A result is complete when it
is returned, so that `wait_tensor` has nothing to do. `reduceOp` is "sum", "avg", "product", "min",
"max", "band", "bor" or "bxor". `group` is a process group or its name, a mesh of one axis, a mesh
and the number of an axis, or the global ranks of a group that is made when there is none of them.
`tag` is accepted and changes nothing. Source: torch.distributed._functional_collectives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dtrain.autograd.grad_mode import no_grad
from dtrain.autograd.node import make
from dtrain.comm.reduce import ReduceOp
from dtrain.distributed import collectives as plain
from dtrain.distributed.device_mesh import DeviceMesh
from dtrain.distributed.groups import new_group
from dtrain.distributed.nn import functional
from dtrain.distributed.world import ProcessGroup, current_world, resolve
from dtrain.ops.join import cat, chunk
from dtrain.tensor import Tensor

Splits = list[int] | None


def _group(group: Any) -> ProcessGroup:
    """The group that an argument means."""
    if isinstance(group, DeviceMesh):
        return group.get_group()
    if isinstance(group, tuple) and len(group) == 2 and isinstance(group[0], DeviceMesh):
        return group[0].get_group(group[1])
    made = current_world().made
    if isinstance(group, str):
        found = [one for one in made if one.group_name == group]
        if not found:
            raise ValueError(f"no process group of this rank is named {group!r}")
        return found[0]
    if isinstance(group, list):
        found = [one for one in made if list(one.ranks) == group]
        return found[0] if found else resolve(new_group(group, sort_ranks=False))
    return resolve(group)


def _op(name: str) -> ReduceOp:
    op = getattr(ReduceOp, name.upper(), None)
    if not isinstance(op, ReduceOp):
        raise ValueError(f"unsupported reduce op {name!r}")
    return op


def _like(tensor: Tensor, *shape: int) -> Any:
    return make(np.empty(shape, tensor._data.dtype))


def _parts(tensor: Tensor, dim: int, group: ProcessGroup) -> list[Tensor]:
    """Equal parts of `tensor` along a dimension, one for each rank; ValueError if it has none."""
    if tensor.shape[dim] % group.size():
        raise ValueError(
            f"input dimension {dim} ({tensor.shape[dim]}) must be a multiple of the group's size "
            f"({group.size()})"
        )
    return [part.contiguous() for part in chunk(tensor, group.size(), dim)]


def wait_tensor(tensor: Tensor) -> Tensor:
    """The tensor: it is complete already."""
    return tensor


def broadcast(self: Tensor, src: int, group: Any, tag: str = "") -> Tensor:
    """A copy of `self` of rank `src`, which is a rank of the group."""
    out = self.detach().clone()
    plain.broadcast(out, group=_group(group), group_src=src)
    return out


def all_reduce(self: Tensor, reduceOp: str, group: Any, tag: str = "") -> Tensor:
    """The combination of `self` of all ranks."""
    out = self.detach().clone()
    plain.all_reduce(out, _op(reduceOp), _group(group))
    return out


def all_gather_single_autograd(self: Tensor, gather_dim: int, group: Any, tag: str = "") -> Tensor:
    """`self` of all ranks, one after the other along `gather_dim`. Differentiable."""
    where = _group(group)
    head, *tail = self.shape
    whole = functional._all_gather_base(_like(self, where.size() * head, *tail), self, where)
    return whole if gather_dim == 0 else cat(chunk(whole, where.size(), 0), gather_dim)


def reduce_scatter_single_autograd(
    self: Tensor, reduceOp: str, scatter_dim: int, group: Any, tag: str = ""
) -> Tensor:
    """This rank's part, along `scatter_dim`, of the combination of `self` of all ranks.

    Differentiable, for "sum" and "avg". ValueError when the parts are not of one size.
    """
    where = _group(group)
    parts = _parts(self, scatter_dim, where)
    out = _like(self, *parts[0].shape)
    return functional.reduce_scatter(out, parts, _op(reduceOp), where)


def all_to_all_single_autograd(
    self: Tensor, output_split_sizes: Splits, input_split_sizes: Splits, group: Any, tag: str = ""
) -> Tensor:
    """As `all_to_all_single`. Differentiable."""
    where = _group(group)
    rows = self.shape[0] if output_split_sizes is None else sum(output_split_sizes)
    out = _like(self, rows, *self.shape[1:])
    return functional.all_to_all_single(out, self, output_split_sizes, input_split_sizes, where)


def all_gather_single(self: Tensor, gather_dim: int, group: Any, tag: str = "") -> Tensor:
    """`self` of all ranks, one after the other along `gather_dim`."""
    with no_grad():
        return all_gather_single_autograd(self, gather_dim, group)


def reduce_scatter_single(
    self: Tensor, reduceOp: str, scatter_dim: int, group: Any, tag: str = ""
) -> Tensor:
    """This rank's part, along `scatter_dim`, of the combination of `self` of all ranks."""
    where = _group(group)
    parts = _parts(self.detach(), scatter_dim, where)
    out: Tensor = _like(self, *parts[0].shape)
    plain.reduce_scatter(out, parts, _op(reduceOp), where)
    return out


def all_to_all_single(
    self: Tensor, output_split_sizes: Splits, input_split_sizes: Splits, group: Any, tag: str = ""
) -> Tensor:
    """Part r of `self` of rank s, as part s on rank r; equal parts without sizes."""
    with no_grad():
        return all_to_all_single_autograd(self, output_split_sizes, input_split_sizes, group)


all_gather_tensor, all_gather_tensor_autograd = all_gather_single, all_gather_single_autograd
reduce_scatter_tensor = reduce_scatter_single
reduce_scatter_tensor_autograd = reduce_scatter_single_autograd


def permute_tensor(self: Tensor, src_dst: list[int], group: Any, tag: str = "") -> Tensor:
    """`self` of the rank that sends to this one; rank m of the group sends to rank `src_dst[m]`."""
    where = _group(group)
    if sorted(src_dst) != list(range(where.size())):
        raise ValueError(f"src_dst {src_dst} is not a permutation of range({where.size()})")
    given, taken = [0] * where.size(), [0] * where.size()
    given[src_dst[where.rank()]] = taken[src_dst.index(where.rank())] = self.numel()
    return all_to_all_single(self.reshape(-1), taken, given, where).reshape(*self.shape)


def all_reduce_coalesced(
    self: Sequence[Tensor], reduceOp: str, group: Any, tag: str = ""
) -> list[Tensor]:
    """`all_reduce` of several tensors."""
    return [all_reduce(tensor, reduceOp, group) for tensor in self]


def all_gather_into_tensor_coalesced(
    self: Sequence[Tensor], group: Any, tag: str = ""
) -> list[Tensor]:
    """`all_gather_single` of several tensors along dimension 0."""
    return [all_gather_single(tensor, 0, group) for tensor in self]


def reduce_scatter_tensor_coalesced(
    inputs: Sequence[Tensor], reduceOp: str, scatter_dim: Sequence[int], group: Any, tag: str = ""
) -> list[Tensor]:
    """`reduce_scatter_single` of several tensors, each along its own dimension."""
    pairs = zip(inputs, scatter_dim, strict=True)
    return [reduce_scatter_single(tensor, reduceOp, dim, group) for tensor, dim in pairs]
