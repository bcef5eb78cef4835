"""What a call of an op does: from arrays to arrays, from Tensors to a Tensor with its Node.

One function for each kind of op. The binary one is spelt out in full, because a small multiply
with gradient must cost about what its NumPy call costs (benchmarks/ops.py). Where a tensor is a
part of a larger one (value.PARTS), its class computes: not even a shape is looked at here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from dtrain.autograd import node as nodes
from dtrain.autograd.grad_mode import grad_enabled
from dtrain.autograd.node import (
    Node,
    edge_of,
    make,
    new,
    next_seq,
    save_result,
    select_output,
)  # fmt: skip
from dtrain.autograd.value import PARTS, Value

if TYPE_CHECKING:
    from dtrain.autograd.op import Op

SCALARS: frozenset[Any] = frozenset((int, float, bool, complex))

_recording = grad_enabled.get
_ndarray = np.ndarray


def record(op: Op, inputs: tuple[Any, ...], result: Value, attrs: dict[str, Any]) -> Node:
    """Attach to `result` the node that says how it came from `inputs`."""
    node = Node(op, tuple([edge_of(v) for v in inputs]))
    if attrs:
        node.__dict__.update(attrs)
    op.save(node, inputs, result)
    result._node = node
    result._requires_grad = True
    return node


class Whole:
    """A function of several ops that tensors which are parts (PARTS) take as one.

    `apply(*inputs, **attributes)` calls it.
    """

    def __init__(self, name: str, apply: Callable[..., Any]) -> None:
        self.name, self.apply = name, apply


def elsewhere(op: Op | Whole, inputs: tuple[Any, ...], attrs: dict[str, Any]) -> Any:
    """What the class of the first part among the inputs makes of the call."""
    first = next(v.__class__ for v in inputs if v.__class__ in PARTS)
    return PARTS[first](op, inputs, attrs)


def binary(op: Op, promote: Callable[..., Any] | None) -> Callable[..., Any]:
    forward = op.forward
    differentiable = op.vjp is not None
    keep, keeps_out = op.keep, op.keeps_out

    def call(a: Any, b: Any) -> Any:
        if b.__class__ in SCALARS:
            return with_number(a, b)
        try:
            x = a._data
            y = b._data
        except AttributeError:
            return mixed(a, b)
        if PARTS and (a.__class__ in PARTS or b.__class__ in PARTS):
            return elsewhere(op, (a, b), {})
        # Arrays that were unpickled have dtype objects of their own, equal but not identical.
        if x.dtype is not y.dtype and promote is not None and x.dtype != y.dtype:
            return promote(call, a, b)
        plain = a._base is None and b._base is None
        wanted = a._requires_grad or b._requires_grad
        if not plain:  # views may have come into a graph since they were made
            wanted = a._wants_grad() or b._wants_grad()
        mode = wanted and differentiable and _recording()
        try:
            out = forward(x, y) if mode is True or not mode else mode.compute(op, (x, y), {})
        except ValueError as error:
            raise broadcast_error(x, y, error) from None
        t = new(nodes._tensor)
        t._data = out if out.__class__ is _ndarray else np.asarray(out)
        t._grad = t._version = t._base = None
        if not mode:
            t._node = None
            t._requires_grad = False
            return t
        node = new(Node)
        node.op = op
        node.edges = (
            (a._node or a if a._requires_grad else None, b._node or b if b._requires_grad else None)
            if plain
            else (edge_of(a), edge_of(b))
        )
        node.aux = node.out = node.versions = node.hooks = None
        node.shapes = (x.shape, y.shape)
        node.seq = next_seq()
        if keep:
            if plain and len(keep) == 2 and a._version is None and b._version is None:
                node.saved = (a, b)
            else:
                op.save(node, (a, b), None)
        else:
            node.saved = ()
        if keeps_out:
            save_result(node, t)
        t._node = node
        t._requires_grad = True
        if mode is not True:
            mode.recorded(node, t)
        return t

    def mixed(a: Any, b: Any) -> Any:
        """Something else than two Tensors."""
        if a.__class__ in SCALARS:
            return with_number(a, b)
        if not isinstance(a, Value) and not isinstance(b, Value):
            return forward(a, b)
        return promote(call, a, b) if promote else call(_boxed(a), _boxed(b))

    with_number = _with_number(op, promote, call)
    return call if promote is None else _faces(op, call, with_number)


def _with_number(
    op: Op, promote: Callable[..., Any] | None, call: Callable[..., Any]
) -> Callable[..., Any]:
    """What `call` does when one of its operands is a Python number."""
    forward = op.forward
    differentiable = op.vjp is not None
    keeps = getattr(promote, "keeps", None)
    arrays = getattr(promote, "numbers_as_arrays", False)
    saves = bool(op.keep) or op.keeps_out

    def with_number(a: Any, b: Any) -> Any:
        left = a.__class__ in SCALARS
        tensor, number = (b, a) if left else (a, b)
        if not isinstance(tensor, Value):
            return forward(a, b)
        if PARTS and tensor.__class__ in PARTS:
            return elsewhere(op, (a, b), {})
        x = tensor._data
        if keeps is None or (x.dtype.kind, number.__class__) not in keeps:
            return promote(call, a, b) if promote else call(*map(_boxed, (a, b)))
        try:
            if arrays:  # a ufunc takes a 0-d array faster than a number that it must convert
                number = np.asarray(number, x.dtype)
            mode = differentiable and tensor._wants_grad() and _recording()
            if mode is True or not mode:
                out = forward(number, x) if left else forward(x, number)
            else:
                out = mode.compute(op, (number, x) if left else (x, number), {})
        except OverflowError:  # NumPy refuses what an integer dtype cannot hold, torch wraps it
            return promote(call, a, b)  # type: ignore[misc]
        t = new(nodes._tensor)
        t._data = out if out.__class__ is _ndarray else np.asarray(out)
        t._grad = t._version = t._base = t._node = None
        t._requires_grad = False
        if mode:
            node = new(Node)
            node.op = op
            edge = tensor._node or tensor
            node.edges, node.shapes = (
                ((None, edge), ((), x.shape)) if left else ((edge, None), (x.shape, ()))
            )
            node.saved = ()
            node.aux = node.out = node.versions = node.hooks = None
            node.seq = next_seq()
            if saves:
                op.save(node, (number, tensor) if left else (tensor, number), t)
            t._node, t._requires_grad = node, True
            if mode is not True:
                mode.recorded(node, t)
        return t

    return with_number


def _faces(op: Op, call: Callable[..., Any], with_number: Callable[..., Any]) -> Any:
    """The function that users call, with `operator` and `reflected` for Tensor's `__op__`s."""

    def reflected(b: Any, a: Any) -> Any:
        return with_number(a, b) if a.__class__ in SCALARS else call(a, b)

    def function(input: Any, other: Any) -> Any:
        out = call(input, other)
        if out is NotImplemented:
            name, wrong = ("input", input) if isinstance(other, Value) else ("other", other)
            raise TypeError(
                f"{op.name}(): argument '{name}' must be Tensor, not {type(wrong).__name__}"
            )
        return out

    function.operator, function.reflected = call, reflected  # type: ignore[attr-defined]
    call.op = op  # type: ignore[attr-defined]
    return function


