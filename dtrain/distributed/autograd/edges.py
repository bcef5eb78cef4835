"""Where the graph leaves a worker: a SEND node for each message, a RECEIVE node where it arrives.

Rules: 1. sender and receiver walk arguments and results in the same order (`tensors_in`), so that a
message needs to say only which of its tensors carry gradients. 2. A message has one node on each
side, whatever number of tensors is in it. 3. A RECEIVE node has no edges: the graph goes on
elsewhere, and only `passes` knows how.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from dtrain.autograd.node import Node, edge_of, select_output
from dtrain.tensor import Tensor


class Key(NamedTuple):
    """Which message: who called, the number of the call, 0 for the call or 1 for its answer."""

    caller: int
    number: int
    way: int

    def answer(self) -> Key:
        """The key of the answer to this call."""
        return self._replace(way=1)


class _Send:
    """The op of tensors that were sent: hands the gradients on to where they came from."""

    name = "SendRpcBackward"
    fresh = lands = False
    composite = None
    keep: tuple[int, ...] = ()

    def node_name(self, node: Node) -> str:
        return self.name

    def backward(self, node: Node, grad: list[Any], create_graph: bool) -> tuple[Any, ...]:
        return tuple(grad)


class _Receive:
    """The op of tensors that came: their gradients go back to the sender."""

    name = "RecvRpcBackward"
    fresh = lands = False
    composite = None
    keep: tuple[int, ...] = ()

    def node_name(self, node: Node) -> str:
        return self.name

    def backward(self, node: Node, grad: Any, create_graph: bool) -> tuple[Any, ...]:
        raise RuntimeError(
            f"a tensor of this graph came from worker {node.worker!r} in a distributed autograd "
            "context: use distributed.autograd.backward(context_id, roots) instead of backward()"
        )


SEND, RECEIVE = _Send(), _Receive()


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of arguments or results, in lists, tuples, dicts and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_in(part)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from tensors_in([getattr(value, f.name) for f in dataclasses.fields(value)])


def send_node(value: Any) -> tuple[Node | None, list[int]]:
    """The node of a message with `value` (None: no gradients), and which tensors carry them."""
    tensors = list(tensors_in(value))
    places = [i for i, tensor in enumerate(tensors) if tensor._wants_grad()]
    if not places:
        return None, places
    return Node(SEND, tuple([edge_of(tensors[i]) for i in places])), places


def receive_node(value: Any, places: Sequence[int], key: Key, sender: int, worker: str) -> Node:
    """The node of message `key` with `value`, which came from rank `sender`, called `worker`.

    It becomes the source of the tensors at `places`, which nobody else may have seen yet.
    """
    node = Node(RECEIVE, ())
    node.key, node.sender, node.worker = key, sender, worker  # type: ignore[attr-defined]
    tensors = list(tensors_in(value))
    for index, place in enumerate(places):
        tensors[place]._node = select_output(node, index, len(places))
        tensors[place]._requires_grad = True
    return node
