"""Differentiable collectives: the backward of each is the dual collective.

What is differentiated is the sum of the losses of all ranks. Rules: 1. All ranks of the group call
backward through the result, also those that have no use for it (multiply by 0), and the input
requires grad on all ranks or on none: a rank whose graph lacks the call does not take part in its
backward. 2. The engine runs the newest call first, so backward collectives run in the reverse
order of the forward ones, the same on all ranks: they cannot wait for each other crosswise.
3. Backward is differentiable itself. 4. Only linear operators are taken: SUM, AVG, PREMUL_SUM.
Source: torch.distributed.nn.functional.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dtrain.autograd.function import Function
from dtrain.autograd.node import make
from dtrain.comm.reduce import ReduceOp
from dtrain.distributed import collectives as plain
from dtrain.distributed.world import ProcessGroup, resolve
from dtrain.tensor import Tensor

Kind = tuple[tuple[int, ...], np.dtype[Any]]  # shape and dtype


def _check_linear(op: ReduceOp, what: str) -> None:
    if op.name not in ("SUM", "AVG", "PREMUL_SUM"):
        raise ValueError(
            f"{what}: ReduceOp.{op} has no gradient here (SUM, AVG and PREMUL_SUM have); use "
            f"dtrain.distributed.{what} on a detached tensor if none is needed"
        )


def _scaled(grad: Tensor, op: ReduceOp, group: ProcessGroup) -> Tensor:
    """The gradient of one contribution, given that of the result."""
    if op.name == "AVG":
        return grad / group.size()
    return grad if op.factor is None else grad * op.factor


def _kind(tensor: Tensor) -> Kind:
    return tensor._data.shape, tensor._data.dtype


def _empty(kind: Kind) -> Any:
    return make(np.empty(*kind))


def _zeros(kind: Kind) -> Any:
    return make(np.zeros(*kind))


class _Broadcast(Function):
    @staticmethod
    def forward(ctx: Any, src: int, group: ProcessGroup, tensor: Tensor) -> Tensor:
        ctx.src, ctx.group = src, group
        out = tensor.clone()
        plain.broadcast(out, group=group, group_src=src)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None, None, _Reduce.apply(ctx.src, ReduceOp.SUM, ctx.group, grad)


class _Reduce(Function):
    @staticmethod
    def forward(ctx: Any, dst: int, op: ReduceOp, group: ProcessGroup, tensor: Tensor) -> Tensor:
        ctx.dst, ctx.op, ctx.group = dst, op, group
        out = tensor.clone()
        plain.reduce(out, op=op, group=group, group_dst=dst)
        return out if group.rank() == dst else _zeros(_kind(tensor))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        grad = _Broadcast.apply(ctx.dst, ctx.group, grad)
        return None, None, None, _scaled(grad, ctx.op, ctx.group)


class _AllReduce(Function):
    @staticmethod
    def forward(ctx: Any, op: ReduceOp, group: ProcessGroup, tensor: Tensor) -> Tensor:
        ctx.op, ctx.group = op, group
        out = tensor.clone()
        plain.all_reduce(out, op, group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None, None, _AllReduce.apply(ctx.op, ctx.group, grad)


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, dst: int, group: ProcessGroup, tensor: Tensor) -> tuple[Tensor, ...]:
        ctx.dst, ctx.group = dst, group
        parts = [_zeros(_kind(tensor)) for _ in range(group.size())]
        plain.gather(tensor, parts if group.rank() == dst else None, group=group, group_dst=dst)
        return tuple(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, None, _Scatter.apply(ctx.dst, ctx.group, *grads)


class _Scatter(Function):
    @staticmethod
    def forward(ctx: Any, src: int, group: ProcessGroup, *tensors: Tensor) -> Tensor:
        ctx.src, ctx.group = src, group
        out = _empty(_kind(tensors[group.rank()]))
        parts = list(tensors) if group.rank() == src else None
        plain.scatter(out, parts, group=group, group_src=src)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None, None, *_Gather.apply(ctx.src, ctx.group, grad)


class _AllGather(Function):
    @staticmethod
    def forward(ctx: Any, group: ProcessGroup, tensor: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        parts = [_empty(_kind(tensor)) for _ in range(group.size())]
        plain.all_gather(parts, tensor, group)
        return tuple(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, _ReduceScatter.apply(ReduceOp.SUM, ctx.group, _empty(_kind(grads[0])), *grads)


class _ReduceScatter(Function):
    @staticmethod
    def forward(ctx: Any, op: ReduceOp, group: ProcessGroup, out: Tensor, *parts: Tensor) -> Tensor:
        ctx.op, ctx.group = op, group
        plain.reduce_scatter(out, list(parts), op, group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        grads = _AllGather.apply(ctx.group, _scaled(grad, ctx.op, ctx.group))
        return None, None, None, *grads


class _AllGatherSingle(Function):
    @staticmethod
    def forward(ctx: Any, group: ProcessGroup, out: Tensor, tensor: Tensor) -> Tensor:
        ctx.group, ctx.kind = group, _kind(tensor)
        plain.all_gather_single(out, tensor, group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None, None, _ReduceScatterSingle.apply(ctx.group, _empty(ctx.kind), grad)


class _ReduceScatterSingle(Function):
    @staticmethod
    def forward(ctx: Any, group: ProcessGroup, out: Tensor, tensor: Tensor) -> Tensor:
        ctx.group, ctx.kind = group, _kind(tensor)
        plain.reduce_scatter_single(out, tensor, ReduceOp.SUM, group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None, None, _AllGatherSingle.apply(ctx.group, _empty(ctx.kind), grad)


class _AllToAll(Function):
    @staticmethod
    def forward(
        ctx: Any, group: ProcessGroup, outputs: Sequence[Tensor], *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.group, ctx.kinds = group, [_kind(tensor) for tensor in inputs]
        plain.all_to_all(list(outputs), list(inputs), group)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, None, *_AllToAll.apply(ctx.group, [_empty(kind) for kind in ctx.kinds], *grads)


class _AllToAllSingle(Function):
    @staticmethod
    def forward(
        ctx: Any, group: ProcessGroup, out: Tensor, out_splits: Any, in_splits: Any, tensor: Tensor
    ) -> Tensor:
        ctx.group, ctx.kind, ctx.splits = group, _kind(tensor), (in_splits, out_splits)
        plain.all_to_all_single(out, tensor, out_splits, in_splits, group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        back = _AllToAllSingle.apply(ctx.group, _empty(ctx.kind), *ctx.splits, grad)
        return None, None, None, None, back


def broadcast(tensor: Tensor, src: int, group: Any = None) -> Tensor:
    """A copy of `tensor` of global rank `src`, on all ranks."""
    where = resolve(group)
    return _Broadcast.apply(where.group_rank_of(src), where, tensor)


def gather(tensor: Tensor, dst: int = 0, group: Any = None) -> tuple[Tensor, ...]:
    """`tensor` of every rank, on global rank `dst`; zeros elsewhere."""
    where = resolve(group)
    return _Gather.apply(where.group_rank_of(dst), where, tensor)


def scatter(tensors: Sequence[Tensor], src: int = 0, group: Any = None) -> Tensor:
    """`tensors[r]` of global rank `src`, on rank r.

    The other ranks give tensors of the same shape, whose values do not matter.
    """
    where = resolve(group)
    if len(tensors) != where.size():
        raise ValueError(f"scatter: expected {where.size()} tensors, got {len(tensors)}")
    return _Scatter.apply(where.group_rank_of(src), where, *tensors)


def reduce(tensor: Tensor, dst: int, op: ReduceOp = ReduceOp.SUM, group: Any = None) -> Tensor:
    """`op` over `tensor` of all ranks, on global rank `dst`; zeros elsewhere."""
    where = resolve(group)
    _check_linear(op, "reduce")
    return _Reduce.apply(where.group_rank_of(dst), op, where, tensor)


def reduce_scatter(
    output: Tensor, input_list: Sequence[Tensor], op: ReduceOp = ReduceOp.SUM, group: Any = None
) -> Tensor:
    """`op` over `input_list[r]` of all ranks, on rank r; written to `output` as well."""
    _check_linear(op, "reduce_scatter")
    return _ReduceScatter.apply(op, resolve(group), output, *input_list)


def all_gather(tensor: Tensor, group: Any = None) -> tuple[Tensor, ...]:
    """`tensor` of every rank, on all ranks."""
    return _AllGather.apply(resolve(group), tensor)


def _all_gather_base(output_tensor: Tensor, input_tensor: Tensor, group: Any = None) -> Tensor:
    """`input_tensor` of all ranks one after the other; written to `output_tensor` as well."""
    return _AllGatherSingle.apply(resolve(group), output_tensor, input_tensor)


def all_to_all(
    output_tensor_list: Sequence[Tensor], input_tensor_list: Sequence[Tensor], group: Any = None
) -> tuple[Tensor, ...]:
    """`input_tensor_list[r]` of rank s, at place s on rank r; written to the outputs as well."""
    return _AllToAll.apply(resolve(group), output_tensor_list, *input_tensor_list)


def all_to_all_single(
    output: Tensor,
    input: Tensor,
    output_split_sizes: list[int] | None = None,
    input_split_sizes: list[int] | None = None,
    group: Any = None,
) -> Tensor:
    """Part r of `input` of rank s, as part s on rank r; written to `output` as well."""
    return _AllToAllSingle.apply(
        resolve(group), output, output_split_sizes, input_split_sizes, input
    )


def all_reduce(tensor: Tensor, op: ReduceOp = ReduceOp.SUM, group: Any = None) -> Tensor:
    """`op` over `tensor` of all ranks, on all ranks; `tensor` keeps its values."""
    _check_linear(op, "all_reduce")
    return _AllReduce.apply(op, resolve(group), tensor)
