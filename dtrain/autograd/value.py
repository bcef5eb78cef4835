"""The fields every Tensor has, apart from its methods: what ops and the engine work on.

`Tensor` (dtrain/tensor.py) adds the public face. The split keeps the layers one-way: ops and the
engine know these slots, and only tensor.py knows ops.
"""

from __future__ import annotations

from typing import Any


class Version:
    """How often a storage was changed in place; one is shared by a tensor and all its views.

    `regraphed` is the count at which the graph of the base last changed through such a change:
    views made before it must ask the base again where their gradient goes.
    """

    __slots__ = ("count", "regraphed")

    def __init__(self) -> None:
        self.count = 0
        self.regraphed = 0


class Value:
    """An array and its place in the graph.

    _data            the ndarray.
    _node            the Node that made it, None for a leaf.
    _requires_grad   bool.
    _grad            Tensor or None.
    _version         Version, or None as long as nobody needed one (means count 0).
    _base            the Tensor this is a view of, or None.
    """

    __slots__ = (
        "__dict__",
        "__weakref__",
        "_base",
        "_data",
        "_grad",
        "_node",
        "_requires_grad",
        "_version",
    )  # fmt: skip

    _data: Any
    _node: Any
    _requires_grad: bool
    _grad: Any
    _version: Version | None
    _base: Any

    # A leaf or a view may carry more; class attributes stand for their absence.
    _view_count = 0  # version count when the view's place in the graph was last right
    _one_of_many = ""  # for a view among several that one op returned: that op's name
    _made_quietly = False  # a view made while nothing was recorded
    _hooks: Any = None  # {id: hook(grad)} of a leaf; others' hooks live on their node
    _post_accumulate: Any = None  # {id: hook(tensor)} when a leaf's gradient is complete
    _home: Any = None  # a Tensor of a leaf's shape and dtype: where a first gradient is to live

    def _share(self, source: Value) -> None:
        """Become a view of `source` if the memory is its own: same base, same version."""
        if not _same_memory(self._data, source._data):
            return
        if source._version is None:
            source._version = Version()
        self._version = source._version
        self._base = source if source._base is None else source._base
        self._view_count = self._version.count

    def _wants_grad(self) -> bool:
        """`_requires_grad`, up to date: a change of its base can put a view into a graph."""
        if self._base is not None:
            self._refresh_view()
        return self._requires_grad

    # What ops know how to do, for the engine and custom functions below them; Tensor overrides.

    def _refresh_view(self) -> None:
        """Follow an in-place change of the base's graph."""

    def _check_writable(self) -> None:
        """Raise when the tensor may not be changed in place while a graph is recorded."""

    def _move(self, result: Value) -> None:
        """Take the place in the graph that `result` has, after a change in place."""

    def _bump_version(self) -> None:
        """Count one change of the memory."""


# {class of tensors whose `_data` is a part of their values: (op, inputs, attributes) -> result}.
# Ops hand over to it. Empty in most programs, so that asking costs nothing.
PARTS: dict[type, Any] = {}


def has_part(*values: Any) -> bool:
    """Whether one of the values is a part of a larger tensor."""
    return bool(PARTS) and any(value.__class__ in PARTS for value in values)


def need_whole(name: str, *values: Any) -> None:
    """Refuse what is a part of a larger tensor, for functions that look at arrays themselves.

    RuntimeError that names the function and what to do.
    """
    for value in values if PARTS else ():
        if value.__class__ in PARTS:
            value._refuse(name)


def array_of(x: Any) -> Any:
    """The array of a Tensor; an array is its own."""
    return x._data if isinstance(x, Value) else x


def _same_memory(view: Any, source: Any) -> bool:
    if view is source:
        return True
    owner = source if source.base is None else source.base
    return view.base is owner or view.base is source
