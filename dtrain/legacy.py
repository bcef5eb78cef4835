"""The constructors of PyTorch's early days: FloatTensor, LongTensor and the like, and Variable.

Rule: each names a dtype; called with sizes it gives an uninitialised tensor, with a sequence, an
array or a tensor one with its values, cast. None of them is a class that tensors belong to, but
`isinstance(x, FloatTensor)` asks for the dtype, as in torch.
"""

from __future__ import annotations

import warnings
from typing import Any

from dtrain import dtypes
from dtrain.autograd.node import make
from dtrain.autograd.value import Value
from dtrain.ops.create import finish, legacy_array
from dtrain.tensor import Tensor


class LegacyType(type):
    """The class of FloatTensor and its sisters. Source: torch.FloatTensor."""

    dtype: dtypes.dtype

    def __call__(cls, *args: Any) -> Any:
        return make(legacy_array(args, cls.dtype.numpy))

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, Value) and instance._data.dtype == cls.dtype.numpy

    def __repr__(cls) -> str:
        return f"<class 'dtrain.{cls.__name__}'>"


def _define(dtype: dtypes.dtype) -> Any:
    name = f"{dtype.scalar_type}Tensor"
    doc = f"`{name}(sizes)` or `{name}(data)`: a tensor of dtype {dtype.name}."
    return LegacyType(name, (), {"dtype": dtype, "__doc__": doc, "__module__": "dtrain"})


FloatTensor = _define(dtypes.float32)
DoubleTensor = _define(dtypes.float64)
HalfTensor = _define(dtypes.float16)
BFloat16Tensor = _define(dtypes.bfloat16)
ByteTensor = _define(dtypes.uint8)
CharTensor = _define(dtypes.int8)
ShortTensor = _define(dtypes.int16)
IntTensor = _define(dtypes.int32)
LongTensor = _define(dtypes.int64)
BoolTensor = _define(dtypes.bool_)


def new(self: Tensor, *args: Any) -> Any:
    """A tensor of this one's dtype, made as by its legacy constructor. Source: Tensor.new."""
    return finish(legacy_array(args, self._data.dtype), self.device)


class _VariableType(type):
    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, Value)


class Variable(metaclass=_VariableType):
    """A leaf over the memory of a tensor: since PyTorch 0.4 every tensor is a Variable.

    `volatile` has no effect, as in torch. Source: torch.autograd.Variable.
    """

    def __new__(cls, data: Any, requires_grad: bool = False, volatile: bool | None = None) -> Any:
        if volatile:
            warnings.warn(
                "volatile was removed and now has no effect. Use `with torch.no_grad():` instead.",
                UserWarning,
                stacklevel=2,
            )
        return data.detach().requires_grad_(requires_grad)
