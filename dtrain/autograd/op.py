"""Operations: one `define(...)` says what an op computes, its gradient and what it keeps for it.

Rules:
1. An op called on plain arrays is its forward function. Called on Tensors it computes on their
   arrays and, when a graph is being recorded, leaves one Node behind.
2. An op with promotion has two more faces, `op.operator` and `op.reflected`, for `a + b`: faster,
   and answering NotImplemented to what they do not know, as Python's protocol asks.
3. Inputs (arrays) are positional, attributes (axes, flags) are keyword-only and become attributes
   of the node. Nothing is kept for backward unless named in `saves` or `aux`.
4. A gradient rule is written once and runs on arrays (fast) or on Tensors (higher order); a rule
   that can only do arrays says how to differentiate again by naming its `composite`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from dtrain.autograd import node as nodes
from dtrain.autograd.grad_mode import grad_enabled
from dtrain.autograd.node import (
    Node,
    check_saved,
    edge_of,
    make,
    new,
    next_seq,
    save_result,
    select_output,
    version_of,
)
from dtrain.autograd.value import Value

SCALARS = frozenset((int, float, bool, complex))
OPS: dict[str, Op] = {}

_recording = grad_enabled.get
_ndarray = np.ndarray


class Op:
    """What `define` was told; `backward` runs the gradient rule of one node."""

    fresh = True  # rules return new arrays, views or `g` itself: see `define`

    def __init__(
        self, name: str, forward: Callable[..., Any], vjp: Callable[..., Any] | None,
        inputs: tuple[str, ...], saves: tuple[str, ...], aux: tuple[str, ...],
        composite: Callable[..., Any] | None, broadcasts: bool,
        sample: Callable[[], list[Any]] | None,
    ) -> None:  # fmt: skip
        unknown = set(saves) - set(inputs) - {"y"}
        assert not unknown, f"op {name} saves {unknown}, which are not among its inputs {inputs}"
        self.name = name
        self.forward = forward
        self.vjp = vjp
        self.inputs = inputs
        self.keep = tuple(i for i, n in enumerate(inputs) if n in saves)
        self.kept_names = tuple(inputs[i] for i in self.keep)
        self.keeps_out = "y" in saves
        self.aux = aux
        self.composite = composite
        self.broadcasts = broadcasts
        self.sample = sample
        self.apply: Callable[..., Any] = forward  # `define` puts the function it returns here

    def __repr__(self) -> str:
        return f"<op {self.name}>"

    def node_name(self, node: Node) -> str:
        """What a node of this op is called in torch's style."""
        return "".join(part.capitalize() for part in self.name.split("_")) + "Backward0"

    def save(self, node: Node, inputs: tuple[Any, ...], result: Value | None) -> None:
        """Keep what the rule needs, with the versions it was read at."""
        kept = node.saved = tuple([inputs[i] for i in self.keep])
        for value in kept:
            if isinstance(value, Value) and value._version is not None:
                node.versions = tuple([version_of(v) for v in kept])
                break
        if self.keeps_out and result is not None:
            save_result(node, result)

    def backward(self, node: Node, grad: Any, create_graph: bool) -> tuple[Any, ...]:
        """The gradients of the node's inputs, given that of its result.

        Arrays in and out, or Tensors when `create_graph`.
        """
        check_saved(node)
        unbox(self, node, create_graph)
        grads = self.vjp(node, grad)  # type: ignore[misc]
        fields = node.__dict__  # a kept graph must not hold the unboxed arrays a second time
        for name in self.kept_names:
            del fields[name]
        if node.out is not None:
            del fields["y"]
        for name in self.aux:
            fields.pop(name, None)
        if self.broadcasts:
            for g, shape in zip(grads, node.shapes, strict=True):
                if g is not None and g.shape != shape:
                    return tuple(map(_sum_if_broadcast, grads, node.shapes))
        return grads  # type: ignore[no-any-return]


def unbox(op: Op, node: Node, as_tensors: bool) -> None:
    """Put the saved values on the node under their names."""
    fields = node.__dict__
    for name, value in zip(op.kept_names, node.saved, strict=True):
        fields[name] = value._data if not as_tensors and isinstance(value, Value) else value
    if node.out is not None:
        fields["y"] = make(node.out[0], node) if as_tensors else node.out[0]
    if node.aux is not None and not as_tensors:
        fields.update(zip(op.aux, node.aux, strict=True))


def _sum_if_broadcast(g: Any, shape: tuple[int, ...]) -> Any:
    return g if g is None or g.shape == shape else sum_to_shape(g, shape)


