"""`autograd.Function`: an operation whose forward and backward a user writes.

Its node runs in the same engine as any op's; the user's code sees Tensors only.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

from dtrain.autograd.grad_mode import grad_enabled
from dtrain.autograd.node import Node, check_saved, edge_of, make, select_output
from dtrain.autograd.value import Value


class FunctionCtx:
    """What `forward` leaves for `backward`. Source: torch.autograd.function.FunctionCtx."""

    def __init__(self, needs_input_grad: tuple[bool, ...]) -> None:
        self.needs_input_grad = needs_input_grad
        self.materialize_grads = True
        self._to_save: tuple[Any, ...] = ()
        self._dirty: tuple[Any, ...] = ()
        self._non_differentiable: tuple[Any, ...] = ()
        self._node: weakref.ref[Node] | None = None  # weak: the node owns the ctx

    def save_for_backward(self, *tensors: Any) -> None:
        """Keep tensors (or None) for `saved_tensors`; changes in place are noticed."""
        self._to_save = tensors

    def mark_dirty(self, *tensors: Any) -> None:
        """Name the inputs that forward changed in place; forward must return them."""
        self._dirty = tensors

    def mark_non_differentiable(self, *tensors: Any) -> None:
        """Name outputs that never require grad."""
        self._non_differentiable = tensors

    def set_materialize_grads(self, value: bool) -> None:
        """Whether backward gets zeros (True, the default) or None for unused outputs."""
        self.materialize_grads = value

    @property
    def saved_tensors(self) -> tuple[Any, ...]:
        """What `save_for_backward` kept. RuntimeError once the graph was freed."""
        node = self._node() if self._node is not None else None
        if node is None:
            return self._to_save
        check_saved(node)
        return tuple(
            make(v.array, node.outputs[v.index]()) if isinstance(v, _SavedOutput) else v
            for v in node.saved
        )


class _SavedOutput:
    """A saved tensor that is a result of the function itself: kept without its node (no cycle)."""

    def __init__(self, index: int, array: np.ndarray) -> None:
        self.index = index
        self.array = array


class FunctionOp:
    """The op of a user's function: same interface as `dtrain.autograd.op.Op`."""

    fresh = False  # a user's backward may return anything, a saved tensor too
    composite = None
    keep: tuple[int, ...] = ()

    def __init__(self, cls: type[Function]) -> None:
        self.cls = cls
        self.name = cls.__name__

    def kept_name(self, index: int) -> str:
        return f"saved tensor {index}"

    def backward(self, node: Node, grad: Any, create_graph: bool) -> tuple[Any, ...]:
        grads = grad if isinstance(grad, list) else [grad]
        ctx = node.ctx
        boxed = []
        for value, (shape, dtype) in zip(grads, node.result_kinds, strict=True):
            if value is None and ctx.materialize_grads:
                value = np.zeros(shape, dtype)
            boxed.append(value if value is None or isinstance(value, Value) else make(value))
        mode = grad_enabled.set(create_graph)
        try:
            results = self.cls.backward(ctx, *boxed)
        finally:
            grad_enabled.reset(mode)
        return self.unpack(node, results, create_graph)

    def unpack(self, node: Node, results: Any, create_graph: bool) -> tuple[Any, ...]:
        if not isinstance(results, tuple):
            results = (results,)
        expected = len(node.edges)
        if len(results) > expected and all(r is None for r in results[expected:]):
            results = results[:expected]
        if len(results) != expected:
            raise RuntimeError(
                f"function {self.name}Backward returned an incorrect number of gradients "
                f"(expected {expected}, got {len(results)})"
            )
        for i, result in enumerate(results):
            if result is not None and not isinstance(result, Value):
                raise TypeError(
                    f"function {self.name}Backward returned a {type(result).__name__} as gradient "
                    f"{i}, expected a Tensor or None"
                )
        if create_graph:
            return results
        return tuple(None if r is None else r._data for r in results)


@functools.cache
def _op_of(cls: type[Function]) -> FunctionOp:
    return FunctionOp(cls)


