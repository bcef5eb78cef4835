"""From one set of placements to another: the steps, what each costs, and their gradients.

Owns: `Step`, one change along one axis of the mesh, and `redistribute`, which makes as many as it
takes. Rules for gradients, on which all of DTensor stands: the gradient of a sharded value is
sharded alike; that of a replicated one is complete and equal on all ranks; that of a `Partial` one
is the gradient of this rank's contribution, which for a sum is that of the whole. So each step has
one dual, and no gradient is ever half done between two operations.

| step | change | what moves, of a tensor of B bytes over n ranks | dual |
| gather | Shard -> Replicate | all-gather: B/n from each rank to all | slice |
| slice | Replicate -> Shard | nothing | gather |
| sum | Partial -> Replicate | all-reduce of B | keep |
| scatter | Partial -> Shard | reduce-scatter of B | gather |
| swap | Shard -> another Shard | all-to-all: B/n**2 between any two ranks | swap back |
| share | Replicate -> Partial | nothing: the first rank keeps it, the others have zeros | keep |
| keep | nothing: a gradient passes | nothing | keep |
| spread | a replicated value enters a sharded computation | nothing | sum |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dtrain.autograd.function import Function
from dtrain.autograd.node import make
from dtrain.comm import collectives as calls
from dtrain.comm.reduce import ReduceOp
from dtrain.comm.shards import GatherShards, ReduceShards
from dtrain.distributed.tensor._dtensor_spec import DTensorSpec, box_of, chunk_of, cutting_order
from dtrain.distributed.tensor.placement_types import Placement, Placements, Replicate, Shard
from dtrain.distributed.world import ProcessGroup

Array = np.ndarray[Any, Any]

_DUALS = {"gather": "slice", "slice": "gather", "sum": "keep", "scatter": "gather", "swap": "swap",
          "share": "keep", "keep": "keep", "spread": "sum"}  # fmt: skip
_OPS = {"sum": ReduceOp.SUM, "avg": ReduceOp.AVG, "min": ReduceOp.MIN, "max": ReduceOp.MAX,
        "product": ReduceOp.PRODUCT}  # fmt: skip


@dataclass(frozen=True)
class Step:
    """One change along one axis: `kind` of the table above.

    `dim` is cut or gathered, `size` its length before the cut; `other` is the dimension that a swap
    cuts instead, with `other_size`. `op`: how contributions are combined.
    """

    kind: str
    group: ProcessGroup
    dim: int = 0
    size: int = 0
    other: int = 0
    other_size: int = 0
    op: str = "sum"

    @property
    def dual(self) -> Step:
        """What happens to the gradient."""
        if self.op in ("min", "max", "product"):
            raise RuntimeError(
                f"Partial({self.op}) has no gradient here: redistribute the input to Replicate() "
                "before the reduction"
            )
        kind = _DUALS[self.kind]
        if self.kind == "swap":
            return replace(
                self, dim=self.other, size=self.other_size, other=self.dim, other_size=self.size
            )
        return replace(self, kind=kind, op="sum")

    def weight(self) -> float:
        """What the gradient is multiplied by: a mean hands 1/n of it to each contribution."""
        n = self.group.size()
        if self.op != "avg":
            return 1.0
        return {"sum": 1 / n, "scatter": 1 / n, "share": float(n)}[self.kind]

    def run(self, x: Array) -> Array:
        """The step on this rank's array: a new one, or a view of it."""
        return _RUN[self.kind](self, x)


class _Apply(Function):
    """A step on a Tensor."""

    @staticmethod
    def forward(ctx: Any, step: Step, tensor: Any) -> Any:
        ctx.step = step
        return make(step.run(tensor._data))

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        weight = ctx.step.weight()
        return None, apply(ctx.step.dual, grad if weight == 1.0 else grad * weight)


def apply(step: Step, tensor: Any) -> Any:
    """The step on a local Tensor; differentiable."""
    if step.kind == "keep" and step.op == "sum":
        return tensor
    return _Apply.apply(step, tensor)


