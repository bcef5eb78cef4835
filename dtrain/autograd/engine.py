"""Backward: walk the recorded graph once, newest node first, and deliver gradients.

Rules:
1. A node runs after everything that used its result: nodes are numbered as they are made, so
   descending numbers are a topological order.
2. A leaf's gradient is complete when all its uses in this pass have been heard; then its hooks
   run, it is accumulated into `.grad`, and the post-accumulate hooks run (DDP and FSDP live there).
3. Without `create_graph` everything is arrays; with it, gradients are Tensors and rules record.
4. Callbacks queued during a pass run at its end, in order, when all gradients are in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from operator import attrgetter
from time import monotonic
from typing import Any

import numpy as np

from dtrain import dtypes
from dtrain.autograd.grad_mode import grad_enabled, set_mode
from dtrain.autograd.node import SELECT, Node, check_saved, edge_of, make, release
from dtrain.autograd.op import ALIAS
from dtrain.autograd.value import Value, need_whole

_by_seq = attrgetter("seq")


class Callbacks(list[Callable[[], None]]):
    """What runs at the end of a pass that began at `started`, on the monotonic clock."""

    def __init__(self) -> None:
        super().__init__()
        self.started = monotonic()


_callbacks: ContextVar[Callbacks | None] = ContextVar("callbacks", default=None)


def queue_callback(function: Callable[[], None]) -> None:
    """Run `function` at the end of the backward pass that is running in this thread."""
    queue = _callbacks.get()
    if queue is None:
        raise RuntimeError("Final callbacks can only be installed during backward pass.")
    queue.append(function)


def is_running() -> bool:
    """Whether a backward pass is running in this thread."""
    return _callbacks.get() is not None


def started_at() -> float:
    """When the backward pass that is running in this thread began, on the monotonic clock."""
    queue = _callbacks.get()
    assert queue is not None
    return queue.started


def reachable(roots: Sequence[Any]) -> tuple[list[Node], dict[Any, int]]:
    """The nodes above `roots`, newest first, and how often each leaf is used by them."""
    uses: dict[Any, int] = {}
    seen: set[Node] = set()
    stack: list[Node] = []
    for root in roots:
        if root.__class__ is not Node:
            uses[root] = uses.get(root, 0) + 1
        elif root not in seen:
            seen.add(root)
            stack.append(root)
    while stack:
        for edge in stack.pop().edges:
            if edge is None:
                continue
            if edge.__class__ is not Node:
                uses[edge] = uses.get(edge, 0) + 1
            elif edge not in seen:
                seen.add(edge)
                stack.append(edge)
    return sorted(seen, key=_by_seq, reverse=True), uses


class Pass:
    """One backward pass: the gradients in flight and where they are to arrive.

    `wanted` maps the nodes and leaves asked for to their places in `found`; None means every leaf.
    With `into_grad` a leaf accumulates into its `.grad`, else its gradient goes to `found`.
    """

    def __init__(
        self, create_graph: bool, retain_graph: bool, wanted: dict[Any, list[int]] | None = None,
        into_grad: bool = True,
    ) -> None:  # fmt: skip
        self.create_graph = create_graph
        self.retain_graph = retain_graph
        self.wanted = wanted
        self.into_grad = into_grad
        self.found: dict[int, Any] = {}
        self.grads: dict[Any, Any] = {}  # {Node or leaf: gradient so far}
        self.uses: dict[Any, int] = {}  # {leaf: contributions still to come}

    def run(self, roots: Sequence[Any], grads: Sequence[Any]) -> None:
        order, self.uses = reachable(roots)
        for root, grad in zip(roots, grads, strict=True):
            self.deliver(root, grad, False)
        if self.wanted is not None:
            self.run_towards(self.wanted, order)
            return
        take = self.grads.pop
        for node in order:
            grad = take(node, None)
            if grad is None:
                self.skip(node)
                continue
            if node.hooks is not None:
                grad = run_hooks(node.hooks, grad)
            if node.op is SELECT:
                self.place_in_list(node, grad)
            else:
                self.step(node, grad)

    def run_towards(self, wanted: dict[Any, list[int]], order: list[Node]) -> None:
        """Run only what lies on a path to something wanted; other inputs get no gradient."""
        useful: set[Any] = set(wanted)
        for node in reversed(order):
            if any(edge in useful for edge in node.edges):
                useful.add(node)
        for node in order:
            grad = self.grads.pop(node, None)
            if grad is None or node not in useful:
                self.skip(node)
                continue
            if node.hooks is not None:
                grad = run_hooks(node.hooks, grad)
            self.collect(node, grad)
            edges = node.edges
            node.edges = tuple([edge if edge in useful else None for edge in edges])
            try:
                if node.op is SELECT:
                    self.place_in_list(node, grad)
                elif any(node.needs):
                    self.step(node, grad)
            finally:
                node.edges = edges

    def collect(self, place: Any, grad: Any) -> None:
        for index in self.wanted.get(place, ()):  # type: ignore[union-attr]
            self.found[index] = grad

    def step(self, node: Node, grad: Any) -> None:
        """Run one node's rule and pass its results on."""
        op = node.op
        if self.create_graph and op.composite is not None:
            grads = differentiate_composite(node, grad)
        else:
            if op.lands and not self.create_graph:
                node.homes = [self.home_of(edge) for edge in node.edges]
            grads = op.backward(node, grad, self.create_graph)
        if not self.retain_graph:
            release(node)
        fresh = op.fresh and grad.__class__ is not list  # parts of a list may be handed through
        pending = self.grads
        for edge, g in zip(node.edges, grads, strict=True):
            if edge.__class__ is Node:
                if g is not None:
                    before = pending.get(edge)
                    pending[edge] = g if before is None else before + g
            elif edge is not None:
                self.deliver(edge, g, fresh and g is not grad)

    def home_of(self, edge: Any) -> Any:
        """Where a rule may put the gradient of an input by itself: the array of a leaf's home.

        None for a leaf that has none, or whose gradient is more than this one contribution.
        """
        if edge.__class__ is Node or edge is None or edge._home is None or edge._grad is not None:
            return None
        only = self.uses[edge] == 1 and edge not in self.grads and not edge._hooks
        arrives = self.into_grad and (self.wanted is None or edge in self.wanted)
        return edge._home._data if only and arrives else None

    def place_in_list(self, node: Node, grad: Any) -> None:
        whole = node.edges[0]
        if whole is not None:
            self.grads.setdefault(whole, [None] * node.total)[node.index] = grad

    def skip(self, node: Node) -> None:
        """No gradient reached this node: its leaves need not wait for it."""
        for edge in node.edges:
            if edge is not None and edge.__class__ is not Node:
                self.deliver(edge, None, False)

    def deliver(self, edge: Any, grad: Any, owned: bool) -> None:
        """A contribution (None: there is none) reaches a node or a leaf."""
        before = self.grads.get(edge)
        if before is not None:
            grad, owned = (before, False) if grad is None else (before + grad, True)
        if edge.__class__ is not Node:
            self.uses[edge] -= 1
            if not self.uses[edge] and grad is not None:
                self.grads.pop(edge, None)
                self.finish_leaf(edge, grad, owned)
                return
        if grad is not None:
            self.grads[edge] = grad

    def finish_leaf(self, leaf: Any, grad: Any, owned: bool) -> None:
        if self.wanted is not None and leaf not in self.wanted:
            return
        if leaf._hooks:
            grad, owned = run_hooks(leaf._hooks, grad), False
        if not self.into_grad:
            self.collect(leaf, grad)
            return
        accumulate(leaf, grad, owned)
        if leaf._post_accumulate:
            for hook in tuple(leaf._post_accumulate.values()):
                hook(leaf)


