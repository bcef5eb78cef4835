"""Jacobians, Hessians and their products with vectors, by backward through backward.

All take a function of tensors and its inputs (a Tensor or a tuple of them), and give results in
the same form. Without `create_graph` the results carry no graph. Source: torch.autograd.functional.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from dtrain.autograd.grad_mode import enable_grad
from dtrain.autograd.gradients import grad
from dtrain.autograd.node import make
from dtrain.autograd.value import Value

Function = Callable[..., Any]


def _tuple(value: Any, what: str) -> tuple[Any, ...]:
    values = value if isinstance(value, tuple) else (value,)
    for i, v in enumerate(values):
        if not isinstance(v, Value):
            raise TypeError(
                f"The {what} given to a function of autograd.functional must be either a Tensor or "
                f"a tuple of Tensors but the value at index {i} has type {type(v)}."
            )
    return values


def _like(values: Any, form: Any) -> Any:
    return tuple(values) if isinstance(form, tuple) else values[0]


def _prepared(inputs: tuple[Any, ...], create_graph: bool) -> tuple[Any, ...]:
    """Inputs of our own: in the caller's graph if it is to reach through, else detached."""
    if create_graph:
        return tuple(x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
                     for x in inputs)  # fmt: skip
    return tuple(x.detach().requires_grad_() for x in inputs)


def _gradients(
    outputs: Any, inputs: Any, starts: Any, strict: bool, create_graph: bool
) -> list[Any]:
    """grad(...), with zeros for what does not depend (an error if `strict`)."""
    pairs = [(y, s) for y, s in zip(outputs, starts, strict=True) if y.requires_grad]
    if strict and len(pairs) < len(outputs):
        raise RuntimeError("an output of the user-provided function does not require gradients")
    found: Any = [None] * len(inputs)
    if pairs:
        ys, ss = zip(*pairs, strict=True)
        found = grad(ys, inputs, ss, retain_graph=True, create_graph=create_graph,
                     allow_unused=True)  # fmt: skip
    if strict and any(g is None for g in found):
        raise RuntimeError("the output of the user-provided function is independent of an input")
    return [
        make(np.zeros_like(x._data)) if g is None else g for g, x in zip(found, inputs, strict=True)
    ]


def _finished(values: Any, create_graph: bool) -> list[Any]:
    return list(values) if create_graph else [v.detach() for v in values]


def _vector(v: Any, tensors: tuple[Any, ...], what: str) -> tuple[Any, ...]:
    """The vector of a product: given, or 1 for one single element."""
    if v is None:
        if len(tensors) != 1 or tensors[0].numel() != 1:
            raise RuntimeError(
                f"The vector v can only be None if the user-provided function {what} a single "
                "Tensor with a single element."
            )
        return (make(np.ones_like(tensors[0]._data)),)
    given = _tuple(v, "v")
    if [g.shape for g in given] != [t.shape for t in tensors]:
        raise RuntimeError(
            f"v has invalid size: should be {[list(t.shape) for t in tensors]} but is "
            f"{[list(g.shape) for g in given]}"
        )
    return given


def vjp(
    func: Function, inputs: Any, v: Any = None, create_graph: bool = False, strict: bool = False
) -> tuple[Any, Any]:
    """(func(inputs), v^T J): one backward pass. Source: torch.autograd.functional.vjp."""
    with enable_grad():
        xs = _prepared(_tuple(inputs, "inputs"), create_graph)
        outputs = func(*xs)
        ys = _tuple(outputs, "outputs")
        found = _gradients(ys, xs, _vector(v, ys, "returns"), strict, create_graph)
    return (
        _like(_finished(ys, create_graph), outputs),
        _like(_finished(found, create_graph), inputs),
    )


