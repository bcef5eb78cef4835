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
from dtrain.autograd.node import Node, check_saved, edge_of, make, select_output, version_of
from dtrain.autograd.op import sum_to_shape
from dtrain.autograd.promotion import cast
from dtrain.autograd.value import Value, Version, need_whole
from dtrain.dtypes import from_numpy


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
        own = node.own_saved
        return tuple(make(v._data, own[i]()) if i in own else v for i, v in enumerate(node.saved))


class FunctionOp:
    """The op of a user's function: same interface as `dtrain.autograd.op.Op`."""

    fresh = False  # a user's backward may return anything, a saved tensor too
    lands = False
    composite = None
    keep: tuple[int, ...] = ()

    def __init__(self, cls: type[Function]) -> None:
        self.cls = cls
        self.name = f"{cls.__name__}Backward"

    def node_name(self, node: Node) -> str:
        return self.name

    def backward(self, node: Node, grad: Any, create_graph: bool) -> tuple[Any, ...]:
        check_saved(node)
        ctx = node.ctx
        boxed = [
            self.box(value, kind, ctx.materialize_grads)
            for value, kind in zip(self.by_output(node, grad), node.result_kinds, strict=True)
        ]
        return self.unpack(node, self.cls.backward(ctx, *boxed), create_graph)

    def by_output(self, node: Node, grad: Any) -> list[Any]:
        """The gradient of every result of forward: those that cannot have one get None."""
        given = grad if isinstance(grad, list) else [grad]
        grads: list[Any] = [None] * len(node.result_kinds)
        for place, value in zip(node.places, given, strict=True):
            grads[place] = value
        return grads

    def box(self, value: Any, kind: Any, materialize: bool) -> Any:
        if value is None:
            return make(np.zeros(*kind)) if materialize and kind is not None else None
        return value if isinstance(value, Value) else make(value)

    def unpack(self, node: Node, results: Any, create_graph: bool) -> tuple[Any, ...]:
        if not isinstance(results, tuple):
            results = (results,)
        expected = len(node.edges)
        if len(results) > expected and all(r is None for r in results[expected:]):
            results = results[:expected]
        if len(results) != expected:
            raise RuntimeError(
                f"function {self.name} returned an incorrect number of gradients "
                f"(expected {expected}, got {len(results)})"
            )
        grads = [
            None if r is None or edge is None else self.fit(i, r, *kind)
            for i, (r, edge, kind) in enumerate(
                zip(results, node.edges, node.input_kinds, strict=True)
            )
        ]
        return tuple([g if create_graph or g is None else g._data for g in grads])

    def fit(self, i: int, grad: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        """A gradient summed down to the input's shape and in its dtype, as torch takes it."""
        if not isinstance(grad, Value):
            raise RuntimeError(f"expected Variable or None (got {type(grad).__name__})")
        have = grad._data.shape
        if have != shape:
            if not broadcastable(shape, have):
                raise RuntimeError(
                    f"Function {self.name} returned an invalid gradient at index {i} - got "
                    f"{list(have)} but expected shape compatible with {list(shape)}"
                )
            grad = sum_to_shape(grad, shape)
        return grad if grad._data.dtype == dtype else cast(grad, dtype=from_numpy(dtype))


def broadcastable(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    """Whether `shape` can be expanded to `to`."""
    pairs = zip(shape[::-1], to[::-1], strict=False)
    return len(shape) <= len(to) and all(a in (1, b) for a, b in pairs)


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
        need_whole(cls.__name__, *args)
        needs = tuple([isinstance(a, Value) and a._wants_grad() for a in args])
        ctx = FunctionCtx(needs)
        recording = any(needs) and grad_enabled.get()  # True, or who watches
        edges = tuple([edge_of(a) for a in args]) if recording else ()
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
        boxed = attach(cls, ctx, edges, args, results)
        if recording is not True and ctx._node is not None:
            recording.recorded(ctx._node(), *boxed)
        return tuple(boxed) if isinstance(output, tuple) else boxed[0]


def attach(
    cls: type[Function], ctx: FunctionCtx, edges: tuple[Any, ...], args: tuple[Any, ...],
    results: tuple[Any, ...],
) -> list[Any]:  # fmt: skip
    """Give the differentiable results of a function their node."""
    dirty = {id(t) for t in ctx._dirty}
    for tensor in ctx._dirty:
        tensor._check_writable()
    boxed = [own_result(r, args) if id(r) not in dirty else r for r in results]
    node = Node(_op_of(cls), edges)  # type: ignore[arg-type]  # classes are hashable
    node.ctx, ctx._node = ctx, weakref.ref(node)  # type: ignore[attr-defined]
    node.input_kinds = [_kind(a) or ((), None) for a in args]  # type: ignore[attr-defined]
    node.result_kinds = [_kind(r) for r in results]  # type: ignore[attr-defined]
    excluded = {id(t) for t in ctx._non_differentiable}
    node.places = places = [  # type: ignore[attr-defined]
        i
        for i, (r, t) in enumerate(zip(results, boxed, strict=True))
        if isinstance(t, Value) and id(r) not in excluded and t._data.dtype.kind not in "biu"
    ]
    for k, place in enumerate(places):
        maker = node if len(places) == 1 else select_output(node, k, len(places))
        tensor = boxed[place]
        if id(tensor) in dirty:
            tensor._move(make(tensor._data, maker))
        else:
            tensor._node, tensor._requires_grad = maker, True
    keep_saved(node, ctx, results, [boxed[place] for place in places])
    ctx._dirty = ctx._non_differentiable = ()  # a changed input now leads to the node: no cycle
    return boxed


def own_result(result: Any, args: tuple[Any, ...]) -> Any:
    """A result that can get a node: an input handed back is boxed anew, over the same memory."""
    if not isinstance(result, Value):
        return result
    if any(result is a for a in args):
        alias = make(result._data)
        alias._share(result)
        result = alias
    result._base = None  # made unrecorded: the graph of its base knows nothing of it
    return result


def _kind(value: Any) -> Any:
    return (value._data.shape, value._data.dtype) if isinstance(value, Value) else None


def keep_saved(node: Node, ctx: FunctionCtx, results: tuple[Any, ...], outputs: list[Any]) -> None:
    """Move what `save_for_backward` named to the node, results of its own without their node."""
    for i, value in enumerate(ctx._to_save):
        if value is not None and not isinstance(value, Value):
            raise TypeError(
                f"save_for_backward can only save variables, but argument {i} is of type "
                f"{type(value).__name__}"
            )
    made = {id(results[p]): t for p, t in zip(node.places, outputs, strict=True)}
    node.own_saved = {  # type: ignore[attr-defined]
        i: weakref.ref(made[id(v)]._node) for i, v in enumerate(ctx._to_save) if id(v) in made
    }
    node.saved = tuple(
        _without_node(v) if i in node.own_saved else v for i, v in enumerate(ctx._to_save)
    )
    node.versions = tuple([version_of(v) for v in node.saved])
    ctx._to_save = ()


def _without_node(tensor: Any) -> Any:
    """The same memory and version, outside the graph: a node must not hold itself."""
    if tensor._version is None:
        tensor._version = Version()
    plain = make(tensor._data)
    plain._version = tensor._version
    return plain


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