# --- what the steps do ---------------------------------------------------------------------------


def _keep(step: Step, x: Array) -> Array:
    return x


def _slice(step: Step, x: Array) -> Array:
    start, length = chunk_of(x.shape[step.dim], step.group.size(), step.group.rank())
    index = (slice(None),) * step.dim + (slice(start, start + length),)
    return np.ascontiguousarray(x[index])


def _share(step: Step, x: Array) -> Array:
    if step.group.rank() == 0 or step.op in ("avg", "min", "max"):
        return x
    return np.zeros_like(x) if step.op == "sum" else np.ones_like(x)


def _sum(step: Step, x: Array) -> Array:
    out = np.array(x, order="C")
    step.group.issue(calls.AllReduce(out, _OPS[step.op]))
    return out


def _rows(step: Step, shape: tuple[int, ...]) -> tuple[tuple[int, ...], list[list[slice]]]:
    """The shape with `dim` in front and whole, and each rank's piece of it laid flat."""
    rest = shape[: step.dim] + shape[step.dim + 1 :]
    width = int(np.prod(rest, dtype=np.int64))
    size, cuts = step.group.size(), []
    for rank in range(size):
        start, length = chunk_of(step.size, size, rank)
        cuts.append([slice(start * width, (start + length) * width)])
    return (step.size, *rest), cuts


def _front(x: Array, dim: int) -> Array:
    """The elements one after the other, `dim` running slowest."""
    return np.ascontiguousarray(np.moveaxis(x, dim, 0)).reshape(-1)


def _back(flat: Array, shape: tuple[int, ...], dim: int) -> Array:
    """`_front` undone."""
    return np.ascontiguousarray(np.moveaxis(flat.reshape(shape), 0, dim))


def _gather(step: Step, x: Array) -> Array:
    shape, cuts = _rows(step, x.shape)
    out = np.empty(int(np.prod(shape, dtype=np.int64)), x.dtype)
    step.group.issue(GatherShards(_front(x, step.dim), out, cuts))
    return _back(out, shape, step.dim)


def _scatter(step: Step, x: Array) -> Array:
    shape, cuts = _rows(step, x.shape)
    own = cuts[step.group.rank()][0]
    out = np.empty(own.stop - own.start, x.dtype)
    step.group.issue(ReduceShards(_front(x, step.dim), out, cuts, _OPS[step.op]))
    return _back(out, (-1 if out.size else 0, *shape[1:]), step.dim)


def _swap(step: Step, x: Array) -> Array:
    """Whole along `dim` and cut along `other` from now on; it was the other way round."""
    n, me = step.group.size(), step.group.rank()
    pieces = [chunk_of(step.other_size, n, r) for r in range(n)]
    lead = (slice(None),) * step.other
    given = [np.ascontiguousarray(x[(*lead, slice(a, a + length))]) for a, length in pieces]
    shapes = []
    for rank in range(n):
        shape = list(x.shape)
        shape[step.dim] = chunk_of(step.size, n, rank)[1]
        shape[step.other] = pieces[me][1]
        shapes.append(tuple(shape))
    sizes = [int(np.prod(shape, dtype=np.int64)) for shape in shapes]
    out = np.empty(sum(sizes), x.dtype)
    flat = np.concatenate([part.reshape(-1) for part in given])
    step.group.issue(calls.AllToAll(flat, out, [part.size for part in given], sizes))
    parts = np.split(out, np.cumsum(sizes)[:-1])
    return np.concatenate([p.reshape(s) for p, s in zip(parts, shapes, strict=True)], step.dim)


_RUN = {"keep": _keep, "spread": _keep, "slice": _slice, "share": _share, "sum": _sum,
        "gather": _gather, "scatter": _scatter, "swap": _swap}  # fmt: skip


# --- which steps it takes ------------------------------------------------------------------------


def route(spec: DTensorSpec, target: Placements) -> list[Step]:
    """The steps from a spec's placements to others, none when they are equal."""
    if spec.placements == target:
        return []
    current: list[Placement] = list(spec.placements)
    steps: list[Step] = []
    for axis, wanted in _stages(spec, target):
        steps += _change(spec, current, axis, wanted)
        current[axis] = wanted
    return steps