def _boxed(value: Any) -> Any:
    return value if isinstance(value, Value) else make(np.asarray(value))


def unary(op: Op, promote: Callable[..., Any] | None) -> Callable[..., Any]:
    forward = op.forward
    differentiable = op.vjp is not None

    def call(a: Any) -> Any:
        if not isinstance(a, Value):
            return forward(a)
        if PARTS and a.__class__ in PARTS:
            return elsewhere(op, (a,), {})
        x = a._data
        if promote is not None and x.dtype.kind in "biu":
            return promote(call, a)
        mode = differentiable and a._wants_grad() and _recording()
        t = make(forward(x) if mode is True or not mode else mode.compute(op, (x,), {}))
        if mode:
            node = record(op, (a,), t, {})
            if mode is not True:
                mode.recorded(node, t)
        return t

    return call


def single(op: Op, view: bool) -> Callable[..., Any]:
    """One array input, attributes, one result: views, reductions, indexing."""
    forward = op.forward
    differentiable = op.vjp is not None
    aux = bool(op.aux)

    def call(x: Any, **attrs: Any) -> Any:
        if not isinstance(x, Value):
            return forward(x, **attrs)[0] if aux else forward(x, **attrs)
        if PARTS and x.__class__ in PARTS:
            return elsewhere(op, (x,), attrs)
        data = x._data
        mode = differentiable and x._wants_grad() and _recording()
        if mode is True or not mode:
            out = forward(data, **attrs)
        else:
            out = mode.compute(op, (data,), attrs)
        left: tuple[Any, ...] | None = None
        if aux:
            out, *rest = out
            left = tuple(rest)
        t = new(nodes._tensor)
        t._data = out if out.__class__ is _ndarray else np.asarray(out)
        t._grad = t._version = t._base = t._node = None
        t._requires_grad = recording = mode is not False
        if recording:
            t._node = node = new(Node)
            node.op, node.edges, node.shapes = op, (x._node or x,), (data.shape,)
            node.aux, node.saved = left, ()
            node.out = node.versions = node.hooks = None
            node.seq = next_seq()
            node.__dict__ = attrs
            if op.keep or op.keeps_out:
                op.save(node, (x,), t)
            if mode is not True:
                mode.recorded(node, t)
        if view:
            t._share(x)
            if not recording and (x._requires_grad or x._made_quietly):
                t._made_quietly = True
        return t

    return call


