"""Sharding rules of views, selections and joins: where a cut goes when the shape changes.

A cut goes along where whole slices of the dimension do: through a permutation, and through a
reshape where the cut dimension is the slowest of those it is merged with or divided into, in equal
parts. Elsewhere the dimension is made whole first (an all-gather). Source:
torch.distributed.tensor._ops._view_ops.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from dtrain.distributed.tensor._dispatch import Plan
from dtrain.distributed.tensor._dtensor_spec import DTensorSpec
from dtrain.distributed.tensor._rules import Choice, Now, R, at, by_axis, parts_along, rule


def carried(specs: list[Any], places: dict[int, int], shapes: Any, attrs: Any) -> Plan:
    """The plan of a linear op with one input: `places` says where a cut dimension goes."""

    def choose(now: Now, axis: int) -> Choice:
        place = now[0]
        if not place.is_shard():
            return [place], place
        if place.dim not in places:
            return [R], R
        return [place], at(place, places[place.dim])

    return by_axis(specs, choose, shapes, attrs)


def sized(plan: Plan, spec: DTensorSpec, shape: Sequence[int]) -> Plan:
    """The plan with the shape of this rank's part as the attribute `shape`."""
    plan.attrs["shape"] = spec.placed(plan.out, shape).box[1]
    return plan


def groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The dimensions of two shapes that belong together, those of size 1 left out."""
    a = [d for d, n in enumerate(old) if n != 1]
    b = [d for d, n in enumerate(new) if n != 1]
    found = []
    while a or b:
        left, right = [a.pop(0)] if a else [], [b.pop(0)] if b else []
        while math.prod(old[d] for d in left) != math.prod(new[d] for d in right):
            if math.prod(old[d] for d in left) < math.prod(new[d] for d in right):
                left.append(a.pop(0))
            else:
                right.append(b.pop(0))
        found.append((left, right))
    return found


@rule("reshape", "view")
def reshape(op: Any, specs: list[Any], attrs: dict[str, Any]) -> Plan:
    """See above; a dimension that stays alone may be cut unevenly."""
    spec, new = specs[0], attrs["shape"]
    places: dict[int, int] = {}
    if math.prod(new):
        for left, right in groups(spec.shape, new):
            first, target = left[0], right[0]
            parts = parts_along(spec, first)
            even = spec.shape[first] % parts == 0 and new[target] % parts == 0
            if even or len(left) == len(right) == 1:
                places[first] = target
    return sized(carried(specs, places, [new], attrs), spec, new)


@rule("permute")
def permute(op: Any, specs: list[Any], attrs: dict[str, Any]) -> Plan:
    """Cuts go along."""
    dims = attrs["dims"]
    order = [d % specs[0].ndim for d in dims]
    shape = tuple(specs[0].shape[d] for d in order)
    return carried(specs, {d: i for i, d in enumerate(order)}, [shape], attrs)


@rule("expand")
def expand(op: Any, specs: list[Any], attrs: dict[str, Any]) -> Plan:
    """Dimensions that are not repeated keep their cuts."""
    spec, new = specs[0], attrs["shape"]
    lead = len(new) - spec.ndim
    places = {d: d + lead for d, n in enumerate(spec.shape) if new[d + lead] == n}
    return sized(carried(specs, places, [new], attrs), spec, new)


def _others(ndim: int, *dims: int) -> dict[int, int]:
    return {d: d for d in range(ndim) if d not in dims}


@rule("narrow")
def narrow(op: Any, specs: list[Any], attrs: dict[str, Any]) -> Plan:
    """The narrowed dimension is made whole."""
    shape, dim = list(specs[0].shape), attrs["dim"]
    shape[dim] = attrs["length"]
    return carried(specs, _others(len(shape), dim), [tuple(shape)], attrs)


@rule("split")
def split(op: Any, specs: list[Any], attrs: dict[str, Any]) -> Plan:
    """The split dimension is made whole."""
    shape, dim = specs[0].shape, attrs["dim"]
    shapes = [(*shape[:dim], n, *shape[dim + 1 :]) for n in attrs["sizes"]]
    return carried(specs, _others(len(shape), dim), shapes, attrs)


@rule("unbind")
def unbind(op: Any, specs: list[Any], attrs: dict[str, Any]) -> Plan:
    """The dimension that goes is made whole."""
    shape, dim = specs[0].shape, attrs["dim"]
    places = {d: d - (d > dim) for d in range(len(shape)) if d != dim}
    return carried(specs, places, [(*shape[:dim], *shape[dim + 1 :])] * shape[dim], attrs)


@rule("slice", "index")
def select(op: Any, specs: list[Any], attrs: dict[str, Any]) -> Plan:
    """Dimensions that are taken as they are keep their cuts; index arrays must stand together."""
    spec, index = specs[0], attrs["index"]
    shape = _selected(spec.shape, index)
    used = sum(_width(part) for part in index)
    places: dict[int, int] = {}
    at_in = at_out = 0
    arrays = [i for i, part in enumerate(index) if isinstance(part, np.ndarray)]
    if len(arrays) <= 1:  # several broadcast together: where their dimensions go is another story
        for part in (
            index
            if Ellipsis in [p for p in index if not isinstance(p, np.ndarray)]
            else (*index, ...)
        ):
            if part is Ellipsis:
                for _ in range(spec.ndim - used):
                    places[at_in] = at_out
                    at_in, at_out = at_in + 1, at_out + 1
            elif isinstance(part, slice):
                if part == slice(None):
                    places[at_in] = at_out
                at_in, at_out = at_in + 1, at_out + 1
            elif part is None:
                at_out += 1
            elif isinstance(part, np.ndarray):
                at_in += _width(part)
                at_out += 1 if part.dtype.kind == "b" else part.ndim
            else:
                at_in += 1
    return carried(specs, places, [shape], attrs)


def _width(part: Any) -> int:
    """How many dimensions a part of an index uses."""
    if isinstance(part, np.ndarray) and part.dtype.kind == "b":
        return part.ndim
    return 0 if part is None or part is Ellipsis else 1


def _selected(shape: Sequence[int], index: Any) -> tuple[int, ...]:
    """The shape of `x[index]`, without memory for `x`."""
    return np.shape(np.broadcast_to(np.int8(0), shape)[index])


@rule("cat")
def cat(op: Any, specs: list[Any], attrs: dict[str, Any]) -> Plan:
    """Cuts of the other dimensions are kept, those of the largest are followed."""
    dim = attrs["dim"]
    shape = list(specs[0].shape)
    shape[dim] = sum(s.shape[dim] for s in specs)

    def choose(now: Now, axis: int) -> Choice:
        if now[0].is_partial() and len(set(now)) == 1:
            return now, now[0]
        cuts = [p for p in now if p.is_shard() and p.dim != dim]
        out = cuts[0] if cuts else R
        return [out] * len(now), out

    return by_axis(specs, choose, [tuple(shape)], attrs)


@rule("gather")
def gather(op: Any, specs: list[Any], attrs: dict[str, Any]) -> Plan:
    """The dimension that is picked from is made whole; others must be as long in both."""
    x, index = specs[0], specs[1]
    dim = attrs["dim"] % max(x.ndim, 1)

    def choose(now: Now, axis: int) -> Choice:
        for place in now:
            if (
                place.is_shard()
                and place.dim != dim
                and x.shape[place.dim] == index.shape[place.dim]
            ):
                return [place, place], place
        return [R, R], R

    return by_axis(specs, choose, [index.shape], attrs)
