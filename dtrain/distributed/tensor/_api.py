"""Class DTensor: a tensor that is cut over the ranks of a mesh, or equal on them.

Rules: 1. `_data` is this rank's part and `_spec` says of what; shapes are those of the whole.
2. The graph is made of parts: a DTensor has the node that made its part, and gradients travel as
parts, placed as `_redistribute` says. 3. Operations on DTensors are in `_dispatch`; what has no
rule there raises, and nothing looks at a part as if it were the whole.
4. Every rank of the mesh does the same with a DTensor: where a call needs the others it blocks for
them, at most the timeout of the groups.
Source: torch.distributed.tensor.DTensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dtrain.autograd import engine
from dtrain.autograd.grad_mode import grad_enabled
from dtrain.autograd.handle import RemovableHandle
from dtrain.autograd.node import make
from dtrain.autograd.op import ALIAS, record
from dtrain.autograd.value import PARTS, Version
from dtrain.comm import collectives as calls
from dtrain.distributed.device_mesh import DeviceMesh
from dtrain.distributed.tensor._dtensor_spec import DTensorSpec
from dtrain.distributed.tensor._guards import Guarded
from dtrain.distributed.tensor._norms import whole_norms
from dtrain.distributed.tensor._redistribute import apply, redistribute, route, spread
from dtrain.distributed.tensor.placement_types import (
    Partial,
    Placement,
    Placements,
    Replicate,
    normalized,
)
from dtrain.nn.parameter import Parameter
from dtrain.ops.inplace import put, write
from dtrain.ops.shape import axis_of
from dtrain.printing import tensor_repr
from dtrain.tensor import Size, Tensor


class DTensor(Guarded):
    """A tensor over a mesh of ranks: `to_local()` is this rank's part, `shape` that of the whole.

    Made by `distribute_tensor`, `from_local`, the factories of `dtrain.distributed.tensor`, and by
    operations on DTensors. `nn.Parameter(dtensor)` is both a Parameter and a DTensor.
    """

    __slots__ = ()

    def __new__(
        cls, local_tensor: Tensor, spec: DTensorSpec, *, requires_grad: bool = False
    ) -> Any:
        self = wrap(local_tensor.detach(), spec)
        self.requires_grad = requires_grad
        return self

    # --- what it is ---

    @property
    def shape(self) -> Size:
        return Size(self._spec.shape)

    def size(self, dim: int | None = None) -> Any:
        """The shape of the whole, or the size of one dimension."""
        whole = self._spec.shape
        return Size(whole) if dim is None else whole[axis_of(dim, len(whole))]

    def numel(self) -> int:
        return self.shape.numel()

    nelement = numel

    @property
    def nbytes(self) -> int:
        return self.numel() * self._data.itemsize  # type: ignore[no-any-return]

    def stride(self, dim: int | None = None) -> Any:
        """Steps between neighbours of the whole, in elements, were it contiguous."""
        steps, step = [], 1
        for size in reversed(self._spec.shape):
            steps.append(step)
            step *= max(size, 1)
        found = tuple(reversed(steps))
        return found if dim is None else found[axis_of(dim, len(found))]

    @property
    def device_mesh(self) -> DeviceMesh:
        """The mesh whose ranks have it."""
        return self._spec.mesh

    @property
    def placements(self) -> Placements:
        """How it lies along each axis of the mesh."""
        return self._spec.placements

    # --- the part and the whole ---

    @staticmethod
    def from_local(
        local_tensor: Tensor,
        device_mesh: DeviceMesh | None = None,
        placements: Sequence[Placement] | None = None,
        *,
        run_check: bool = False,
        shape: Any = None,
        stride: Any = None,
        grad_placements: Sequence[Placement] | None = None,
    ) -> DTensor:
        """The DTensor of which every rank has `local_tensor`; shares its memory, differentiable.

        `placements`: default all `Replicate`. Without `shape` all ranks' parts must be of one size:
        the whole is as many times as long. `run_check`: the first rank's values become those of
        all along replicated axes, which blocks for a broadcast. The gradient comes back placed as
        `grad_placements` (default: as the DTensor). `stride` is accepted and changes nothing.
        """
        mesh = _mesh_of(device_mesh)
        places = normalized(placements, mesh.ndim, local_tensor.ndim)
        whole = _whole_shape(local_tensor.shape, mesh, places) if shape is None else tuple(shape)
        spec = DTensorSpec(mesh, places, whole)
        if spec.box[1] != tuple(local_tensor.shape):
            raise ValueError(
                f"from_local: rank {mesh.get_rank()} gave a part of shape "
                f"{list(local_tensor.shape)}, its part of {spec} is {list(spec.box[1])}. Give "
                "`shape` where the whole is not cut evenly."
            )
        if run_check:
            _make_equal(local_tensor, spec)
        if grad_placements is not None:
            local_tensor = _with_gradient(local_tensor, spec, grad_placements, inward=True)
        return wrap(local_tensor, spec)

    def to_local(self, *, grad_placements: Sequence[Placement] | None = None) -> Tensor:
        """This rank's part, sharing memory; differentiable.

        What flows back must be the part's gradient, for replicated parts the complete one, equal on
        all ranks; where ranks go on to compute different things with a replicated part, say
        `grad_placements=[Partial()]`: then their gradients are summed up (an all-reduce).
        """
        local = local_of(self, view=True)
        if grad_placements is None:
            return local
        return _with_gradient(local, self._spec, grad_placements, inward=False)

    def redistribute(
        self,
        device_mesh: DeviceMesh | None = None,
        placements: Sequence[Placement] | None = None,
        *,
        async_op: bool = False,
        forward_dtype: Any = None,
        backward_dtype: Any = None,
    ) -> DTensor:
        """The same tensor at other placements (default all `Replicate`); differentiable.

        What moves is said in docs/tensor-parallel.md. `async_op` is accepted and changes nothing;
        the dtypes must be None: cast before.
        """
        if device_mesh is not None and device_mesh != self._spec.mesh:
            raise NotImplementedError("Cross device mesh comm not supported yet!")
        if forward_dtype is not None or backward_dtype is not None:
            raise NotImplementedError("redistribute does not cast: use .to(dtype) before it")
        target = normalized(placements, self._spec.mesh.ndim, self.ndim)
        if target == self._spec.placements:
            return self
        before, steps = local_of(self), route(self._spec, target)
        local = before
        for step in steps:
            local = apply(step, local)
        result = wrap(local, self._spec.placed(target))
        if len(steps) == 1 and steps[0].kind == "gather" and result._node is not None:
            axis = next(a for a, p in enumerate(target) if p != self._spec.placements[a])
            result._gathered = (axis, steps[0], before)  # type: ignore[attr-defined]
        return result

    def full_tensor(self, *, grad_placements: Sequence[Placement] | None = None) -> Tensor:
        """The whole, on every rank; all ranks of the mesh call it. Differentiable."""
        return self.redistribute().to_local(grad_placements=grad_placements)

    # --- gradients ---

    @property
    def grad(self) -> Any:
        """The gradient as a DTensor placed as this one, or None."""
        found = Tensor.grad.fget(self)  # type: ignore[attr-defined]
        if found is None or found.__class__ in PARTS:
            return found
        self._grad = wrap(found, self._spec)  # the engine and FSDP leave the plain part
        return self._grad

    @grad.setter
    def grad(self, value: Any) -> None:
        if value is None:
            self._grad = None
            return
        if not isinstance(value, DTensor):
            raise TypeError(
                f"assigned grad of a DTensor expected to be a DTensor, got {type(value).__name__}; "
                "see distribute_tensor and DTensor.from_local"
            )
        if value._spec != self._spec:
            raise RuntimeError(f"attempting to assign a gradient {value._spec} to {self._spec}")
        Tensor.grad.fset(self, value)  # type: ignore[attr-defined]

    def backward(
        self,
        gradient: Any = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: Any = None,
    ) -> None:
        """As Tensor's, on every rank; contributions are combined first. Without `gradient` it must
        be a whole of one element.
        """
        settled = self.redistribute(placements=settled_placements(self._spec))
        if gradient is None and self.numel() != 1:
            raise RuntimeError("grad can be implicitly created only for scalar outputs")
        if gradient is not None:
            gradient = as_placed(gradient, settled._spec, "backward")
        keep = create_graph if retain_graph is None else retain_graph
        engine.backward((local_of(settled),), (gradient,), keep, create_graph, inputs)

    def register_hook(self, hook: Any) -> RemovableHandle:
        """Call `hook(grad)` with the gradient, a DTensor; it may return another."""
        spec = self._spec

        def on_part(part: Tensor) -> Any:
            found = hook(wrap(part, spec))
            return None if found is None else as_placed(found, spec, "a gradient hook")

        return Tensor.register_hook(self, on_part)

    def detach(self) -> Any:
        return wrap(Tensor.detach(self), self._spec)

    @property
    def data(self) -> Any:
        """The same memory outside the graph, a DTensor."""
        return wrap(make(self._data), self._spec)

    @data.setter
    def data(self, value: Any) -> None:
        if not isinstance(value, DTensor) or value._spec != self._spec:
            found = value._spec if isinstance(value, DTensor) else type(value).__name__
            raise TypeError(f"the data of a DTensor must be one at {self._spec}, got {found}")
        self._data = value._data

    # --- what other code asks of a tensor that is a part ---

    def _kin(self, data: Any) -> Any:
        """A tensor over an array that belongs to this one's part element by element; of a
        contribution, that is the same on all ranks.
        """
        return wrap(make(data), self._spec.placed(settled_placements(self._spec)))

    def _adopt(self, value: Any, dtype: Any) -> Any:
        """A copy of loaded state for this parameter: placed as it is, cut out of a whole one."""
        if value._data.ndim == 0 and self.ndim:  # a count of steps
            return make(value._data.astype(dtype))
        if not isinstance(value, DTensor):
            return self._kin(self._cut(value._data, "load_state_dict").astype(dtype))
        return self._kin(as_placed(value, self._spec, "load_state_dict")._data.astype(dtype))

    _whole_norms = staticmethod(whole_norms)

    def _everywhere(self, value: Tensor, beside: Sequence[Any]) -> Tensor:
        """A value that all ranks have: a DTensor where those beside it are, all of one mesh."""
        specs = {getattr(tensor, "_spec", None) for tensor in beside}
        if any(spec is None or spec.mesh != self._spec.mesh for spec in specs):
            return value
        return wrap(value, DTensorSpec(self._spec.mesh, (Replicate(),) * self._spec.mesh.ndim, ()))

    def _as_leaf(self, cls: type[Any], requires_grad: bool) -> Any:
        """The Parameter or Buffer over this tensor's memory."""
        leaf = wrap(Tensor.detach(self), self._spec, _combined(cls))
        leaf.requires_grad = requires_grad
        return leaf

    def _cut(self, whole: Any, what: str) -> Any:
        """This rank's part of an array of the shape of the whole."""
        if self._spec.is_partial or tuple(whole.shape) != self._spec.shape:
            raise RuntimeError(f"{what}: an array of shape {list(whole.shape)} for {self._spec}")
        offsets, sizes = self._spec.box
        return whole[tuple([slice(o, o + n) for o, n in zip(offsets, sizes, strict=True)])]

    def _put(self, index: Any, value: Any, part: bool) -> None:
        """`self[index] = value` for an index that means all of it, or of a number to a row."""
        if part:
            self._put_row(index, value)
            return
        if isinstance(value, np.ndarray) and value.ndim:
            value = self._cut(value, "assignment")
        elif isinstance(value, Tensor) and (value.__class__ in PARTS or value.ndim):
            value = as_placed(value, self._spec, "copy_")._data
        elif self._spec.is_partial:
            self._refuse("assignment of a number to contributions")
        self._refuse_recording(value)
        put(make(self._data), ..., value, part=False)
        self._bump_version()

    def _put_row(self, index: Any, value: Any) -> None:
        """`self[row] = number`: those ranks write that have a part of the row."""
        plain = isinstance(index, int) and isinstance(value, (int, float))
        if not plain or not self.ndim or self._spec.is_partial:
            self._refuse("assignment to a part by index, but for a number to a row,")
        count = self._spec.shape[0]
        if not -count <= index < count:
            raise IndexError(f"index {index} is out of bounds for dimension 0 with size {count}")
        self._refuse_recording()
        row = index % count - self._spec.box[0][0]
        if 0 <= row < self._spec.box[1][0]:
            put(make(self._data), row, value)
        self._bump_version()

    def _update(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`function(self, ...)` written into this tensor's memory, at its own placements."""
        self._refuse_recording(*args)
        result = function(self, *args, **kwargs)
        write(self, as_placed(result, self._spec, getattr(function, "__name__", "op"))._data)
        return self

    def _refuse_recording(self, *others: Any) -> None:
        tensors = [v for v in (self, *others) if isinstance(v, Tensor)]
        if grad_enabled.get() and any(t._wants_grad() for t in tensors):
            raise RuntimeError(
                f"a DTensor ({self._spec}) cannot be changed in place where the change would be "
                "recorded: use the operation that returns a new tensor, or no_grad()"
            )

    def __repr__(self) -> str:
        part = tensor_repr(make(self._data, self._node))
        text = f"DTensor(local_tensor={part}, device_mesh={self.device_mesh}, "
        text += f"placements={self.placements})"
        return f"Parameter containing:\n{text}" if isinstance(self, Parameter) else text

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            copied = Tensor.__deepcopy__(self, memo)
            copied._spec = self._spec
        return memo[id(self)]


class DTensorParameter(DTensor, Parameter):
    """A Parameter whose values are cut over a mesh. Made by `nn.Parameter(dtensor)`."""

    __slots__ = ()


_classes: dict[type, type[DTensor]] = {Parameter: DTensorParameter}


def _combined(cls: type[Any]) -> type[DTensor]:
    """The class that is both `cls`, such as Parameter or Buffer, and DTensor."""
    if cls not in _classes:
        _classes[cls] = type(f"DTensor{cls.__name__}", (DTensor, cls), {"__slots__": ()})
        PARTS[_classes[cls]] = PARTS[DTensor]
    return _classes[cls]


# --- parts in and out ------------------------------------------------------------------------


def wrap(local: Tensor, spec: DTensorSpec, cls: type[DTensor] = DTensor) -> DTensor:
    """The DTensor of which `local` is this rank's part, at its place in the graph."""
    self: DTensor = object.__new__(cls)
    self._data, self._spec = local._data, spec
    self._node = local.grad_fn
    self._requires_grad = self._node is not None
    self._version, self._grad, self._base = local._version, None, None
    if self._node is None and local._requires_grad and grad_enabled.get():
        record(ALIAS.op, (local,), self, {})  # type: ignore[attr-defined]  # leads to that leaf
    return self


def local_of(tensor: DTensor, *, view: bool = False) -> Tensor:
    """The part as a plain Tensor that leads to the DTensor's place in the graph.

    `view`: a change in place of it is one of the DTensor, as for any view.
    """
    if tensor._version is None:
        tensor._version = Version()
    local: Tensor = make(tensor._data, tensor._node)
    local._version = tensor._version
    if tensor._node is None and tensor._requires_grad and grad_enabled.get():
        record(ALIAS.op, (tensor,), local, {})  # type: ignore[attr-defined]
    if view:
        local._share(tensor)
    return local


def settled_placements(spec: DTensorSpec) -> Placements:
    """The placements with `Replicate` for `Partial`: those of a gradient."""
    return tuple(Replicate() if p.is_partial() else p for p in spec.placements)


def as_placed(value: Any, spec: DTensorSpec, what: str) -> Tensor:
    """The part of `value`, a DTensor of the shape of `spec`, at the placements of `spec`."""
    if not isinstance(value, DTensor):
        raise RuntimeError(
            f"{what}: got mixed dtrain.Tensor and DTensor, need to convert all dtrain.Tensor to "
            "DTensor before calling distributed operators! (distribute_tensor, from_local)"
        )
    if value._spec.mesh != spec.mesh or value._spec.shape != spec.shape:
        raise RuntimeError(f"{what}: expected a DTensor like {spec}, got {value._spec}")
    if value.is_meta:
        value._refuse(what)
    part: Tensor = redistribute(local_of(value), value._spec, spec.placements)
    return part


def _mesh_of(mesh: DeviceMesh | None) -> DeviceMesh:
    if not isinstance(mesh, DeviceMesh):
        raise RuntimeError(f"expected a DeviceMesh (see init_device_mesh), got {mesh!r}")
    return mesh


def _whole_shape(shape: Any, mesh: DeviceMesh, placements: Placements) -> tuple[int, ...]:
    whole = list(shape)
    for axis, placement in enumerate(placements):
        if placement.is_shard():
            whole[placement.dim] *= mesh.shape[axis]  # type: ignore[attr-defined]
    return tuple(whole)


def _make_equal(tensor: Tensor, spec: DTensorSpec) -> None:
    """Bring the values of the first rank of each replicated axis to the others."""
    from_first = [a for a, p in enumerate(spec.placements) if p.is_replicate()]
    for axis in from_first:
        spec.mesh.get_group(axis).issue(calls.Broadcast(tensor._data, 0))
    if from_first:
        tensor._bump_version()


def _with_gradient(local: Tensor, spec: DTensorSpec, given: Any, *, inward: bool) -> Tensor:
    """`local` with its gradient placed as `given` on the outer side: coming in, or going out."""
    wanted = normalized(given, spec.mesh.ndim, spec.ndim)
    usual = settled_placements(spec)
    summed = [a for a, (w, u) in enumerate(zip(wanted, usual, strict=True)) if w != u]
    if any(not (wanted[a] == Partial() and usual[a].is_replicate()) for a in summed) or (
        inward and summed
    ):
        raise NotImplementedError(
            f"grad_placements {wanted} for {spec}: only the tensor's own placements, or Partial() "
            "where it is replicated and leaves by to_local()"
        )
    return spread(local, spec.mesh, summed)  # type: ignore[no-any-return]