def general(op: Op, view: bool, outputs: int) -> Callable[..., Any]:
    forward = op.forward
    differentiable = op.vjp is not None

    def call(*inputs: Any, **attrs: Any) -> Any:
        boxed = [v for v in inputs if isinstance(v, Value)]
        if PARTS and any(v.__class__ in PARTS for v in boxed):
            return elsewhere(op, inputs, attrs)
        arrays = [v._data if isinstance(v, Value) else v for v in inputs]
        mode = differentiable and _recording()
        if mode and not any(v._wants_grad() for v in boxed):
            mode = False
        if mode is True or not mode:
            result = forward(*arrays, **attrs)
        else:
            result = mode.compute(op, tuple(arrays), attrs)
        aux: tuple[Any, ...] = ()
        if op.aux:
            result, *rest = result
            aux = tuple(rest)
        if not boxed:
            return result
        if outputs != 1:
            return _several(op, inputs, result, attrs, mode, outputs, view)
        t = make(result)
        if mode:
            node = record(op, inputs, t, attrs)
            node.shapes = tuple([v.shape if v.__class__ is _ndarray else () for v in arrays])
            node.aux = aux or None
            if mode is not True:
                mode.recorded(node, t)
        return t

    return call


def _several(
    op: Op, inputs: tuple[Any, ...], results: Any, attrs: dict[str, Any],
    mode: Any, outputs: int, view: bool,
) -> tuple[Any, ...]:  # fmt: skip
    """Box the results of an op with many. The first `outputs` (-1: all) are differentiable."""
    tensors = tuple([make(r) for r in results])
    if mode:
        node = Node(op, tuple([edge_of(v) for v in inputs]))
        node.__dict__.update(attrs)
        node.shapes = tuple([v._data.shape if isinstance(v, Value) else () for v in inputs])
        op.save(node, inputs, None)
        differentiable = tensors if outputs < 0 else tensors[:outputs]
        for i, t in enumerate(differentiable):
            t._node = select_output(node, i, len(differentiable))
            t._requires_grad = True
        if mode is not True:
            mode.recorded(node, *tensors)
    if view:
        for t in tensors:
            t._share(inputs[0])
            if t._base is not None:
                t._one_of_many = op.name.capitalize()
    return tensors


def broadcast_error(x: Any, y: Any, error: ValueError) -> RuntimeError | ValueError:
    """torch's sentence for shapes that do not broadcast; the error itself if that was not it."""
    a, b = np.shape(x), np.shape(y)
    for back in range(1, min(len(a), len(b)) + 1):
        if a[-back] != b[-back] and 1 not in (a[-back], b[-back]):
            return RuntimeError(
                f"The size of tensor a ({a[-back]}) must match the size of tensor b ({b[-back]}) "
                f"at non-singleton dimension {max(len(a), len(b)) - back} "
                f"(shapes {list(a)} and {list(b)})"
            )
    return error