def accumulate(leaf: Any, grad: Any, owned: bool) -> None:
    """Add a gradient to `leaf.grad`: arrays in place when there is one, Tensors out of place.

    The first array is kept as it is when nobody else has it (`owned`), else copied.
    """
    present = leaf._grad
    if isinstance(grad, Value):
        again: Any = grad
        leaf._grad = again.clone() if present is None else present + again
        return
    data = leaf._data
    if grad.__class__ is not np.ndarray or grad.dtype != data.dtype:
        grad = np.asarray(grad, dtype=data.dtype)
    if grad.shape != data.shape:
        raise RuntimeError(
            f"the gradient of a leaf has shape {list(grad.shape)}, the leaf {list(data.shape)}"
        )
    if present is None and leaf._home is not None:
        settle(leaf, grad)
    elif present is None:
        keep = owned and grad.base is None and grad.flags.writeable
        leaf._grad = make(grad if keep else grad.copy())
    elif present._requires_grad:
        leaf._grad = make(present._data + grad)
    else:
        np.add(present._data, grad, out=present._data)
        if present._version is not None:
            present._version.count += 1


def settle(leaf: Any, grad: np.ndarray) -> None:
    """Make the leaf's home its gradient; a rule may have put it there already."""
    home = leaf._home
    if grad is not home._data:
        np.copyto(home._data, grad)
    if home._version is not None:
        home._version.count += 1
    leaf._grad = home


