"""Nodes of the recorded graph: which op made a tensor, from what, and what it kept.

Rules:
1. Inputs are kept as Tensors and unboxed when backward needs them, so that their storage may be
   freed and refilled in between (FSDP does). The op's own result is kept as an array: a Tensor
   would hold the node that holds it.
2. Versions are compared when saved values are read: what was changed in place is refused.
3. Once used, saved values are let go at once (`FREED`) unless the graph is to be retained.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np

from dtrain import dtypes
from dtrain.autograd.value import Value, Version


class _Freed:
    """Stands in `Node.saved` once backward has used what it held."""

    def restore(self, node: Node) -> None:
        raise RuntimeError(
            "Trying to backward through the graph a second time (or directly access saved "
            "tensors after they have already been freed). Saved intermediate values of the "
            "graph are freed when you call .backward() or autograd.grad(). Specify "
            "retain_graph=True if you need to backward through the graph a second time or if "
            "you need to access saved tensors after calling backward."
        )


FREED = _Freed()

new = object.__new__
next_seq = count(1).__next__
_ndarray = np.ndarray
_tensor: type[Value] = Value  # tensor.py puts its class here: results are made of it


def register_tensor_class(cls: type[Value]) -> None:
    """Make `cls` the class of every op's result; called once, by `dtrain.tensor`."""
    global _tensor
    _tensor = cls


def make(data: Any, node: Node | None = None) -> Any:
    """A Tensor over `data` (a NumPy scalar becomes a 0-d array), made by `node` if given."""
    t = new(_tensor)
    t._data = data if data.__class__ is _ndarray else np.asarray(data)
    t._node = node
    t._requires_grad = node is not None
    t._grad = t._version = t._base = None
    return t


class Node:
    """One recorded application of an op: the `grad_fn` of its result.

    op        what was applied.
    edges     where the gradient of each input goes: the Node that made it, the leaf Tensor
              itself, or None.
    saved     the kept inputs (Tensors, numbers, None); or what can `restore(node)` them, such as
              FREED, which raises.
    versions  their version counts when they were saved; None means all 0.
    out       (array, Version, its count) of the result, when the rule wants it.
    aux       arrays that forward left for the rule.
    shapes    of the inputs (not recorded for ops with one input and no attributes).
    hooks     {id: hook(grad)} of the tensor it made.
    homes     while a rule that `lands` runs: for each input the array that its gradient may be
              written into, or None.

    The op's attributes, and while its rule runs the saved values, are plain attributes under the
    names that the definition gives.
    """

    __slots__ = (
        "__dict__",
        "__weakref__",
        "aux",
        "edges",
        "homes",
        "hooks",
        "op",
        "out",
        "saved",
        "seq",
        "shapes",
        "versions",
    )  # fmt: skip

    if TYPE_CHECKING:  # attributes and saved values have the names that definitions give them

        def __getattr__(self, name: str) -> Any: ...

    def __init__(self, op: Any, edges: tuple[Any, ...]) -> None:
        self.op = op
        self.edges = edges
        self.saved: Any = ()
        self.aux: tuple[Any, ...] | None = None
        self.out: tuple[Any, Version, int] | None = None
        self.versions: tuple[int, ...] | None = None
        self.shapes: tuple[tuple[int, ...], ...] = ()
        self.seq = next_seq()
        self.hooks: dict[int, Callable[..., Any]] | None = None

    def home(self, i: int) -> np.ndarray | None:
        """Where the running rule may put the gradient of input `i` itself (it must then fill it all
        and return that very array); None: nowhere, it returns a new one.
        """
        return getattr(self, "homes", {i: None})[i]  # type: ignore[no-any-return]

    @property
    def needs(self) -> tuple[bool, ...]:
        """For each input, whether anybody wants its gradient."""
        return tuple([edge is not None for edge in self.edges])

    @property
    def next_functions(self) -> tuple[tuple[Any, int], ...]:
        """(node, 0) for each input, an `AccumulateGrad` for a leaf, None where no gradient goes."""
        return tuple(
            (AccumulateGrad(edge) if isinstance(edge, Value) else edge, 0) for edge in self.edges
        )

    def name(self) -> str:
        """The op's name in torch's style, such as `MulBackward0`."""
        return self.op.node_name(self)  # type: ignore[no-any-return]

    def __repr__(self) -> str:
        return f"<{self.name()} object at {id(self):#x}>"


class AccumulateGrad:
    """Where the gradient of a leaf arrives, as `next_functions` shows it; `variable` is the leaf.

    Source: torch.autograd's AccumulateGrad nodes.
    """

    next_functions: tuple[()] = ()

    def __init__(self, variable: Value) -> None:
        self.variable = variable

    def name(self) -> str:
        return "AccumulateGrad"


def edge_of(value: Any) -> Any:
    """Where the gradient of an input goes: its node, the leaf Tensor itself, or None."""
    if not isinstance(value, Value) or not value._wants_grad():
        return None
    return value._node or value


def version_of(value: Any) -> int:
    """How often a saved value was changed in place."""
    version = value._version if isinstance(value, Value) else None
    return 0 if version is None else version.count


def save_result(node: Node, result: Value) -> None:
    """Keep the op's result for its rule."""
    version = result._version
    if version is None:
        version = result._version = Version()
    node.out = (result._data, version, version.count)


def check_saved(node: Node) -> None:
    """Bring back saved values that were taken away (saving.py), and refuse those that are gone or
    were changed in place since they were saved.
    """
    if node.saved.__class__ is not tuple:
        node.saved.restore(node)
    expected = node.versions
    for i, value in enumerate(node.saved):
        if isinstance(value, Value) and value._version is not None:
            wanted = expected[i] if expected else 0
            if value._version.count != wanted:
                raise stale(value._data, value._node, value._version.count, wanted)
    if node.out is not None and node.out[1].count != node.out[2]:
        data, version, wanted = node.out
        raise stale(data, node, version.count, wanted)


def stale(data: Any, maker: Node | None, found: int, expected: int) -> RuntimeError:
    """torch's error for a saved value (made by `maker`) that was changed in place."""
    kind = dtypes.from_numpy(data.dtype).scalar_type
    origin = "" if maker is None else f", which is output 0 of {maker.name().partition('Back')[0]},"
    return RuntimeError(
        "one of the variables needed for gradient computation has been modified by an inplace "
        f"operation: [dtrain.{kind}Tensor {list(data.shape)}]{origin} is at version {found}; "
        f"expected version {expected} instead. Hint: clone() the tensor before changing it, or "
        "make the change out of place."
    )


def release(node: Node) -> None:
    """Let go of what was kept: backward has run and the graph is not retained.

    A node that kept nothing can run again, as in torch.
    """
    if node.saved or node.out is not None or node.aux is not None:
        node.saved = FREED
        node.out = node.aux = None


class _Select:
    """The op of a result among several: its node carries a gradient to its place in a list.

    The engine hands the node of the whole op that list, with None for what got no gradient.
    """

    name = "select_output"
    keep: tuple[int, ...] = ()

    def node_name(self, node: Node) -> str:
        return node.edges[0].name()  # type: ignore[no-any-return]


SELECT = _Select()


def select_output(whole: Node, index: int, total: int) -> Node:
    """The node of result `index` among the `total` differentiable ones that `whole` made."""
    node = Node(SELECT, (whole,))
    node.index, node.total = index, total  # type: ignore[attr-defined]
    return node
