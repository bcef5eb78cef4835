"""The two faces of a parameter: what each rank owns, and the whole that forward computes with.

Owns: `Whole`, the leaf that stands in the module during forward, and `sharded_parameter`, what
stands there otherwise and what optimizers hold.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dtrain.autograd.node import make
from dtrain.distributed.tensor._api import DTensorParameter, wrap
from dtrain.distributed.tensor._dtensor_spec import DTensorSpec
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


def sharded_parameter(local: Array, original: Parameter, spec: DTensorSpec, unit: Unit) -> Any:
    """What this rank owns of `original`, as a DTensor parameter."""
    sharded: Any = wrap(make(local), spec, DTensorParameter)
    sharded._requires_grad = original._requires_grad
    sharded._fsdp = unit
    return sharded
