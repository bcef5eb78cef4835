"""Parameter and Buffer: tensors that a Module registers when they are assigned to it.

A Parameter is a leaf that requires grad by default and shares the memory of the tensor it is made
of. A Buffer is an ordinary tensor with a mark. Source: torch.nn.parameter.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dtrain import dtypes
from dtrain.autograd.node import make
from dtrain.autograd.value import PARTS
from dtrain.tensor import Tensor, rebuild


def _over(cls: type[Tensor], data: Tensor | None, requires_grad: bool | None) -> Any:
    """A leaf of class `cls` that shares memory and version with `data`."""
    if data is None:
        data = make(np.empty(0, dtypes.get_default_dtype().numpy))
    if not isinstance(data, Tensor):
        raise TypeError(
            f"cannot make a {cls.__name__} of a {type(data).__name__}: expected a Tensor; "
            f"use {cls.__name__}(dtrain.tensor(...))"
        )
    if requires_grad is None:
        requires_grad = data._requires_grad
    if data.__class__ in PARTS:
        return data._as_leaf(cls, requires_grad)  # type: ignore[attr-defined]
    source = data.detach()
    self = rebuild(cls, source._data, False)
    self._version = source._version
    self.requires_grad = requires_grad
    return self


class Parameter(Tensor):
    """A tensor that is a module's parameter when assigned as its attribute.

    `data` is a Tensor, whose memory is shared (None: an empty one of the default dtype).
    TypeError for anything else; RuntimeError when integers are asked to require grad.
    Source: torch.nn.Parameter.
    """

    __slots__ = ()

    def __new__(cls, data: Tensor | None = None, requires_grad: bool = True) -> Any:
        return _over(cls, data, requires_grad)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            memo[id(self)] = rebuild(type(self), self._data.copy(), self._requires_grad)
        return memo[id(self)]

    def __repr__(self) -> str:
        return "Parameter containing:\n" + super().__repr__()


class Buffer(Tensor):
    """A tensor that is a module's buffer when assigned as its attribute.

    `persistent` buffers are part of the module's state_dict. Source: torch.nn.Buffer.
    """

    __slots__ = ()
    persistent = True

    def __new__(cls, data: Tensor | None = None, *, persistent: bool = True) -> Any:
        self = _over(cls, data, None)
        self.persistent = persistent
        return self
