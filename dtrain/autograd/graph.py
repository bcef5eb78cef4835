"""Hooks on what is kept for backward, at torch.autograd.graph's names.

`saved_tensors_hooks` lets a program replace every saved tensor by something else: move it to disk,
compress it, count it. saving.py is the machinery. Source: torch.autograd.graph.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import numpy as np

from dtrain.autograd.grad_mode import no_grad
from dtrain.autograd.node import Node as Node, edge_of, make, version_of
from dtrain.autograd.op import ALIAS
from dtrain.autograd.saving import Watcher, keeps, watch
from dtrain.autograd.value import Value, Version

Pack = Callable[[Any], Any]


class saved_tensors_hooks(Watcher):
    """Inside, tensors that are saved for backward are given to `pack_hook`, and what it returns is
    kept; `unpack_hook` makes a tensor of it again when backward needs it.

    Arrays that an op keeps for itself are shown as tensors as well. A hook must not change its
    argument in place. Of nested pairs the innermost is used. With retain_graph=True what was
    unpacked once is kept. Saved tensors are not checked for changes in place: they are the hook's.
    """

    def __init__(self, pack_hook: Pack, unpack_hook: Pack) -> None:
        self.pack_hook, self.unpack_hook = pack_hook, unpack_hook
        self._blocks: list[AbstractContextManager[None]] = []

    def __enter__(self) -> None:
        block = watch(self)
        block.__enter__()
        self._blocks.append(block)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._blocks.pop().__exit__(kind, error, traceback)

    def recorded(self, node: Node, *results: Any) -> None:
        """Pack what the node keeps."""
        if keeps(node):
            with no_grad():
                node.saved = _Packed(self, node)
            node.out = node.aux = None


class _Packed:
    """What a node kept, packed: stands in `Node.saved`."""

    def __init__(self, hooks: saved_tensors_hooks, node: Node) -> None:
        self._unpack = hooks.unpack_hook
        pack = hooks.pack_hook
        self._saved = [
            (edge_of(v), pack(make(v._data))) if isinstance(v, Value) else v for v in node.saved
        ]
        self._boxed = [isinstance(v, Value) for v in node.saved]
        self._out = None if node.out is None else (pack(make(node.out[0])),)
        self._aux = [pack(make(a)) if isinstance(a, np.ndarray) else a for a in node.aux or ()]
        self._aux_boxed = [isinstance(a, np.ndarray) for a in node.aux or ()]

    def restore(self, node: Node) -> None:
        with no_grad():
            node.saved = tuple(
                self._tensor(*v) if boxed else v
                for v, boxed in zip(self._saved, self._boxed, strict=True)
            )
            node.versions = tuple(version_of(v) for v in node.saved)
            if self._out is not None:
                node.out = (self._array(self._out[0]), Version(), 0)
            if self._aux:
                node.aux = tuple(
                    self._array(a) if boxed else a
                    for a, boxed in zip(self._aux, self._aux_boxed, strict=True)
                )

    def _array(self, packed: Any) -> Any:
        tensor = self._unpack(packed)
        if not isinstance(tensor, Value):
            raise TypeError(
                "Output of saved tensor unpack_hook expected to be a Tensor but got result of type "
                f"{type(tensor).__name__}"
            )
        return tensor._data

    def _tensor(self, edge: Any, packed: Any) -> Any:
        """The unpacked tensor, in the place in the graph that the saved one had."""
        array = self._array(packed)
        if edge is None:
            return make(array)
        alias = Node(ALIAS.op, (edge,))  # type: ignore[attr-defined]
        alias.shapes = (array.shape,)
        return make(array, alias)