class Function:
    """Base class of custom operations: write static `forward` and `backward`, call `apply`.

    `forward(ctx, *args)` or `forward(*args)` with `setup_context(ctx, inputs, output)`;
    `backward(ctx, *grad_outputs)` returns one gradient (or None) per argument of forward.
    Source: torch.autograd.Function.
    """

    @staticmethod
    def forward(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            "You must implement the forward function for custom autograd.Function."
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        raise NotImplementedError("setup_context is not implemented.")

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        raise NotImplementedError(
            "You must implement either the backward or vjp method for your custom "
            "autograd.Function to use it with backward mode AD."
        )

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """Run forward without recording, then attach one node that calls backward."""
        needs = tuple(isinstance(a, Value) and a._requires_grad for a in args)
        ctx = FunctionCtx(needs)
        recording = any(needs) and grad_enabled.get()
        mode = grad_enabled.set(False)
        try:
            if cls.setup_context is Function.setup_context:
                output = cls.forward(ctx, *args)
            else:
                output = cls.forward(*args)
                cls.setup_context(ctx, args, output)
        finally:
            grad_enabled.reset(mode)
        for tensor in ctx._dirty:
            tensor._bump_version()
        if not recording:
            return output
        results = output if isinstance(output, tuple) else (output,)
        boxed = attach(cls, ctx, args, results)
        return tuple(boxed) if isinstance(output, tuple) else boxed[0]


def attach(
    cls: type[Function], ctx: FunctionCtx, args: tuple[Any, ...], results: tuple[Any, ...]
) -> list[Any]:
    """Give the differentiable results of a function their node."""
    node = Node(_op_of(cls), tuple([edge_of(a) for a in args]))
    node.ctx, ctx._node = ctx, weakref.ref(node)
    excluded = {id(t) for t in ctx._non_differentiable}
    dirty = {id(t) for t in ctx._dirty}
    arguments = {id(a) for a in args}
    boxed: list[Any] = []
    for result in results:
        if not isinstance(result, Value) or id(result) in excluded:
            boxed.append(result)
            continue
        if id(result) in arguments and id(result) not in dirty:
            result = make(result._data)  # an input handed back: the result is another tensor
        boxed.append(result)
    outputs = [t for t in boxed if isinstance(t, Value) and id(t) not in excluded]
    node.result_kinds = [(t._data.shape, t._data.dtype) for t in outputs]
    for i, tensor in enumerate(outputs):
        tensor._node, tensor._requires_grad = select_output(node, i, len(outputs)), True
    keep_saved(node, ctx, results, outputs)
    return boxed


def keep_saved(node: Node, ctx: FunctionCtx, results: tuple[Any, ...], outputs: list[Any]) -> None:
    place = {id(t): i for i, t in enumerate(outputs)}
    node.outputs = [weakref.ref(t._node) for t in outputs]
    node.saved = tuple(
        _SavedOutput(place[id(v)], v._data) if id(v) in place else v for v in ctx._to_save
    )
    node.versions = tuple(
        v._version.count if isinstance(v, Value) and v._version is not None else 0
        for v in ctx._to_save
    )
    ctx._to_save = ()


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a `backward` that cannot itself be differentiated: its results carry no graph.

    Differentiating them again raises, as in torch, instead of being silently wrong.
    """

    @functools.wraps(backward)
    def wrapped(ctx: Any, *grads: Any) -> Any:
        recording = grad_enabled.get()
        mode = grad_enabled.set(False)
        try:
            results = backward(ctx, *grads)
        finally:
            grad_enabled.reset(mode)
        if not recording:
            return results
        many = results if isinstance(results, tuple) else (results,)
        guarded = tuple(_Refuse.apply(r, *grads) if isinstance(r, Value) else r for r in many)
        return guarded if isinstance(results, tuple) else guarded[0]

    return wrapped


class _Refuse(Function):
    @staticmethod
    def forward(ctx: Any, result: Any, *dependencies: Any) -> Any:
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            "trying to differentiate twice a function that was marked with @once_differentiable"
        )