def run_hooks(hooks: dict[int, Callable[..., Any]], grad: Any) -> Any:
    """Let hooks see (as a Tensor) and replace a gradient; the last may be `retain_grad`'s."""
    for hook in tuple(hooks.values()):
        boxed = grad if isinstance(grad, Value) else make(np.asarray(grad))
        replaced = hook(boxed)
        if replaced is not None:
            check_replacement(hook, boxed, replaced)
            grad = replaced if grad is boxed else replaced._data
    return grad


def check_replacement(hook: Callable[..., Any], before: Any, after: Any) -> None:
    """What a hook returns must be able to stand for the gradient; torch's sentences."""
    name = getattr(hook, "__name__", repr(hook))
    if not isinstance(after, Value):
        raise TypeError(f"expected Variable, but hook returned '{type(after).__name__}'")
    if after._data.shape != before._data.shape:
        raise RuntimeError(
            f"hook '{name}' has changed the size of value: from {list(before._data.shape)} to "
            f"{list(after._data.shape)}"
        )
    if after._data.dtype != before._data.dtype:
        was, got = (dtypes.from_numpy(v._data.dtype).scalar_type for v in (before, after))
        raise RuntimeError(
            f"hook '{name}' has changed the type of value (was dtrain.{was}Tensor got "
            f"dtrain.{got}Tensor)"
        )


def differentiate_composite(node: Node, grad: Any) -> tuple[Any, ...]:
    """Gradients of a fused op as Tensors, by differentiating its composite.

    The inputs are aliased so that the inner pass stops at them even where one was computed from
    another.
    """
    op = node.op
    check_saved(node)
    aliases = [
        ALIAS(v) if edge is not None else v
        for v, edge in zip(node.saved[: len(node.edges)], node.edges, strict=True)
    ]
    result = op.composite(*aliases, **node.__dict__)
    wanted = [i for i, edge in enumerate(node.edges) if edge is not None]
    found = grad_of([result], [aliases[i] for i in wanted], [grad], True, True, True)
    grads: list[Any] = [None] * len(node.edges)
    for i, value in zip(wanted, found, strict=True):
        grads[i] = value
    return tuple(grads)


def execute(work: Pass, roots: Sequence[Any], grads: Sequence[Any]) -> None:
    """Run a pass with its callbacks and the grad mode it needs."""
    outer = _callbacks.get()
    queue = Callbacks()
    mode = set_mode(work.create_graph)
    token = _callbacks.set(queue)
    try:
        work.run(roots, grads)
        for callback in queue:  # a callback may queue another
            callback()
    finally:
        _callbacks.reset(token)
        grad_enabled.reset(mode)
    assert _callbacks.get() is outer