def record(op: Op, inputs: tuple[Any, ...], result: Value, attrs: dict[str, Any]) -> Node:
    """Attach to `result` the node that says how it came from `inputs`."""
    node = Node(op, tuple([edge_of(v) for v in inputs]))
    if attrs:
        node.__dict__.update(attrs)
    op.save(node, inputs, result)
    result._node = node
    result._requires_grad = True
    return node


def sum_to_shape(grad: Any, shape: tuple[int, ...]) -> Any:
    """Sum a gradient over the axes along which its input was broadcast."""
    lead = grad.ndim - len(shape)
    axes = tuple(range(lead)) + tuple(
        lead + i for i, n in enumerate(shape) if n == 1 and grad.shape[lead + i] != 1
    )
    if isinstance(grad, Value):
        summed = grad.sum(dim=axes) if axes else grad  # type: ignore[attr-defined]
    else:
        summed = grad.sum(axis=axes, dtype=grad.dtype) if axes else grad
    return summed.reshape(shape)


# ---------------------------------------------------------------------------------------------
# Dispatchers: what a call of an op does. The binary one is spelt out because a small multiply
# with gradient must cost about what its NumPy call costs (benchmarks/ops.py).


def _binary(op: Op, promote: Callable[..., Any] | None) -> Callable[..., Any]:
    forward = op.forward
    differentiable = op.vjp is not None
    keep, keeps_out = op.keep, op.keeps_out
    keeps = promote.keeps if promote is not None else None  # type: ignore[attr-defined]

    def call(a: Any, b: Any) -> Any:
        if b.__class__ in SCALARS:
            return with_number(a, b)
        try:
            x = a._data
            y = b._data
        except AttributeError:
            return mixed(a, b)
        # Arrays that were unpickled have dtype objects of their own, equal but not identical.
        if x.dtype is not y.dtype and promote is not None and x.dtype != y.dtype:
            return promote(call, a, b)
        try:
            out = forward(x, y)
        except ValueError as error:
            raise broadcast_error(x, y, error) from None
        t = new(nodes._tensor)
        t._data = out if out.__class__ is _ndarray else np.asarray(out)
        t._grad = t._version = t._base = None
        plain = a._base is None and b._base is None
        wanted = a._requires_grad or b._requires_grad
        if not plain:  # views may have come into a graph since they were made
            wanted = a._wants_grad() or b._wants_grad()
        if not (wanted and differentiable and _recording()):
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
        return t

    def with_number(a: Any, b: Any) -> Any:
        """One of the operands is a Python number."""
        left = a.__class__ in SCALARS
        tensor, number = (b, a) if left else (a, b)
        if not isinstance(tensor, Value):
            return forward(a, b)
        x = tensor._data
        if keeps is None or (x.dtype.kind, number.__class__) not in keeps:
            return promote(call, a, b) if promote else call(*map(_boxed, (a, b)))
        try:
            out = forward(number, x) if left else forward(x, number)
        except OverflowError:  # NumPy refuses what an integer dtype cannot hold, torch wraps it
            return promote(call, a, b)  # type: ignore[misc]
        t = make(out)
        if differentiable and tensor._wants_grad() and _recording():
            node = record(op, (a, b), t, {})
            node.shapes = ((), x.shape) if left else (x.shape, ())
        return t

    def mixed(a: Any, b: Any) -> Any:
        """Something else than two Tensors."""
        if a.__class__ in SCALARS:
            return with_number(a, b)
        if not isinstance(a, Value) and not isinstance(b, Value):
            return forward(a, b)
        return promote(call, a, b) if promote else call(_boxed(a), _boxed(b))

    def reflected(b: Any, a: Any) -> Any:
        return with_number(a, b) if a.__class__ in SCALARS else call(a, b)

    if promote is None:
        return call

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


def _unary(op: Op, promote: Callable[..., Any] | None) -> Callable[..., Any]:
    forward = op.forward
    differentiable = op.vjp is not None

    def call(a: Any) -> Any:
        if not isinstance(a, Value):
            return forward(a)
        x = a._data
        if promote is not None and x.dtype.kind in "biu":
            return promote(call, a)
        t = make(forward(x))
        if differentiable and a._wants_grad() and _recording():
            record(op, (a,), t, {})
        return t

    return call


def _general(op: Op, view: bool, outputs: int) -> Callable[..., Any]:
    forward = op.forward
    differentiable = op.vjp is not None

    def call(*inputs: Any, **attrs: Any) -> Any:
        boxed = [v for v in inputs if isinstance(v, Value)]
        arrays = [v._data if isinstance(v, Value) else v for v in inputs]
        result = forward(*arrays, **attrs)
        aux: tuple[Any, ...] = ()
        if op.aux:
            result, *rest = result
            aux = tuple(rest)
        if not boxed:
            return result
        recording = differentiable and _recording() and any(v._wants_grad() for v in boxed)
        if outputs != 1:
            return _several(op, inputs, result, attrs, recording, outputs, view)
        t = make(result)
        if recording:
            node = record(op, inputs, t, attrs)
            node.shapes = tuple([v.shape if v.__class__ is _ndarray else () for v in arrays])
            node.aux = aux or None
        if view:
            t._share(boxed[0])
            if not recording and (boxed[0]._requires_grad or boxed[0]._made_quietly):
                t._made_quietly = True
        return t

    return call


