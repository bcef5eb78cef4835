"""The two faces of a parameter: what each rank owns, and the whole that forward computes with.

Owns: `Whole`, the leaf that stands in the module during forward, and `Sharded`, the DTensor that
stands there otherwise and that optimizers hold. Rule: a sharded parameter never leaves its memory,
and every change of it is counted: other ranks read it where it is, or are sent it when it changed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from dtrain.autograd.grad_mode import enable_grad
from dtrain.autograd.node import make
from dtrain.autograd.value import PARTS
from dtrain.distributed.device_mesh import DeviceMesh
from dtrain.distributed.fsdp.offload import mapped
from dtrain.distributed.tensor._api import DTensor, DTensorParameter, wrap
from dtrain.distributed.tensor._dtensor_spec import DTensorSpec
from dtrain.distributed.tensor.placement_types import Replicate, Shard, _StridedShard
from dtrain.flat import Array
from dtrain.nn.parameter import Parameter
from dtrain.tensor import rebuild

if TYPE_CHECKING:
    from dtrain.distributed.fsdp.unit import Unit


class Whole(Parameter):
    """A parameter of `unit` while it is whole.

    Its gradient's home is asked for only when a gradient comes: memory for the gradients of a unit
    is taken then, and the rules that can put a gradient right into it do.
    """

    __slots__ = ()

    unit: Unit
    index: int

    @property
    def _home(self) -> Any:
        return self.unit.gradient_home(self.index)


def whole_parameter(data: Array, unit: Unit, index: int) -> Whole:
    """The leaf over `data`."""
    whole: Whole = rebuild(Whole, data, False)
    whole.unit, whole.index = unit, index
    return whole


class Sharded(DTensorParameter):
    """This rank's rows of a parameter of a unit; `grad` is what is left of the reduced gradient.

    Changed in place by DTensor's operations, `data` and optimizers, on every rank alike; each waits
    until no rank reads the old values. Not through `to_local().numpy()`: nobody would know.
    """

    __slots__ = ()

    _fsdp: Unit

    @property
    def data(self) -> Any:
        """The same memory outside the graph; changes of it are counted as changes of this."""
        return self.detach()

    @data.setter
    def data(self, value: Any) -> None:
        if not isinstance(value, DTensor) or value._spec != self._spec:
            found = value._spec if isinstance(value, DTensor) else type(value).__name__
            raise TypeError(f"the data of a sharded parameter is a {self._spec}, got {found}")
        if value._data.dtype != self._data.dtype:
            raise TypeError(
                f"a parameter in fully sharded data parallel stays {self.dtype}, got "
                f"{value.dtype}: convert the model before fully_shard, or use MixedPrecisionPolicy"
            )
        if value._data is not self._data:
            self._fsdp.await_readers()
            np.copyto(self._data, value._data)
            self._bump_version()

    def _put(self, index: Any, value: Any, part: bool) -> None:
        self._fsdp.await_readers()
        super()._put(index, value, part)

    def _update(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._fsdp.await_readers()
        return super()._update(function, args, kwargs)

    def _kin(self, data: Any) -> Any:
        """As of any DTensor; what belongs to an offloaded parameter, such as the state of an
        optimizer, is in a file, too.
        """
        if self._fsdp.offload:
            own = mapped(data.size, data.dtype).reshape(data.shape)
            np.copyto(own, data)
            data = own
        return super()._kin(data)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise RuntimeError(
            "a parameter in fully sharded data parallel cannot be copied: copy its state dict"
        )


PARTS[Sharded] = PARTS[DTensor]


def sharded_parameter(local: Array, original: Parameter, mesh: DeviceMesh, unit: Unit) -> Sharded:
    """What this rank owns of `original`, as a DTensor parameter.

    If that is a DTensor already, cut along another axis of the same mesh of all, its parts are cut.
    """
    sharded: Any = wrap(make(local), _spec_of(original, mesh), Sharded)
    sharded._requires_grad = original._requires_grad
    sharded._fsdp = unit
    return sharded  # type: ignore[no-any-return]


def _spec_of(original: Parameter, mesh: DeviceMesh) -> DTensorSpec:
    replicas = (Replicate(),) * (mesh.ndim - 1)
    if not isinstance(original, DTensor):
        return DTensorSpec(mesh, (*replicas, Shard(0)), tuple(original.shape))
    other, places = original._spec.mesh, original._spec.placements
    root = mesh._get_root_mesh()
    if other.ndim != 1 or other._get_root_mesh() != root or root == mesh:
        raise ValueError(
            f"fully_shard over {mesh} of a parameter that is a DTensor over {other}: expected an "
            "axis of the same mesh, beside those of fully_shard"
        )
    cut = _StridedShard(0, split_factor=other.size()) if places[0].is_shard(0) else Shard(0)
    both = root[(*mesh.mesh_dim_names, *other.mesh_dim_names)]
    return DTensorSpec(both, (*replicas, cut, *places), original._spec.shape)


def facing(whole: Whole, spec: DTensorSpec | None) -> Any:
    """What stands in modules for the whole: itself, or the DTensor of `spec` whose part it is."""
    if spec is None:
        return whole
    with enable_grad():
        return wrap(whole, spec)
