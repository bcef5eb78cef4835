"""One backward pass over several workers: what each of them does of it.

On every worker the nodes of the context run strictly newest first. For every message of the forward
pass that carried tensors with gradients one message goes back: gradients, or "there is none". So:
1. A SEND node waits until its message has come back, and nothing older runs before: the sums are
the same whatever comes first. 2. A RECEIVE node always answers, whether its tensors were used or
not; torch's FAST mode waits for ever when they were not. 3. Nobody waits in a circle: a node waits
for one that was made later, here or elsewhere. 4. The answer to a message comes when all that it
set going is done, so the one who began hears when everything is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dtrain.autograd.engine import Pass, execute, reachable, run_hooks, start
from dtrain.autograd.node import SELECT, Node
from dtrain.comm.work import Future
from dtrain.distributed.autograd.contexts import Context
from dtrain.distributed.autograd.edges import RECEIVE, Key
from dtrain.distributed.rpc import current
from dtrain.distributed.rpc.pool import waiting
from dtrain.futures import collect_all

# What goes to another worker about a pass: (worker, key or None, gradients) -> future of Left.
Tell = Callable[[int, Key | None, Any], Future[Any]]
Left = dict[int, int]  # {worker: how many of its nodes have not run}


class Run(Pass):
    """The part of one worker in a pass. `tell` sends to others."""

    def __init__(
        self, context: Context, number: tuple[int, int], retain: bool, tell: Tell,
        roots: Sequence[Any] = (),
    ) -> None:  # fmt: skip
        super().__init__(False, retain, into_grad=False)
        self.context, self.number, self._tell = context, number, tell
        with context.lock:
            self._sends = dict(context.sends)
            receives = list(context.receives.values())
            heard = {node.sender for node in receives}
            # Who was called and sent nothing back hears of the pass in no other way.
            self._to_begin = sorted(context.called - heard)
        self._missing = set(self._sends.values())
        self._order, self.uses = reachable([*roots, *self._sends.values(), *receives])
        self._place = 0
        self._told: list[Future[Any]] = []
        self._error: BaseException | None = None
        self._lock = threading.RLock()

    def arrive(self, key: Key | None, grads: Sequence[Any] | None) -> Future[Left]:
        """Gradients of a message that was sent (None: it has none) have come back."""
        with self._lock:
            node = self._sends.get(key) if key is not None else None
            if node in self._missing:
                self._missing.discard(node)
                if grads is not None:
                    self.grads[node] = list(grads)
            return self.advance()

    def advance(self, roots: Sequence[Any] = (), grads: Sequence[Any] = ()) -> Future[Left]:
        """Run what can run; a future that is complete when all that it sets going is."""
        with self._lock:
            if self._error is not None:
                raise self._error
            self._told = [self._tell(worker, None, None) for worker in self._to_begin]
            self._to_begin = []
            try:
                execute(self, roots, grads)
            except BaseException as error:
                self._error = error
                raise
            left = len(self._order) - self._place
            if not left:
                self.context.runs[self.number] = None
            return _together({current.agent().rank: left}, self._told)

    def run(self, roots: Sequence[Any], grads: Sequence[Any]) -> None:
        for root, grad in zip(roots, grads, strict=True):
            self.deliver(root, grad, False)
        while self._place < len(self._order):
            node = self._order[self._place]
            if node in self._missing:
                return
            self._place += 1
            self._visit(node, self.grads.pop(node, None))

    def _visit(self, node: Node, grad: Any) -> None:
        if node.op is RECEIVE:
            arrays = None if grad is None else [g if g is None else np.asarray(g) for g in grad]
            self._told.append(self._tell(node.sender, node.key, arrays))
        elif grad is None:
            self.skip(node)
        elif node.op is SELECT:
            self.place_in_list(node, grad if node.hooks is None else run_hooks(node.hooks, grad))
        else:
            self.step(node, grad if node.hooks is None else run_hooks(node.hooks, grad))

    def finish_leaf(self, leaf: Any, grad: Any, owned: bool) -> None:
        if leaf._hooks:
            grad, owned = run_hooks(leaf._hooks, grad), False
        self.context.add_gradient(leaf, grad, owned)

    def waits_for(self) -> list[Key]:
        """The messages that did not come back."""
        return sorted(key for key, node in self._sends.items() if node in self._missing)


def _together(left: Left, parts: list[Future[Any]]) -> Future[Left]:
    def fold(done: Future[list[Future[Left]]]) -> Left:
        for part in done.value():
            for worker, number in part.value().items():
                left[worker] = min(number, left.get(worker, number))
        return left

    return collect_all(parts).then(fold)


def run_backward(
    context: Context, roots: Any, retain_graph: bool, tell: Callable[..., Any]
) -> None:
    """Begin a pass here, and wait until it is done everywhere."""
    edges, grads = start(_checked(roots), [None] * len(roots), False)
    number = (current.agent().rank, context.new_number())
    run = context.runs[number] = Run(
        context, number, retain_graph, tell(context.id, number, retain_graph), edges
    )
    future = run.advance(edges, grads)
    with waiting():
        left = {worker: number for worker, number in future.wait().items() if number}
    if left:
        names = [current.agent().names[worker] for worker in sorted(left)]
        raise RuntimeError(
            f"the backward pass of context {context.id} did not get through on {names}: calls that "
            f"have no answer yet are part of it (here: {run.waits_for()}). Wait for them first"
        )


def _checked(roots: Any) -> Any:
    if not isinstance(roots, list | tuple):
        raise TypeError(
            f"roots must be a list of tensors, got {type(roots).__name__}: one is written [loss]"
        )
    if not roots:
        raise RuntimeError("No tensors provided for gradient computation.")
    for root in roots:
        if not root.requires_grad:
            raise RuntimeError("requires_grad not set on root")
        if root.numel() != 1:
            raise RuntimeError("is not a scalar, all roots need to be scalar")
    return roots
