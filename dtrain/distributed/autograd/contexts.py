"""What a worker knows of each distributed autograd context: `Context`, found by its id.

Rules: 1. an id is unique over all workers: the rank of its maker and a number. 2. A worker enters a
context when the first call in it arrives, and leaves when the maker does: each tells those whom it
has called. 3. An id that was left is never entered again, so that a late call leaves nothing.
"""

from __future__ import annotations

import itertools
import threading
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np

from dtrain.autograd.node import Node, make
from dtrain.distributed.autograd.edges import Key
from dtrain.distributed.rpc import current
from dtrain.tensor import Tensor

if TYPE_CHECKING:
    from dtrain.distributed.autograd.passes import Run

_ID_BITS = 48  # of the number of a context; those above are the rank, as in torch

# A call that comes after its context was left is late by less than so many contexts.
_REMEMBERED = 4096


class Context:
    """The books of one context on one worker. Thread-safe with `lock`."""

    def __init__(self, number: int) -> None:
        self.id = number
        self.lock = threading.RLock()
        self.sends: dict[Key, Node] = {}
        self.receives: dict[Key, Node] = {}
        self.called: set[int] = set()  # the workers to which calls went
        self.gradients: dict[Tensor, Tensor] = {}
        self.runs: dict[tuple[int, int], Run | None] = {}  # None: complete
        self._numbers = itertools.count()

    def new_number(self) -> int:
        """A number for a call, or a backward pass, that begins here."""
        return next(self._numbers)

    def note_send(self, key: Key, node: Node | None) -> None:
        """A message is about to be sent; `node` if there are gradients to come back for it."""
        if node is not None:
            with self.lock:
                self.sends[key] = node

    def note_receive(self, node: Node) -> None:
        """A message has come, whose sender wants to hear of gradients."""
        with self.lock:
            self.receives[node.key] = node

    def forget(self, key: Key) -> None:
        """A message did not arrive: nothing will come back for it."""
        with self.lock:
            self.sends.pop(key, None)

    def add_gradient(self, leaf: Any, grad: Any, owned: bool) -> None:
        """Add to the gradient of a leaf; `owned`: nobody else has this array."""
        grad = np.asarray(grad, dtype=leaf._data.dtype)
        with self.lock:
            before = self.gradients.get(leaf)
            if before is not None:
                np.add(before._data, grad, out=before._data)
                return
            keep = owned and grad.base is None and grad.flags.writeable
            self.gradients[leaf] = make(grad if keep else grad.copy())


class Contexts:
    """Those of one worker."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._open: dict[int, Context] = {}
        self._left: dict[int, None] = {}  # the last ones, the oldest first

    def new(self) -> Context:
        """A context of this worker's own."""
        number = (self._rank << _ID_BITS) + next(self._numbers)
        with self._lock:
            made = self._open[number] = Context(number)
        return made

    def enter(self, number: int) -> Context | None:
        """The context of this id, made when it is new here; None if it was left."""
        with self._lock:
            if number in self._left:
                return None
            return self._open.setdefault(number, Context(number))

    def find(self, number: int) -> Context:
        """The context of this id. RuntimeError, in torch's words, when there is none."""
        with self._lock:
            if number not in self._open:
                raise self._unknown(number)
            return self._open[number]

    def leave(self, number: int) -> Context | None:
        """Forget a context; None when it is not known here."""
        with self._lock:
            self._left[number] = None
            if len(self._left) > _REMEMBERED:
                del self._left[next(iter(self._left))]
            return self._open.pop(number, None)

    def _unknown(self, number: int) -> RuntimeError:
        return RuntimeError(f"Could not find autograd context with id: {number}")

    def info(self) -> dict[str, int]:
        """How many there are."""
        with self._lock:
            runs = sum(sum(r is not None for r in c.runs.values()) for c in self._open.values())
            return {"num_autograd_contexts": len(self._open), "num_current_backward_passes": runs}


_contexts: WeakKeyDictionary[Any, Contexts] = WeakKeyDictionary()
_making = threading.Lock()


def contexts() -> Contexts:
    """Those of this worker. RuntimeError before `init_rpc`."""
    agent = current.agent()
    with _making:
        found = _contexts.get(agent)
        if found is None:
            found = _contexts[agent] = Contexts(agent.rank)
        return found


def _get_debug_info() -> dict[str, int]:
    """How many contexts are open on this worker, and how many backward passes run."""
    return contexts().info()