def _stages(spec: DTensorSpec, target: Placements) -> list[tuple[int, Placement]]:
    """(axis, new placement) in an order in which each cut is undone before those around it."""
    before = spec.placements
    changed = [a for a, (p, t) in enumerate(zip(before, target, strict=True)) if p != t]
    touched = {p.dim for a in changed for p in (before[a], target[a]) if isinstance(p, Shard)}
    cutters = [
        {a for a in range(len(before)) if before[a].is_shard(d) or target[a].is_shard(d)}
        for d in touched
    ]
    crowded = [axes for axes in cutters if len(axes) > 1]
    if not crowded:
        return [(axis, target[axis]) for axis in changed]
    involved = set(changed).union(*crowded)
    undone = [a for a in reversed(cutting_order(before)) if a in involved]
    undone += [a for a in changed if a not in undone]
    redone = [a for a in cutting_order(target) if a in involved]
    redone += [a for a in sorted(involved) if target[a].is_partial()]
    return [(a, Replicate()) for a in undone] + [(a, target[a]) for a in redone]


def _change(
    spec: DTensorSpec, current: Sequence[Placement], axis: int, wanted: Placement
) -> list[Step]:
    """The steps along one axis, for a tensor that lies at `current`."""
    now, group = current[axis], spec.mesh.get_group(axis)
    if now == wanted:
        return []
    free = [*current[:axis], Replicate(), *current[axis + 1 :]]
    sizes = box_of(spec.shape, spec.mesh.shape, free, spec.place)[1]  # without this axis' cut

    def step(kind: str, dim: int = 0, op: str = "sum") -> Step:
        return Step(kind, group, dim, sizes[dim] if sizes else 0, op=op)

    if isinstance(now, Shard):
        if isinstance(wanted, Shard) and wanted.dim != now.dim:
            one = replace(step("gather", now.dim), kind="swap")
            return [replace(one, other=wanted.dim, other_size=sizes[wanted.dim])]
        first = step("gather", now.dim)
        rest = [*current[:axis], Replicate(), *current[axis + 1 :]]
        return [first, *_change(spec, rest, axis, wanted)]
    if now.is_replicate():
        if isinstance(wanted, Shard):
            return [step("slice", wanted.dim)]
        return [step("share", op=wanted.reduce_op)]  # type: ignore[attr-defined]
    op = now.reduce_op  # type: ignore[attr-defined]
    if isinstance(wanted, Shard):
        return [step("scatter", wanted.dim, op)]
    first = step("sum", op=op)
    return [first, *_change(spec, free, axis, wanted)]


def redistribute(local: Any, spec: DTensorSpec, target: Placements) -> Any:
    """`local`, a Tensor placed as `spec` says, placed as `target`; differentiable.

    Every rank of the mesh calls it, with the same specs. Blocks as its collectives do, at most the
    groups' timeouts; nothing happens where the placements are equal.
    """
    for step in route(spec, target):
        local = apply(step, local)
    return local


class _Adopt(Function):
    """What a gather has given already, on its way into computations that differ between ranks: the
    gradient is summed and cut at once, a reduce-scatter in place of an all-reduce and a slice.
    """

    @staticmethod
    def forward(ctx: Any, step: Step, before: Any, gathered: Any) -> Any:
        ctx.step = step
        return make(gathered)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return None, apply(replace(ctx.step, kind="scatter"), grad), None


def spread_gathered(step: Step, before: Any, gathered: Any) -> Any:
    """`spread` of what `step`, a gather, made of the Tensor `before`."""
    return _Adopt.apply(step, before, gathered._data)


def spread(local: Any, mesh: Any, axes: Sequence[int]) -> Any:
    """A replicated Tensor on its way into computations that differ along `axes`: the contributions
    to its gradient are summed up over them.
    """
    for axis in axes:
        local = _Apply.apply(Step("spread", mesh.get_group(axis)), local)
    return local
