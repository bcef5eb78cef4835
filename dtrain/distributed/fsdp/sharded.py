"""The two faces of a parameter: what each rank owns, and the whole that forward computes with.

Owns: `Whole`, the leaf that stands in the module during forward, and `Sharded`, the DTensor that
stands there otherwise and that optimizers hold; of a model on the meta device that is an
`EmptySharded` first. Rule: a sharded parameter never leaves its memory,
and every change of it is counted: other ranks read it where it is, or are sent it when it changed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from dtrain.autograd.grad_mode import enable_grad
from dtrain.autograd.node import make
from dtrain.autograd.value import PARTS
from dtrain.device import META, device
from dtrain.distributed.device_mesh import DeviceMesh
from dtrain.distributed.fsdp.offload import mapped
from dtrain.distributed.tensor._api import DTensor, DTensorParameter, wrap
from dtrain.distributed.tensor._dtensor_spec import DTensorSpec
from dtrain.distributed.tensor.placement_types import Replicate, Shard, _StridedShard
from dtrain.flat import Array
from dtrain.meta import ADVICE, NO_DATA, meta_tensor
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
    _stays = True

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


class WithoutValues(DTensor):
    """A sharded parameter of a model on the meta device, or what a state dict shows of it: memory
    for this rank's rows is there, values are not. Whoever asks for them gets an error.
    """

    __slots__ = ()

    is_meta = True

    @property
    def device(self) -> device:
        return META

    def _refuse(self, name: str) -> Any:
        raise NotImplementedError(f"{NO_DATA} ({name}, of {self._spec}) {ADVICE}")

    _whole = _refuse

    def detach(self) -> Any:
        return wrap(make(self._data), self._spec, WithoutValues)

    @property
    def data(self) -> Any:
        """Itself outside of any graph."""
        return self.detach()

    def to_local(self, *, grad_placements: Any = None) -> Any:
        """This rank's rows, a meta tensor."""
        return meta_tensor(self._data)

    def redistribute(self, *args: Any, **kwargs: Any) -> Any:
        """NotImplementedError: there is nothing to send."""
        return self._refuse("redistribute")

    def _put(self, index: Any, value: Any, part: bool) -> None:
        """Nothing, as for any meta tensor."""

    def _update(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self

    def __repr__(self) -> str:
        text = f"DTensor(local_tensor={self.to_local()}, device_mesh={self.device_mesh}, "
        text += f"placements={self.placements})"
        return f"Parameter containing:\n{text}" if isinstance(self, Parameter) else text


class EmptySharded(WithoutValues, Sharded):
    """A sharded parameter before it gets values, by `data = ` or what calls that: `to_empty`,
    `load_state_dict(assign=True)`. It is a `Sharded` then, and the same object.
    """

    __slots__ = ()

    @property
    def data(self) -> Any:
        """Itself outside of any graph; setting it gives this rank's rows their values."""
        return self.detach()

    @data.setter
    def data(self, value: Any) -> None:
        if value.is_meta:
            return
        self.__class__ = Sharded  # type: ignore[assignment]
        try:
            self.data = value
        except TypeError:
            self.__class__ = EmptySharded
            raise

    def _kin(self, data: Any) -> Any:
        """What is about to be copied into it: not for a file."""
        return DTensor._kin(self, data)


def _without_values(op: Any, inputs: tuple[Any, ...], attrs: dict[str, Any]) -> Any:
    return next(v for v in inputs if isinstance(v, WithoutValues))._refuse(op.name)


PARTS[WithoutValues] = PARTS[EmptySharded] = _without_values


def sharded_parameter(local: Array, original: Parameter, mesh: DeviceMesh, unit: Unit) -> Sharded:
    """What this rank owns of `original`, as a DTensor parameter; without values if that has none.

    If that is a DTensor already, cut along another axis of the same mesh of all, its parts are cut.
    """
    cls = EmptySharded if original.is_meta else Sharded
    sharded: Any = wrap(make(local), _spec_of(original, mesh), cls)
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
