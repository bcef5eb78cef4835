"""Watching what is recorded: taking away what nodes keep for backward, and giving it back.

Rules: 1. A watcher stands in place of True in the grad mode (grad_mode.py), so an op lets it
compute and tells it of its complete node with two comparisons; who does not watch pays nothing
else. The innermost watcher is told, no other.
2. What stands in `Node.saved` in place of a tuple is asked to `restore(node)` before a rule runs.
What was restored stays as long as the node keeps it: a graph that is retained is not emptied again.
Source: the saved-tensor hooks of torch.autograd.graph; here whole nodes are watched, since a rule
also keeps arrays that were never tensors.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any, Protocol

from dtrain.autograd.grad_mode import grad_enabled, is_grad_enabled, watching
from dtrain.autograd.node import Node


class Watcher:
    """Who is told of what is recorded: for each op, `compute` and then `recorded`. A
    Function has `recorded` alone.
    """

    def compute(self, op: Any, inputs: tuple[Any, ...], attrs: dict[str, Any]) -> Any:
        """What the forward function of `op` returns for these arrays."""
        return op.forward(*inputs, **attrs)

    def recorded(self, node: Node, *results: Any) -> None:
        """A node is complete; its results, Tensors, have not been handed out yet."""
        raise NotImplementedError


class StandIn(Protocol):
    """What can stand in `Node.saved`."""

    def restore(self, node: Node) -> None:
        """Put back what the node kept, or raise."""


@contextlib.contextmanager
def watch(watcher: Watcher, *, enable: bool = False) -> Iterator[None]:
    """Tell `watcher` of what this thread records inside; `enable` lets it record anyway."""
    recording = enable or is_grad_enabled()
    outer, mode = watching.set(watcher), grad_enabled.set(watcher if recording else False)
    try:
        yield
    finally:
        grad_enabled.reset(mode)
        watching.reset(outer)


def keeps(node: Node) -> bool:
    """Whether a node holds anything for its rule (attributes, too, may be large arrays)."""
    return bool(node.saved or node.__dict__) or node.out is not None or node.aux is not None


def take(node: Node, stand_in: StandIn) -> None:
    """Let go of all that the node keeps."""
    node.saved = stand_in
    node.out = node.aux = node.versions = None
    own = node.__dict__.pop("own_saved", None)  # of a Function: places in this graph, no values
    node.__dict__.clear()
    if own is not None:
        node.own_saved = own  # type: ignore[attr-defined]


def give(node: Node, source: Node) -> None:
    """Let the node keep what `source`, another run of the same call, keeps."""
    node.saved, node.versions = source.saved, source.versions
    node.out, node.aux = source.out, source.aux
    node.__dict__ = {**source.__dict__, **node.__dict__}
    if "ctx" in node.__dict__:
        node.ctx._node = weakref.ref(node)


def arrays_of(node: Node) -> list[Any]:
    """The arrays that a node keeps: of inputs, of the result, and left by forward."""
    values = [getattr(value, "_data", value) for value in node.saved]
    values += [] if node.out is None else [node.out[0]]
    values += node.aux or ()
    return [value for value in values if hasattr(value, "dtype")]