def initial_grad(i: int, root: Any, grad: Any, create_graph: bool) -> Any:
    """The gradient a pass starts with: given, or 1 for a scalar root."""
    data = root._data
    if grad is None:
        if data.size != 1:
            raise RuntimeError("grad can be implicitly created only for scalar outputs")
        grad = make(np.ones(data.shape, data.dtype))
    if not isinstance(grad, Value):
        raise TypeError(f"gradients can be either Tensors or None, but got {type(grad).__name__}")
    if grad._data.shape != data.shape:
        raise RuntimeError(
            f"Mismatch in shape: grad_output[{i}] has a shape of {list(grad._data.shape)} and "
            f"output[{i}] has a shape of {list(data.shape)}."
        )
    if grad._data.dtype != data.dtype:
        grad = grad.to(root.dtype)  # type: ignore[attr-defined]
    return grad if create_graph else grad._data


def start(
    roots: Sequence[Any], grads: Sequence[Any], create_graph: bool
) -> tuple[list[Any], list[Any]]:
    for i, root in enumerate(roots):
        if not root._wants_grad():
            raise RuntimeError(
                f"element {i} of tensors does not require grad and does not have a grad_fn"
            )
    first = [
        initial_grad(i, r, g, create_graph)
        for i, (r, g) in enumerate(zip(roots, grads, strict=True))
    ]
    return [edge_of(root) for root in roots], first


def places_of(inputs: Sequence[Any]) -> dict[Any, list[int]]:
    """{place in the graph: numbers of the inputs there}."""
    wanted: dict[Any, list[int]] = {}
    for i, tensor in enumerate(inputs):
        if not tensor._wants_grad():
            raise RuntimeError("One of the differentiated Tensors does not require grad")
        wanted.setdefault(edge_of(tensor), []).append(i)
    return wanted


def backward(
    roots: Sequence[Any],
    grads: Sequence[Any],
    retain_graph: bool,
    create_graph: bool,
    inputs: Sequence[Any] | None = None,
) -> None:
    """Accumulate gradients of `roots` into the leaves (or only into `inputs`, leaves or not)."""
    need_whole("autograd.backward", *roots)
    if inputs is not None and len(inputs) == 0:
        raise RuntimeError("`inputs` argument to `backward()` cannot be empty.")
    edges, first = start(roots, grads, create_graph)
    wanted = None if inputs is None else places_of(inputs)
    work = Pass(create_graph, retain_graph, wanted)
    execute(work, edges, first)
    for places in () if wanted is None else wanted.values():
        if places[0] in work.found:  # inputs that are no leaves; those have been served
            accumulate(inputs[places[0]], work.found[places[0]], False)  # type: ignore[index]


def grad_of(
    roots: Sequence[Any],
    inputs: Sequence[Any],
    grads: Sequence[Any],
    retain_graph: bool,
    create_graph: bool,
    allow_unused: bool,
) -> list[Any]:
    """Gradients of `roots` with respect to `inputs`, as Tensors; None where unused."""
    need_whole("autograd.grad", *roots, *inputs)
    edges, first = start(roots, grads, create_graph)
    work = Pass(create_graph, retain_graph, places_of(inputs), into_grad=False)
    execute(work, edges, first)
    results = [work.found.get(i) for i in range(len(inputs))]
    unused = [i for i, r in enumerate(results) if r is None]
    if unused and not allow_unused:
        raise RuntimeError(
            f"The differentiated Tensor at index {unused[0]} appears to not have been used in the "
            "graph. Set allow_unused=True if this is the desired behavior."
        )
    return [
        r if r is None or isinstance(r, Value) else make(np.array(r, dtype=t._data.dtype))
        for r, t in zip(results, inputs, strict=True)
    ]
