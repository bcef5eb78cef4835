"""Which op is which method of Tensor: the table that joins `dtrain.ops` to the class.

Importing this module completes the class; `dtrain/__init__.py` does it. Every method has the
signature of the public function of its name, with the tensor as `input`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dtrain import dtypes, legacy, meta as meta
from dtrain.autograd.grad_mode import grad_enabled
from dtrain.autograd.node import make
from dtrain.autograd.promotion import cast
from dtrain.autograd.value import need_whole
from dtrain.ops import (
    activation,
    arithmetic as ar,
    compare as cp,
    create,
    elementwise as ew,
    gather,
    join,
    linalg,
    order,
    random,
    reduce,
    scan,
    shape as sh,
    sorting,
    special,
)
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
    """A method that takes its sizes or dimensions one by one or as one sequence."""

    def method(self: Tensor, *shape: Any, **kwargs: Any) -> Any:
        if kwargs:
            return function(self, *shape, **kwargs)
        if len(shape) == 1 and isinstance(shape[0], (tuple, list)):
            shape = tuple(shape[0])
        return function(self, shape)

    method.__doc__ = function.__doc__
    return method


def relaid(function: Callable[..., Any]) -> Callable[..., Any]:
    """The method that gives self another shape over the same memory, such as `t_`."""

    def method(self: Tensor, *args: Any) -> Any:
        if grad_enabled.get() and self.requires_grad:
            self._check_writable()
        need_whole("a relayout in place", self)
        result = function(make(self._data, self._node), *args)
        self._data, self._node = result._data, result._node
        self._bump_version()
        return self

    method.__doc__ = f"In place: {function.__doc__}"
    return method


def to_dtype(dtype: dtypes.dtype) -> Callable[[Tensor], Any]:
    def method(self: Tensor, memory_format: Any = None) -> Any:
        return cast(self, dtype=dtype)

    method.__doc__ = f"The tensor in {dtype.name}; `memory_format` is accepted and ignored."

    return method


OPERATORS = {
    "add": ar.plus, "sub": ar.minus, "mul": ar.mul, "truediv": ar.quotient,
    "floordiv": ar.floor_divide, "mod": ar.remainder,
    "and": cp.bitwise_and, "or": cp.bitwise_or, "xor": cp.bitwise_xor,
    "lshift": cp.bitwise_left_shift, "rshift": cp.bitwise_right_shift,
}  # fmt: skip
COMPARISONS = {"eq": cp.eq, "ne": cp.ne, "lt": cp.lt, "le": cp.le, "gt": cp.gt, "ge": cp.ge}

for _name, _op in OPERATORS.items():
    setattr(Tensor, f"__{_name}__", _op.operator)  # type: ignore[attr-defined]
    setattr(Tensor, f"__r{_name}__", _op.reflected)  # type: ignore[attr-defined]
    setattr(Tensor, f"__i{_name}__", in_place(_op))
for _name, _op in {"pow": ar.pow, "matmul": linalg.matmul}.items():
    setattr(Tensor, f"__{_name}__", _op)
    setattr(Tensor, f"__r{_name}__", reflected(_op))
    setattr(Tensor, f"__i{_name}__", in_place(_op))
for _name, _op in COMPARISONS.items():
    setattr(Tensor, f"__{_name}__", _op.operator)  # type: ignore[attr-defined]
for _name, _op in {
    "neg": ew.neg, "abs": ew.abs, "invert": cp.bitwise_not, "pos": ew.positive,
}.items():  # fmt: skip
    setattr(Tensor, f"__{_name}__", _op)

# {family: names}: methods that are the public function of the same name
METHODS: dict[Any, str] = {
    ar: """add sub mul div pow floor_divide remainder fmod atan2 maximum minimum hypot logaddexp
        xlogy clamp lerp addcmul addcdiv""",
    cp: """eq ne lt le gt ge logical_and logical_or logical_xor logical_not bitwise_and bitwise_or
        bitwise_xor bitwise_not isnan isinf isfinite isposinf isneginf signbit isclose allclose
        equal""",
    ew: """neg exp exp2 expm1 log log2 log10 log1p sqrt rsqrt sin cos tan asin acos atan sinh cosh
        tanh asinh acosh atanh sigmoid reciprocal square abs sign floor ceil trunc round frac
        deg2rad rad2deg logit nan_to_num""",
    reduce: """sum nansum mean var std norm prod amax amin aminmax argmax argmin max min any all
        count_nonzero logsumexp""",
    scan: "cumsum cumprod cummax cummin diff",
    sh: "flatten unflatten ravel squeeze unsqueeze transpose t movedim",
    join: "narrow select split chunk unbind tensor_split",
    order: "fliplr flipud roll contiguous clone tril triu repeat_interleave",
    gather: """gather scatter_add scatter index_select index_add index_copy index_fill take
        masked_fill masked_select nonzero argwhere take_along_dim""",
    linalg: """matmul mm bmm dot mv outer inner addmm addmv addr baddbmm diagonal diag diag_embed
        trace""",
    activation: "relu softmax log_softmax",
    legacy: "new",
    create: "new_zeros new_ones new_full new_empty new_tensor",
    random: "multinomial bernoulli uniform_ normal_ random_ exponential_ bernoulli_",
    sorting: "sort argsort topk kthvalue median unique unique_consecutive bincount",
}
for _module, _names in METHODS.items():
    for _name in _names.split():
        setattr(Tensor, _name, getattr(_module, _name))

for _name, _function in {
    "view": sh.view, "reshape": sh.reshape, "permute": sh.permute, "expand": sh.expand,
    "broadcast_to": sh.expand,
    "repeat": order.repeat, "tile": order.tile, "flip": order.flip,
}.items():  # fmt: skip
    setattr(Tensor, _name, sizes(_function))

# {name: function}: methods whose function lives here or has another name
OTHERS = {
    "true_divide": ar.div, "divide": ar.div, "subtract": ar.sub, "multiply": ar.mul,
    "negative": ew.neg, "absolute": ew.abs, "clip": ar.clamp, "fix": ew.trunc,
    "arcsin": ew.asin, "arccos": ew.acos, "arctan": ew.atan, "arctan2": ar.atan2,
    "greater": cp.gt, "greater_equal": cp.ge, "less": cp.lt, "less_equal": cp.le,
    "not_equal": cp.ne,
    "swapaxes": sh.transpose, "swapdims": sh.transpose, "moveaxis": sh.movedim,
    "clamp_min": ar.clamp_min, "clamp_max": ar.clamp_max,
    "erf": special.erf,
}  # fmt: skip
for _name, _other in OTHERS.items():
    setattr(Tensor, _name, _other)

IN_PLACE = """add sub mul div pow clamp clamp_min clamp_max clip exp expm1 log log1p sqrt rsqrt sin
    cos tanh sigmoid abs neg floor ceil round trunc sign relu masked_fill scatter scatter_add
    index_add index_copy index_fill addcmul addcdiv addmm baddbmm lerp remainder fmod floor_divide
    reciprocal square tril triu nan_to_num cumsum eq ne lt le gt ge logical_not"""
for _name in IN_PLACE.split():
    setattr(Tensor, f"{_name}_", in_place(getattr(Tensor, _name)))

for _name in ("t", "transpose", "swapaxes", "squeeze", "unsqueeze"):
    setattr(Tensor, f"{_name}_", relaid(getattr(Tensor, _name)))

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
Tensor.T = property(  # type: ignore[attr-defined]
    lambda self: sh.permute(self, range(self.ndim)[::-1])
)
Tensor.mT = property(lambda self: sh.transpose(self, -1, -2))  # type: ignore[attr-defined]