def _several(
    op: Op, inputs: tuple[Any, ...], results: Any, attrs: dict[str, Any],
    recording: bool, outputs: int, view: bool,
) -> tuple[Any, ...]:  # fmt: skip
    """Box the results of an op with many. The first `outputs` (-1: all) are differentiable."""
    tensors = tuple([make(r) for r in results])
    if recording:
        node = Node(op, tuple([edge_of(v) for v in inputs]))
        node.__dict__.update(attrs)
        node.shapes = tuple([v._data.shape if isinstance(v, Value) else () for v in inputs])
        op.save(node, inputs, None)
        differentiable = tensors if outputs < 0 else tensors[:outputs]
        for i, t in enumerate(differentiable):
            t._node = select_output(node, i, len(differentiable))
            t._requires_grad = True
    if view:
        for t in tensors:
            t._share(inputs[0])
            if t._base is not None:
                t._one_of_many = op.name.capitalize()
    return tensors


def define(
    name: str,
    forward: Callable[..., Any],
    *,
    vjp: Callable[..., Any] | None = None,
    saves: str = "",
    inputs: str | None = None,
    aux: str = "",
    promote: Callable[..., Any] | None = None,
    composite: Callable[..., Any] | None = None,
    view: bool = False,
    broadcasts: bool = False,
    outputs: int = 1,
    sample: Callable[[], list[Any]] | None = None,
) -> Callable[..., Any]:
    """State an op; returns the function that applies it to arrays or Tensors.

    forward    arrays and keyword attributes in, array out (with `aux`: array and aux arrays;
               with `outputs` != 1: a tuple of arrays).
    vjp        `vjp(n, g)`: `n` carries the saved values and attributes by name, `g` the gradient
               of the result; returns one gradient (or None) for each input, each a new array, a
               view, or `g` itself: never a saved array, never one new array twice (the engine
               hands new arrays to `.grad` without a copy). Gradients of pointwise ops may keep
               the broadcast shape if `broadcasts`. `n.needs[i]` tells whether anybody wants the
               gradient of input i, `n.shapes[i]` is its shape. No vjp: the result
               never requires grad.
    saves      names among the inputs, and "y" for the result.
    inputs     names of the array inputs; by default forward's positional parameters ("x" or
               "a b" for NumPy functions).
    aux        names of further arrays that forward returns for vjp; needs `composite`, since
               they carry no graph.
    promote    how operands of different dtypes or Python scalars are brought together.
    composite  the same function written in other ops: used for derivatives of derivatives. An
               op that has one saves all its inputs.
    view       the result may share memory with the first input.
    broadcasts gradients may have the broadcast shape: the engine sums them down. Always true of
               ops with two array inputs and no attributes.
    outputs    how many results are differentiable (-1: all of a variable number).
    sample     () -> [(arrays, attributes), ...]: inputs that the registry's tests use.
    """
    assert name not in OPS, f"op {name!r} is defined twice"
    names = tuple(inputs.split()) if inputs is not None else _input_names(forward)
    kept = names if composite is not None else tuple(saves.split())
    if composite is not None and "y" in saves.split():
        kept += ("y",)
    assert not aux or composite is not None, f"op {name!r} has aux values but no composite"
    code = getattr(forward, "__code__", None)
    plain = not (view or aux or (code and code.co_kwonlyargcount)) and outputs == 1
    pointwise = plain and len(names) == 2
    op = Op(
        name, forward, vjp, names, kept, tuple(aux.split()), composite,
        broadcasts or pointwise, sample,
    )  # fmt: skip
    OPS[name] = op
    if pointwise:
        call = _binary(op, promote)
    elif plain and len(names) == 1:
        call = _unary(op, promote)
    else:
        call = _general(op, view, outputs)
    call.__name__ = call.__qualname__ = name
    call.op, op.apply = op, call  # type: ignore[attr-defined]
    return call


def _input_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    if isinstance(forward, np.ufunc):
        return ("x",) if forward.nin == 1 else ("a", "b")
    code = forward.__code__
    return code.co_varnames[: code.co_argcount]


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


ALIAS = define(
    "alias", lambda x: x, vjp=lambda n, g: (g,), sample=lambda: [((np.array([1.0, 2.0]),), {})]
)
