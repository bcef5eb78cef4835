"""Operations on DTensors: the rule is asked, inputs are brought to where it wants them, parts are
computed.

Rules: 1. What has no sharding rule (`_rules`) is computed where every rank has all of its inputs,
and refused elsewhere, with the op's name. 2. A plain tensor does not mix with DTensors, unless it
has no dimensions. 3. A replicated input of a computation that differs between ranks gets its
gradient summed up over them: that, and the duals of the steps of `_redistribute`, is all there is
to gradients; the ops' own rules run on parts.
Source: torch.distributed.tensor._dispatch.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from dtrain.autograd.grad_mode import grad_enabled
from dtrain.autograd.node import Node
from dtrain.autograd.op import ALIAS
from dtrain.autograd.value import PARTS, Value, need_whole
from dtrain.distributed.device_mesh import DeviceMesh
from dtrain.distributed.tensor._api import DTensor, DTensorParameter, local_of, wrap
from dtrain.distributed.tensor._dtensor_spec import DTensorSpec
from dtrain.distributed.tensor._redistribute import redistribute, spread, spread_gathered
from dtrain.distributed.tensor.placement_types import Placements, Replicate


@dataclass
class Plan:
    """What a rule says: where each input has to be, where the result then is, and its shape.

    `wants`: a placement for each axis, for each input that is a tensor. `attrs`: the attributes of
    the op for the parts. `run(*parts, **attrs)`: what computes them, the op itself if None.
    `shapes`: of the results, one for an op with one.
    """

    wants: Sequence[Placements | None]
    out: Placements
    shapes: Sequence[tuple[int, ...]]
    attrs: dict[str, Any] = field(default_factory=dict)
    run: Callable[..., Any] | None = None


Rule = Callable[[Any, list[Any], dict[str, Any]], Plan]
RULES: dict[str, Rule] = {}

_ALIAS = ALIAS.op  # type: ignore[attr-defined]


def dispatch(op: Any, inputs: tuple[Any, ...], attrs: dict[str, Any]) -> Any:
    """The result of `op` on DTensors: a DTensor, or as many as the op has results."""
    mesh = _common_mesh(op, inputs)
    specs = [_spec_of(op, value, mesh) for value in inputs]
    tensors = [s for s in specs if isinstance(s, DTensorSpec)]
    rule = RULES.get(op.name)
    if all(s.is_replicated for s in tensors):
        return _on_wholes(op, inputs, attrs, mesh)
    if rule is None:
        raise refusal(op, tensors, "has no sharding rule")
    plan = rule(op, specs, attrs)
    parts = [_part(v, s, w, plan) for v, s, w in zip(inputs, specs, plan.wants, strict=True)]
    result = (plan.run or op.apply)(*parts, **plan.attrs)
    specs = [DTensorSpec(mesh, plan.out, shape) for shape in plan.shapes]
    _shorten(op, result)
    if isinstance(result, tuple):
        return tuple(wrap(part, spec) for part, spec in zip(result, specs, strict=True))
    return wrap(result, specs[0])


def _common_mesh(op: Any, inputs: Sequence[Any]) -> DeviceMesh:
    meshes = [v._spec.mesh for v in inputs if isinstance(v, DTensor)]
    if any(mesh is not meshes[0] and mesh != meshes[0] for mesh in meshes):
        raise RuntimeError(f"{op.name}: DTensors of different meshes: {meshes}")
    return meshes[0]


def _spec_of(op: Any, value: Any, mesh: DeviceMesh) -> Any:
    """The spec of a tensor; anything else is itself."""
    if isinstance(value, DTensor):
        return value._refuse(op.name) if value.is_meta else value._spec
    if not isinstance(value, Value):
        return value
    need_whole(op.name, value)
    if value._data.ndim:
        raise RuntimeError(
            f"{op.name}: got mixed dtrain.Tensor and DTensor, need to convert all dtrain.Tensor to "
            "DTensor before calling distributed operators! (distribute_tensor, DTensor.from_local)"
        )
    return DTensorSpec(mesh, (Replicate(),) * mesh.ndim, ())


def _on_wholes(op: Any, inputs: Sequence[Any], attrs: dict[str, Any], mesh: DeviceMesh) -> Any:
    """Every rank computes all of it."""
    result = op.apply(*[local_of(v) if isinstance(v, DTensor) else v for v in inputs], **attrs)
    everywhere = (Replicate(),) * mesh.ndim

    def boxed(whole: Any) -> Any:
        return wrap(whole, DTensorSpec(mesh, everywhere, whole._data.shape))

    return tuple(map(boxed, result)) if isinstance(result, tuple) else boxed(result)


def _part(value: Any, spec: Any, wanted: Placements | None, plan: Plan) -> Any:
    """An input as the computation of the parts takes it."""
    if not isinstance(value, Value) or wanted is None:
        return value
    local = local_of(value) if isinstance(value, DTensor) else value
    local = redistribute(local, spec, wanted)
    if not local._wants_grad():
        return local
    differ = [
        axis
        for axis, (mine, out) in enumerate(zip(wanted, plan.out, strict=True))
        if mine.is_replicate() and not out.is_replicate()
    ]
    return _spread_once(value, spec, wanted, local, tuple(differ))


def _shorten(op: Any, result: Any) -> None:
    """Let gradients of leaves that are DTensors go to them, not by way of their parts: they are
    then not copied, and a rule can put them right where they belong.
    """
    node = getattr(result, "_node", None)
    if node is not None and node.op is op:
        node.edges = tuple([_leaf_behind(edge) for edge in node.edges])


def _leaf_behind(edge: Any) -> Any:
    part = edge.__class__ is Node and edge.op is _ALIAS and edge.hooks is None
    return edge.edges[0] if part and edge.edges[0].__class__ in PARTS else edge


def _spread_once(value: Any, spec: Any, wanted: Placements, local: Any, axes: Any) -> Any:
    """The part on its way into computations that differ between ranks. Kept with a DTensor that is
    no leaf: all its uses then share one sum of gradients.
    """
    kept = isinstance(value, DTensor) and value._node is not None and spec.placements == wanted
    if not axes or not kept:
        return spread(local, spec.mesh, axes)
    made = value.__dict__.setdefault("_spread", {})
    asked = (axes, value._node, local._version.count, who_records())
    if made.get("asked") != asked:
        made.update(asked=asked, part=_spread(value, local, axes))
    return made["part"]


def _spread(value: DTensor, local: Any, axes: tuple[int, ...]) -> Any:
    axis, step, before = value.__dict__.get("_gathered", (None, None, None))
    if axes != (axis,):
        return spread(local, value._spec.mesh, axes)
    return spread_gathered(step, before, local)


def who_records() -> Any:
    """What tells one recording from another: a region that runs again (activation checkpointing)
    has to make again what it made.
    """
    mode = grad_enabled.get()
    return mode if isinstance(mode, bool) else weakref.ref(mode)


def refusal(op: Any, specs: Sequence[Any], why: str) -> NotImplementedError:
    """The error of an op that cannot be computed on parts."""
    places = ", ".join(str(s) for s in specs if isinstance(s, DTensorSpec))
    return NotImplementedError(
        f"{op.name} {why} for {places}. Bring its inputs to placements that it can take, "
        "such as .redistribute(placements=[Replicate()]), or use .full_tensor() or .to_local()"
    )


PARTS[DTensor] = PARTS[DTensorParameter] = dispatch
