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

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from dtrain.autograd.dispatch import (
    SCALARS as SCALARS,
    binary,
    general,
    record as record,
    single,
    unary,
)
from dtrain.autograd.node import Node, check_saved, make as make, save_result, version_of
from dtrain.autograd.value import Value

OPS: dict[str, Op] = {}


class Op:
    """What `define` was told; `backward` runs the gradient rule of one node."""

    fresh = True  # rules return new arrays, views or `g` itself: see `define`
    lands = False  # the rule asks `n.home(i)` where a gradient may go
    view = False  # results may share memory with the first input

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


def sum_to_shape(grad: Any, shape: tuple[int, ...]) -> Any:
    """Sum a gradient over the axes along which its input was broadcast."""
    lead = grad.ndim - len(shape)
    axes = tuple(range(lead)) + tuple(
        lead + i for i, n in enumerate(shape) if n == 1 and grad.shape[lead + i] != 1
    )
    summed: Any
    if isinstance(grad, Value):
        summed = grad.sum(dim=axes) if axes else grad  # type: ignore[attr-defined]
    else:
        summed = grad.sum(axis=axes, dtype=grad.dtype) if axes else grad
    return summed.reshape(shape)


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
    lands: bool = False,
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
    lands      the rule puts gradients where `n.home(i)` says, when that is somewhere: large ones,
               of weights, are then written once, into the bucket in which they travel.
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
    op.lands, op.view = lands, view
    OPS[name] = op
    if pointwise:
        call = binary(op, promote)
    elif plain and len(names) == 1:
        call = unary(op, promote)
    elif len(names) == 1 and outputs == 1:
        call = single(op, view)
    else:
        assert not view or outputs != 1, f"op {name!r}: a view is of one input"
        call = general(op, view, outputs)
    call.__name__ = call.__qualname__ = name
    call.__module__ = sys._getframe(1).f_globals["__name__"]  # whose name leads to it
    call.op, op.apply = op, call  # type: ignore[attr-defined]
    return call


def _input_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    if isinstance(forward, np.ufunc):
        return ("x",) if forward.nin == 1 else ("a", "b")
    code = forward.__code__
    return code.co_varnames[: code.co_argcount]


ALIAS = define(
    "alias", lambda x: x, vjp=lambda n, g: (g,), sample=lambda: [((np.array([1.0, 2.0]),), {})]
)