def jvp(
    func: Function, inputs: Any, v: Any = None, create_graph: bool = False, strict: bool = False
) -> tuple[Any, Any]:
    """(func(inputs), J v), by the double-backward trick. Source: torch.autograd.functional.jvp.

    v^T J is linear in its v: the gradient of it with respect to that v is J applied to ours.
    """
    with enable_grad():
        xs = _prepared(_tuple(inputs, "inputs"), create_graph)
        given = _vector(v, xs, "takes")
        outputs = func(*xs)
        ys = _tuple(outputs, "outputs")
        dummies = tuple(make(np.zeros_like(y._data)).requires_grad_() for y in ys)
        pulled = _gradients(ys, xs, dummies, strict, True)
        found = _gradients(pulled, dummies, given, strict, create_graph)
    return (
        _like(_finished(ys, create_graph), outputs),
        _like(_finished(found, create_graph), outputs),
    )


def jacobian(func: Function, inputs: Any, create_graph: bool = False, strict: bool = False) -> Any:
    """d(output)/d(input) of shape (*output, *input); tuples of tuples for several of either.

    One backward pass per element of the outputs. Source: torch.autograd.functional.jacobian.
    """
    with enable_grad():
        xs = _prepared(_tuple(inputs, "inputs"), create_graph)
        outputs = func(*xs)
        ys = _tuple(outputs, "outputs")
        blocks = [_rows(y, xs, strict, create_graph) for y in ys]
    per_output = [_like(_finished(block, create_graph), inputs) for block in blocks]
    return _like(per_output, outputs)


def _rows(y: Any, xs: tuple[Any, ...], strict: bool, create_graph: bool) -> list[Any]:
    """The Jacobian of one output with respect to each input."""
    rows: list[list[Any]] = [[] for _ in xs]
    for place in range(y.numel()):
        unit = np.zeros_like(y._data)
        unit.reshape(-1)[place] = 1
        for row, g in zip(rows, _gradients([y], xs, [make(unit)], strict, create_graph),
                          strict=True):  # fmt: skip
            row.append(g.reshape((-1,)))
    return [_joined(row, y, x) for row, x in zip(rows, xs, strict=True)]


def _joined(row: list[Any], y: Any, x: Any) -> Any:
    if not row:
        return make(np.zeros((*y.shape, *x.shape), x._data.dtype))
    whole = row[0].new_zeros((len(row), x.numel()))
    for i, part in enumerate(row):
        whole[i] = part
    return whole.reshape((*y.shape, *x.shape))


def _scalar(func: Function) -> Function:
    def checked(*inputs: Any) -> Any:
        out = func(*inputs)
        if not isinstance(out, Value):
            raise RuntimeError("The function given to hessian should return a single Tensor")
        if out.numel() != 1:  # type: ignore[attr-defined]
            raise RuntimeError(
                "The Tensor returned by the function given to hessian should contain a single "
                "element"
            )
        return out.reshape(())  # type: ignore[attr-defined]

    return checked


def hessian(func: Function, inputs: Any, create_graph: bool = False, strict: bool = False) -> Any:
    """Second derivatives of a function with one element: (*input, *input), tuples for several.

    Source: torch.autograd.functional.hessian.
    """
    scalar = _scalar(func)

    def gradient(*xs: Any) -> Any:
        found = _gradients([scalar(*xs)], xs, [make(np.ones((), xs[0]._data.dtype))], strict, True)
        return tuple(found)

    found = jacobian(gradient, _tuple(inputs, "inputs"), create_graph, strict)
    return found if isinstance(inputs, tuple) else found[0][0]


def vhp(
    func: Function, inputs: Any, v: Any = None, create_graph: bool = False, strict: bool = False
) -> tuple[Any, Any]:
    """(func(inputs), v^T H). Source: torch.autograd.functional.vhp."""
    scalar = _scalar(func)
    with enable_grad():
        xs = _prepared(_tuple(inputs, "inputs"), create_graph)
        given = _vector(v, xs, "takes")
        y = scalar(*xs)
        first = _gradients([y], xs, [make(np.ones((), y._data.dtype))], strict, True)
        found = _gradients(first, xs, given, strict, create_graph)
    return _finished([y], create_graph)[0], _like(_finished(found, create_graph), inputs)


def hvp(
    func: Function, inputs: Any, v: Any = None, create_graph: bool = False, strict: bool = False
) -> tuple[Any, Any]:
    """(func(inputs), H v): `vhp`, since the Hessian is symmetric. Source: torch."""
    return vhp(func, inputs, v, create_graph, strict)
