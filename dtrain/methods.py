"""Which op is which method of Tensor: the table that joins `dtrain.ops` to the class.

Importing this module completes the class; `dtrain/__init__.py` does it. Every method has the
signature of the public function of its name, with the tensor as `input`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dtrain import dtypes
from dtrain.autograd.promotion import cast
from dtrain.ops import activation, create, linalg, random, reduce, sorting
from dtrain.ops import elementwise as ew
from dtrain.ops import index as ix
from dtrain.ops import shape as sh
from dtrain.ops.inplace import update
from dtrain.tensor import Tensor


def reflected(op: Callable[..., Any]) -> Callable[..., Any]:
    """The method for `other <op> self`."""

    def method(self: Tensor, other: Any) -> Any:
        return op(other, self)

    return method


def in_place(op: Callable[..., Any]) -> Callable[..., Any]:
    """The method that writes `op(self, ...)` into self and returns self."""

    def method(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        return update(self, op, *args, **kwargs)

    method.__doc__ = f"In place: {op.__doc__ or op.__name__}"
    return method


def sizes(function: Callable[..., Any]) -> Callable[..., Any]:
    """A method that takes its sizes one by one or as one sequence."""

    def method(self: Tensor, *shape: Any) -> Any:
        if len(shape) == 1 and isinstance(shape[0], (tuple, list)):
            shape = tuple(shape[0])
        return function(self, shape)

    method.__doc__ = function.__doc__
    return method


def to_dtype(dtype: dtypes.dtype) -> Callable[[Tensor], Any]:
    def method(self: Tensor) -> Any:
        return cast(self, dtype=dtype)

    return method


def _scaled(op: Callable[..., Any]) -> Callable[..., Any]:
    """add and sub take `alpha`, a factor of the second operand."""

    def function(input: Any, other: Any, *, alpha: Any = 1) -> Any:
        return op(input, other if alpha == 1 else other * alpha)

    function.op = op.op  # type: ignore[attr-defined]
    function.__doc__ = f"`input {'+' if op.__name__ == 'add' else '-'} alpha * other`."
    return function


add, sub = _scaled(ew.add), _scaled(ew.sub)


def true_divide(input: Any, other: Any, *, rounding_mode: str | None = None) -> Any:
    """`input / other`, rounded down ("floor"), towards zero ("trunc") or not (None).

    Source: torch.div.
    """
    if rounding_mode is None:
        return ew.div(input, other)
    if rounding_mode == "floor":
        return ew.floor_divide(input, other)
    if rounding_mode == "trunc":
        return cast(ew.trunc(ew.div(input, other)), dtype=input.dtype)
    raise RuntimeError(
        "div expected rounding_mode to be one of None, 'trunc', or 'floor' but found "
        f"'{rounding_mode}'"
    )


def addcmul(input: Any, tensor1: Any, tensor2: Any, *, value: Any = 1) -> Any:
    """`input + value * tensor1 * tensor2`. Source: torch.addcmul."""
    return input + tensor1 * tensor2 * value


def addcdiv(input: Any, tensor1: Any, tensor2: Any, *, value: Any = 1) -> Any:
    """`input + value * tensor1 / tensor2`. Source: torch.addcdiv."""
    return input + tensor1 / tensor2 * value


OPERATORS = {
    "add": ew.add, "sub": ew.sub, "mul": ew.mul, "truediv": ew.div, "pow": ew.pow,
    "floordiv": ew.floor_divide, "mod": ew.remainder, "matmul": linalg.matmul,
    "and": ew.bitwise_and, "or": ew.bitwise_or, "xor": ew.bitwise_xor,
}  # fmt: skip
COMPARISONS = {"eq": ew.eq, "ne": ew.ne, "lt": ew.lt, "le": ew.le, "gt": ew.gt, "ge": ew.ge}

for _name, _op in OPERATORS.items():
    setattr(Tensor, f"__{_name}__", _op)
    setattr(Tensor, f"__r{_name}__", reflected(_op))
    setattr(Tensor, f"__i{_name}__", in_place(_op))
for _name, _op in COMPARISONS.items():
    setattr(Tensor, f"__{_name}__", _op)
Tensor.__neg__ = ew.neg  # type: ignore[attr-defined]
Tensor.__abs__ = ew.abs  # type: ignore[attr-defined]
Tensor.__invert__ = ew.bitwise_not  # type: ignore[attr-defined]
Tensor.__pos__ = lambda self: self  # type: ignore[attr-defined]

# {family: names}: methods that are the public function of the same name
METHODS: dict[Any, str] = {
    ew: """mul pow floor_divide remainder fmod atan2 neg maximum minimum exp expm1 log log2 log10
        log1p sqrt rsqrt sin cos tan atan sinh cosh tanh sigmoid reciprocal square abs sign floor
        ceil trunc round eq ne lt le gt ge logical_and logical_or logical_xor logical_not
        bitwise_and bitwise_or bitwise_xor bitwise_not isnan isinf isfinite clamp lerp""",
    reduce: """sum mean var std norm prod amax amin argmax argmin max min any all count_nonzero
        cumsum cumprod logsumexp""",
    sh: """flatten unflatten squeeze unsqueeze transpose t movedim narrow split chunk unbind flip
        roll contiguous clone tril triu""",
    ix: """gather scatter_add scatter index_select masked_fill masked_select""",
    linalg: "matmul mm bmm dot mv outer addmm diagonal",
    activation: "relu softmax log_softmax",
    create: "new_zeros new_ones new_full new_empty new_tensor",
    random: "multinomial bernoulli uniform_ normal_ random_ exponential_ bernoulli_",
    sorting: "sort argsort topk unique",
}
for _module, _names in METHODS.items():
    for _name in _names.split():
        setattr(Tensor, _name, getattr(_module, _name))

for _name, _function in {
    "view": sh.view, "reshape": sh.reshape, "permute": sh.permute, "expand": sh.expand,
    "repeat": sh.repeat,
}.items():  # fmt: skip
    setattr(Tensor, _name, sizes(_function))

# {name: function}: methods whose function lives here or has another name
OTHERS = {
    "add": add, "sub": sub, "div": true_divide, "true_divide": true_divide, "multiply": ew.mul,
    "addcmul": addcmul, "addcdiv": addcdiv, "negative": ew.neg, "clip": ew.clamp,
    "swapaxes": sh.transpose, "broadcast_to": sh.expand,
}  # fmt: skip
for _name, _function in OTHERS.items():
    setattr(Tensor, _name, _function)

IN_PLACE = """add sub mul div pow clamp exp log sqrt rsqrt sin cos tanh sigmoid abs neg floor ceil
    round relu masked_fill scatter scatter_add addcmul addcdiv lerp remainder floor_divide
    reciprocal square tril triu"""
for _name in IN_PLACE.split():
    setattr(Tensor, f"{_name}_", in_place(getattr(Tensor, _name)))

for _name, _dtype in {
    "float": dtypes.float32, "double": dtypes.float64, "half": dtypes.float16,
    "bfloat16": dtypes.bfloat16, "int": dtypes.int32, "long": dtypes.int64,
    "short": dtypes.int16, "char": dtypes.int8, "byte": dtypes.uint8, "bool": dtypes.bool_,
}.items():  # fmt: skip
    setattr(Tensor, _name, to_dtype(_dtype))


def _view_as(self: Tensor, other: Tensor) -> Any:
    return sh.view(self, other.shape)


def _expand_as(self: Tensor, other: Tensor) -> Any:
    return sh.expand(self, other.shape)


def _reshape_as(self: Tensor, other: Tensor) -> Any:
    return sh.reshape(self, other.shape)


Tensor.view_as = _view_as  # type: ignore[attr-defined]
Tensor.expand_as = _expand_as  # type: ignore[attr-defined]
Tensor.reshape_as = _reshape_as  # type: ignore[attr-defined]
Tensor.T = property(lambda self: sh.permute(self, range(self.ndim)[::-1]))  # type: ignore[attr-defined]
Tensor.mT = property(lambda self: sh.transpose(self, -1, -2))  # type: ignore[attr-defined]
