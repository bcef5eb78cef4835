"""Sharding rules of operations that go element by element, or along some dimensions only.

A rule says where the inputs have to be, where the result then is, and its shape (`Plan`); most look
at one axis of the mesh after the other (`by_axis`). Rules: 1. A cut that an op can keep is kept.
2. Inputs that do not fit move to the cut of the largest; replicated ones are sliced, which costs
nothing. 3. Contributions (`Partial`) stay where the op is linear, else they are summed first.
4. A dimension along which the op looks is made whole.
Source: torch.distributed.tensor._ops.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from dtrain.autograd.grad_mode import grad_enabled
from dtrain.distributed.tensor._dispatch import RULES, Plan, Rule
from dtrain.distributed.tensor._dtensor_spec import DTensorSpec
from dtrain.distributed.tensor.placement_types import Partial, Placement, Replicate, Shard

R = Replicate()
Now = list[Any]  # the placements of the inputs along one axis, None for what is no tensor
Choice = tuple[list[Any], Placement]  # where each input has to be, and where the result is


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Enter a rule for the ops of these names."""

    def entered(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return entered


def by_axis(
    specs: Sequence[Any],
    choose: Callable[[Now, int], Choice],
    shapes: Any,
    attrs: Any,
    run: Any = None,
) -> Plan:
    """The plan of a rule that decides for each axis of the mesh: `choose(placements, axis)`."""
    axes = next(s for s in specs if isinstance(s, DTensorSpec)).mesh.ndim
    wants: list[list[Any]] = []
    out = []
    for axis in range(axes):
        now = [s.placements[axis] if isinstance(s, DTensorSpec) else None for s in specs]
        wanted, place = choose(now, axis)
        wants.append(wanted)
        out.append(place)
    each = [None if now[i] is None else tuple(w[i] for w in wants) for i in range(len(specs))]
    return Plan(each, tuple(out), shapes, dict(attrs), run)


def at(placement: Any, dim: int) -> Any:
    """The same cut of another dimension."""
    return replace(placement, dim=dim)


def parts_along(spec: DTensorSpec, dim: int) -> int:
    """Into how many parts a dimension is cut."""
    sizes = zip(spec.mesh.shape, spec.placements, strict=True)
    return math.prod(n for n, p in sizes if p.is_shard(dim))


# --- element by element --------------------------------------------------------------------------

LINEAR = ("alias", "clone", "contiguous", "neg", "deg2rad", "rad2deg", "cast")
POINTWISE = """eq ne lt le gt ge logical_and logical_or logical_xor logical_not bitwise_and
    bitwise_or bitwise_xor bitwise_left_shift bitwise_right_shift bitwise_not isnan isinf isfinite
    isposinf isneginf signbit where exp expm1 log log2 log10 log1p sqrt rsqrt sin cos tan atan sinh
    cosh tanh asin acos asinh acosh atanh exp2 sigmoid reciprocal square abs frac logit sign floor
    ceil trunc round add sub mul div floor_divide div_floor div_trunc remainder fmod pow atan2 hypot
    logaddexp maximum minimum clamp masked_fill relu leaky_relu elu hardtanh threshold softplus
    log_sigmoid erf gelu gelu_tanh silu dropout"""


@rule(*LINEAR, *POINTWISE.split())
def pointwise(op: Any, specs: list[Any], attrs: dict[str, Any]) -> Plan:
    """Broadcasting; the largest input's cut is followed."""
    tensors = [s for s in specs if isinstance(s, DTensorSpec)]
    shape = np.broadcast_shapes(*[s.shape for s in tensors])
    order = sorted(range(len(specs)), key=lambda i: -_size(specs[i]))

    def choose(now: Now, axis: int) -> Choice:
        kept = _kept_contributions(op.name, specs, now)
        if kept is not None:
            return [p if p == kept or p is None else R for p in now], kept
        out: Placement = R
        for i in order:
            dim = _seen(now[i], specs[i], shape)
            if dim is not None:
                out = at(now[i], dim)
                break
        return [_aligned(out, s, shape) for s in specs], out

    plan = by_axis(specs, choose, [shape], attrs)
    if "noise" in attrs:  # of the whole; each rank drew it alike
        box = tensors[0].placed(plan.out, shape).box
        plan.attrs["noise"] = cut(attrs["noise"], box)
    return plan


def _size(spec: Any) -> int:
    return math.prod(spec.shape) if isinstance(spec, DTensorSpec) else 0


def cut(whole: Any, box: Any) -> Any:
    """A box of an array; dimensions of size 1, which broadcast, stay."""
    index = [slice(o, o + n) if size != 1 else slice(None)
             for o, n, size in zip(*box, whole.shape, strict=True)]  # fmt: skip
    return whole[tuple(index)]


def _seen(placement: Any, spec: Any, shape: Sequence[int]) -> int | None:
    """The dimension of the result that an input's cut is of; None where there is none."""
    if placement is None or not placement.is_shard():
        return None
    dim: int = placement.dim + len(shape) - len(spec.shape)
    return dim if spec.shape[placement.dim] == shape[dim] else None


def _aligned(out: Placement, spec: Any, shape: Sequence[int]) -> Any:
    """Where an input has to be for a result at `out`."""
    if not isinstance(spec, DTensorSpec):
        return None
    if not isinstance(out, Shard):
        return out
    dim = out.dim - len(shape) + len(spec.shape)
    return at(out, dim) if dim >= 0 and spec.shape[dim] == shape[out.dim] else R


def _kept_contributions(name: str, specs: Sequence[Any], now: Now) -> Any:
    """The `Partial` that an op hands on, or None."""
    found = [p for p in now if p is not None and p.is_partial()]
    rest = [p for p in now if p is not None and not p.is_partial()]
    if not found or len(set(found)) > 1 or found[0].reduce_op not in ("sum", "avg"):
        return None
    if name in LINEAR:
        return found[0]
    if any(not p.is_replicate() for p in rest):
        return None
    if name in ("add", "sub"):
        return found[0] if len(found) == len(specs) else None
    once = len(found) == 1 and (name == "mul" or (name == "div" and found[0] is now[0]))
    return found[0] if once else None


# --- along some dimensions -------------------------------------------------------------------


def without(dims: Sequence[int]) -> Callable[[Now, int], Choice]:
    """Keep a cut that is of none of these dimensions; one input."""

    def choose(now: Now, axis: int) -> Choice:
        place = now[0] if now[0].is_shard() and now[0].dim not in dims else R
        return [place], place

    return choose


@rule("softmax", "log_softmax", "cumsum", "cumprod", "argsort")
def along(op: Any, specs: list[Any], attrs: dict[str, Any]) -> Plan:
    """What runs along one dimension."""
    return by_axis(specs, without([attrs["dim"] % max(specs[0].ndim, 1)]), [specs[0].shape], attrs)


@rule("flip", "roll")
def moved(op: Any, specs: list[Any], attrs: dict[str, Any]) -> Plan:
    """Elements change places along some dimensions."""
    dims = attrs["dims"]
    dims = range(specs[0].ndim) if dims is None else [dims] if isinstance(dims, int) else dims
    return by_axis(specs, without([d % specs[0].ndim for d in dims]), [specs[0].shape], attrs)


@rule("tril", "triu")
def triangle(op: Any, specs: list[Any], attrs: dict[str, Any]) -> Plan:
    """Matrices in the last two dimensions."""
    ndim = specs[0].ndim
    return by_axis(specs, without([ndim - 2, ndim - 1]), [specs[0].shape], attrs)


@rule("layer_norm", "rms_norm")
def normalised(op: Any, specs: list[Any], attrs: dict[str, Any]) -> Plan:
    """The last dimensions are made whole; weight and bias are on all ranks."""
    x = specs[0]
    first = x.ndim - len(attrs["normalized_shape"])

    def choose(now: Now, axis: int) -> Choice:
        place = now[0] if now[0].is_shard() and now[0].dim < first else R
        return [place, *[p and R for p in now[1:]]], place

    return by_axis(specs, choose, [x.shape], attrs)


# --- reductions ----------------------------------------------------------------------------------


def reduced_shape(shape: Sequence[int], dims: Sequence[int], keepdim: bool) -> tuple[int, ...]:
    """The shape after a reduction over `dims`."""
    if keepdim:
        return tuple(1 if d in dims else n for d, n in enumerate(shape))
    return tuple(n for d, n in enumerate(shape) if d not in dims)


@rule("sum", "mean", "norm", "prod", "amax", "amin", "any", "all", "logsumexp", "argmax", "argmin")
def reduction(op: Any, specs: list[Any], attrs: dict[str, Any]) -> Plan:
    """Contributions, where the op has an order of its own in which ranks combine: sum, mean of
    equal parts, extrema that need no gradient. Elsewhere the reduced dimensions are made whole.
    """
    spec, dims, keepdim = specs[0], attrs["dim"], attrs["keepdim"]
    dims = range(spec.ndim) if dims is None else [dims] if isinstance(dims, int) else dims
    dims = [d % max(spec.ndim, 1) for d in dims]

    def choose(now: Now, axis: int) -> Choice:
        place = now[0]
        if place.is_partial():
            keep = op.name in ("sum", "mean") and place.reduce_op in ("sum", "avg")
            return ([place], place) if keep else ([R], R)
        if place.is_replicate():
            return [R], R
        if place.dim not in dims:
            gone = 0 if keepdim else sum(d < place.dim for d in dims)
            return [place], at(place, place.dim - gone)
        out = _contribution(op.name, spec, place.dim)
        return ([R], R) if out is None else ([place], out)

    shape = reduced_shape(spec.shape, dims, keepdim)
    return by_axis(specs, choose, [shape], attrs)


def _contribution(name: str, spec: DTensorSpec, dim: int) -> Placement | None:
    """How the ranks' reductions of their parts of `dim` combine."""
    if name == "sum":
        return Partial("sum")
    even = spec.shape[dim] % parts_along(spec, dim) == 0 and spec.shape[dim] > 0
    if name == "mean":
        return Partial("avg") if even else None
    if name in ("amax", "amin") and even and grad_enabled.get() is False:
        return Partial("max" if name == "amax" else "min")
    return None
