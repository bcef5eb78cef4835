"""Sharding rules of products, embeddings, attention and cross entropy: where a model is cut.

| op | cut | result |
| linear | rows of the weight (`Shard(0)`, column-wise) | last dimension cut |
| linear | columns of the weight (`Shard(1)`, row-wise) | contributions, the bias once |
| linear, matmul | rows of the input | the same rows |
| matmul | the dimension that is summed over | contributions |
| embedding | rows: each rank knows part of the vocabulary | contributions |
| embedding | columns | last dimension cut |
| attention | batch or heads | the same |
| cross entropy | batch | contributions to sum or mean |
| cross entropy | classes | equal on all ranks (`_loss`) |

Source: Shoeybi et al., Megatron-LM, arXiv:1909.08053; torch.distributed.tensor._ops.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dtrain.autograd.node import make
from dtrain.comm import collectives as calls
from dtrain.distributed.tensor._dispatch import Plan, refusal
from dtrain.distributed.tensor._dtensor_spec import DTensorSpec, box_of
from dtrain.distributed.tensor._loss import class_cut_entropy
from dtrain.distributed.tensor._rules import Choice, Now, R, at, by_axis, parts_along, rule
from dtrain.distributed.tensor.placement_types import Partial
from dtrain.ops.embedding import embedding as lookup
from dtrain.ops.loss import cross_entropy as entropy

P = Partial()


@rule("linear")
def linear(op: Any, specs: list[Any], attrs: dict[str, Any]) -> Plan:
    """`x @ weight.T + bias`."""
    x, weight, _ = specs
    last = x.ndim - 1

    def choose(now: Now, axis: int) -> Choice:
        of_x, of_weight, of_bias = now
        if of_weight.is_shard(0):
            return [R, of_weight, of_bias and of_weight], at(of_weight, last)
        if of_weight.is_shard(1):
            return [at(of_weight, last), of_weight, of_bias and P], P
        if of_x.is_shard(last):
            return [of_x, at(of_x, 1), of_bias and P], P
        if of_x.is_shard():
            return [of_x, R, of_bias and R], of_x
        if of_x.is_partial("sum") or of_x.is_partial("avg"):
            return [of_x, R, of_bias and of_x], of_x
        return [R, R, of_bias and R], R

    return by_axis(specs, choose, [(*x.shape[:-1], weight.shape[0])], attrs)


@rule("matmul")
def matmul(op: Any, specs: list[Any], attrs: dict[str, Any]) -> Plan:
    """Each dimension has a name: a number from the back for the batch, "m", "k" or "n"."""
    a, b = specs
    names_a = [*range(2 - a.ndim, 0), "m", "k"] if a.ndim > 1 else ["k"]
    names_b = [*range(2 - b.ndim, 0), "k", "n"] if b.ndim > 1 else ["k"]
    batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    names: list[Any] = list(range(-len(batch), 0))
    names += ["m"] * (a.ndim > 1) + ["n"] * (b.ndim > 1)
    sizes = {"m": a.shape[-2] if a.ndim > 1 else 0, "n": b.shape[-1]}
    shape = tuple(batch[name] if isinstance(name, int) else sizes[name] for name in names)

    def on(spec: DTensorSpec, own: list[Any], name: Any, place: Any) -> Any:
        """Where an input has to be when the dimension `name` is cut."""
        if name not in own:
            return R
        dim = own.index(name)
        whole = spec.shape[dim] == (batch[name] if isinstance(name, int) else spec.shape[dim])
        return at(place, dim) if whole else R

    def choose(now: Now, axis: int) -> Choice:
        cuts = [(own[p.dim], p, spec) for p, own, spec in
                zip(now, (names_a, names_b), specs, strict=True) if p.is_shard()]  # fmt: skip
        cuts.sort(key=lambda c: (c[0] != "k", -np.prod(c[2].shape)))
        for name, place, spec in cuts:
            if isinstance(name, int) and spec.shape[place.dim] != batch[name]:
                continue  # one row that is repeated
            wants = [on(a, names_a, name, place), on(b, names_b, name, place)]
            return wants, P if name == "k" else at(place, names.index(name))
        partial = [p for p in now if p.is_partial("sum") or p.is_partial("avg")]
        if len(partial) == 1 and sum(p.is_replicate() for p in now) == 1:
            return now, partial[0]
        return [R, R], R

    return by_axis(specs, choose, [shape], attrs)


@rule("embedding")
def embedding(op: Any, specs: list[Any], attrs: dict[str, Any]) -> Plan:
    """Rows of `weight` picked by `index`."""
    weight, index = specs

    def choose(now: Now, axis: int) -> Choice:
        of_weight, of_index = now
        if of_weight.is_shard(0):
            return [of_weight, R], P
        if of_weight.is_shard(1):
            return [of_weight, R], at(of_weight, index.ndim)
        if of_index.is_shard():
            return [R, of_index], of_index
        return [R, R], R

    plan = by_axis(specs, choose, [(*index.shape, weight.shape[1])], attrs)
    if any(p.is_shard(0) for p in plan.wants[0] or ()):
        plan.run = _of_part(op, weight.placed(plan.wants[0] or ()))
    return plan


def _of_part(op: Any, spec: DTensorSpec) -> Any:
    """The lookup in a part of the vocabulary: zeros for what is in another."""
    first, rows = spec.box[0][0], spec.box[1][0]
    last = tuple(n - 1 for n in spec.mesh.shape)
    if not box_of(spec.shape, spec.mesh.shape, spec.placements, last)[1][0]:
        raise refusal(op, [spec], "has no rows on some rank")  # on all of them, that nobody waits

    def run(weight: Any, index: Any, *, padding_idx: int | None) -> Any:
        asked = index._data
        if asked.size and (asked.min() < 0 or asked.max() >= spec.shape[0]):
            bad = asked[(asked < 0) | (asked >= spec.shape[0])].reshape(-1)[0]
            raise IndexError(f"index out of range in self: index {bad}, but the embedding has "
                             f"{spec.shape[0]} rows")  # fmt: skip
        here = (asked >= first) & (asked < first + rows)
        own = None if padding_idx is None else padding_idx - first
        own = own if own is not None and 0 <= own < rows else None
        found = lookup(make(np.where(here, asked - first, 0)), weight, own)
        return found * make(here[..., None].astype(found._data.dtype))

    return run


@rule("scaled_dot_product_attention")
def attention(op: Any, specs: list[Any], attrs: dict[str, Any]) -> Plan:
    """Queries (..., L, E), keys (..., S, E), values (..., S, Ev): batch and heads may be cut."""
    query, key, value, mask = specs
    lead = query.ndim - 2
    alike = key.ndim == value.ndim == query.ndim

    def fits(dim: int) -> bool:
        heads = (query.shape[dim], key.shape[dim], value.shape[dim])
        parts = parts_along(query, dim)
        return len(set(heads)) == 1 or all(n % parts == 0 for n in heads)

    def of_mask(place: Any) -> Any:
        if mask is None:
            return None
        dim = place.dim - query.ndim + mask.ndim
        return at(place, dim) if dim >= 0 and mask.shape[dim] != 1 else R

    def choose(now: Now, axis: int) -> Choice:
        place = now[0]
        if alike and place.is_shard() and place.dim < lead and fits(place.dim):
            return [place, place, place, of_mask(place)], place
        return [R, R, R, mask and R], R

    shape = (*query.shape[:-1], value.shape[-1])
    plan = by_axis(specs, choose, [shape], attrs)
    if attrs["dropout_p"] and not all(p.is_replicate() for p in plan.out):
        raise refusal(op, specs, "with dropout_p has no sharding rule")
    return plan


@rule("cross_entropy")
def cross_entropy(op: Any, specs: list[Any], attrs: dict[str, Any]) -> Plan:
    """Scores (N, C, ...) and class indices: the batch may be cut, or else the classes."""
    x, target, weight = specs
    none = attrs["reduction"] == "none"
    indices = target.ndim == x.ndim - 1
    shape = target.shape if none else ()
    of_classes = [a for a, p in enumerate(x.placements) if p.is_shard(1)]
    alone = all(p.is_replicate() for p in (*x.placements, *target.placements) if not p.is_shard(1))
    if indices and len(of_classes) == 1 and alone and not attrs["label_smoothing"]:
        whole = tuple(R for _ in x.placements)
        wants = [x.placements, whole, weight and whole]
        return Plan(wants, whole, [shape], attrs, class_cut_entropy(x, of_classes[0]))

    def choose(now: Now, axis: int) -> Choice:
        batch = [p for p in now[:2] if p.is_shard(0)]
        if batch and indices and x.ndim > 1:
            return [batch[0], batch[0], weight and R], batch[0] if none else P
        return [R, R, weight and R], R

    plan = by_axis(specs, choose, [shape], attrs)
    cut = [a for a, p in enumerate(plan.out) if p.is_partial()]
    if cut and attrs["reduction"] == "mean":
        plan.run = _share_of_mean([x.mesh.get_group(a) for a in cut])
    return plan


def _share_of_mean(groups: list[Any]) -> Any:
    """This rank's contribution to the mean: its sum, over the weights of all ranks' rows."""

    def run(x: Any, target: Any, weight: Any, *, ignore_index: int, **rest: Any) -> Any:
        counted = target._data[target._data != ignore_index]
        amount = counted.size if weight is None else weight._data[counted].sum()
        total = np.array([amount], np.float64)
        for group in groups:
            group.issue(calls.AllReduce(total))
        rest["reduction"] = "sum"
        return entropy(x, target, weight, ignore_index=ignore_index, **rest) / float(total[0])

    return run
