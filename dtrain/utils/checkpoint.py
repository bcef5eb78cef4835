"""Activation checkpointing: what a region keeps for backward is thrown away and computed again.

Rules: 1. The graph is recorded as ever, so hooks, shared parameters, DDP and `autograd.grad` see no
difference; only what its nodes keep goes. When backward needs the first of it, the region runs
again, with the random state that it had, and node i of the second run fills node i of the first.
2. A region inside of another is one entry of the outer one: its inputs.
3. There is one way; `use_reentrant` chooses nothing.
Source: torch.utils.checkpoint; Chen et al., Training Deep Nets with Sublinear Memory Cost, 2016.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from typing import Any, TypeVar

from dtrain.autograd.grad_mode import grad_enabled, is_grad_enabled
from dtrain.autograd.node import Node, check_saved, version_of
from dtrain.autograd.saving import Watcher, arrays_of, give, keeps, take, watch
from dtrain.random import fork_rng, get_rng_state, set_rng_state
from dtrain.utils.selective_checkpoint import (
    CheckpointPolicy as CheckpointPolicy,
    Selection,
    SelectiveCheckpointContext as SelectiveCheckpointContext,
    create_selective_checkpoint_contexts as create_selective_checkpoint_contexts,
    selection,
)

T = TypeVar("T")
ContextFn = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]

_early_stop: ContextVar[bool | None] = ContextVar("dtrain_checkpoint_early_stop", default=None)
_debug: ContextVar[bool | None] = ContextVar("dtrain_checkpoint_debug", default=None)


class CheckpointError(RuntimeError):
    """The second run of a region was not like the first."""


class _Stop(BaseException):
    """Ends the second run, once all that is needed is there; no `except Exception` may take it."""


class _Inputs:
    """The op of the node that keeps a region's inputs, as any node keeps its values."""

    name = "checkpoint_inputs"

    def node_name(self, node: Node) -> str:
        return "CheckpointInputs"


_INPUTS = _Inputs()


def noop_context_fn() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Two contexts that do nothing: the default `context_fn`."""
    return nullcontext(), nullcontext()


class _Region(Watcher):
    """One call of `checkpoint`: told of the first run's nodes, it stands for what they kept."""

    def __init__(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any],
        context: AbstractContextManager[Any], preserve_rng_state: bool,
        check: bool, debug: bool, early_stop: bool,
    ) -> None:  # fmt: skip
        self.function = function
        self.context = context
        self.check, self.debug, self.early_stop = check, debug, early_stop
        self.rng = get_rng_state() if preserve_rng_state else None
        self.inputs = Node(_INPUTS, ())
        self.inputs.saved = (*args, kwargs)
        self.inputs.versions = tuple([version_of(value) for value in self.inputs.saved])
        self.nodes: list[weakref.ref[Node]] = []
        self.notes: list[tuple[Any, ...]] = []
        self.selection: Selection | None = None

    def compute(self, op: Any, inputs: tuple[Any, ...], attrs: dict[str, Any]) -> Any:
        if self.selection is None:
            return super().compute(op, inputs, attrs)
        return self.selection.first(op, inputs, attrs)

    def recorded(self, node: Node, *results: Any) -> None:
        if self.selection is not None:
            self.selection.keep(results)
        if keeps(node):
            self.nodes.append(weakref.ref(node))
            self.notes.append(_describe(node))
            take(node, self)

    def restore(self, node: Node) -> None:
        self._run_again()
        assert node.saved is not self

    def _run_again(self) -> None:
        check_saved(self.inputs)  # the region around this one may have to run first
        *args, kwargs = self.inputs.saved
        replay = _Replay(self)
        with fork_rng(enabled=self.rng is not None):
            if self.rng is not None:
                set_rng_state(self.rng)
            with (
                _selected_by(self.context) as replay.selection,
                watch(replay, enable=True),
                contextlib.suppress(_Stop),
            ):
                self.function(*args, **kwargs)
        replay.finish()


class _Replay(Watcher):
    """The second run: told of its nodes, fills those of the first that still wait."""

    def __init__(self, region: _Region) -> None:
        self.region = region
        self.notes: list[tuple[Any, ...]] = []
        self.selection: Selection | None = None

    def compute(self, op: Any, inputs: tuple[Any, ...], attrs: dict[str, Any]) -> Any:
        if self.selection is None:
            return super().compute(op, inputs, attrs)
        return self.selection.again(op, inputs, attrs)

    def recorded(self, node: Node, *results: Any) -> None:
        if not keeps(node):
            return
        region, i = self.region, len(self.notes)
        self.notes.append(_describe(node))
        if i < len(region.nodes):
            if region.check and self.notes[i] != region.notes[i]:
                raise CheckpointError(self._difference(i))
            first = region.nodes[i]()
            if first is not None and first.saved is region:
                give(first, node)
        if region.early_stop and len(self.notes) == len(region.nodes):
            raise _Stop

    def finish(self) -> None:
        """CheckpointError unless both runs kept equally much."""
        first, second = len(self.region.nodes), len(self.notes)
        if second < first or (second > first and self.region.check):
            raise CheckpointError(
                "torch.utils.checkpoint: A different number of tensors was saved during the "
                "original forward and recomputation.\n"
                f"Number of operations that saved during forward: {first}\n"
                f"Number of operations that saved during recomputation: {second}{self._listing()}"
            )

    def _difference(self, i: int) -> str:
        return (
            "torch.utils.checkpoint: Recomputed values for the following tensors have different "
            "metadata than during the forward pass.\n"
            f"operation {i} of {len(self.region.notes)}:\nsaved metadata: {self.region.notes[i]}\n"
            f"recomputed metadata: {self.notes[i]}\nThe function must do the same in both runs: "
            f"look for global state, or an input changed in place.{self._listing()}"
        )

    def _listing(self) -> str:
        if not self.region.debug:
            return "\nTip: debug=True lists the operations of both runs."
        runs = [", ".join(n[0] for n in notes) for notes in (self.region.notes, self.notes)]
        return f"\noperations of the forward pass: {runs[0]}\nof the recomputation: {runs[1]}"


def _describe(node: Node) -> tuple[Any, ...]:
    """What must be equal in both runs."""
    return node.op.name, *((a.shape, a.dtype.name) for a in arrays_of(node))


def checkpoint(
    function: Callable[..., Any],
    *args: Any,
    use_reentrant: bool | None = None,
    context_fn: ContextFn = noop_context_fn,
    determinism_check: str = "default",
    debug: bool = False,
    early_stop: bool = True,
    **kwargs: Any,
) -> Any:
    """`function(*args, **kwargs)`, keeping only its inputs; backward calls it once more.

    Gradients have the same bits. The function must do the same both times.

    preserve_rng_state  (in kwargs, default True) run again with the default generator's state.
    use_reentrant   accepted; both values do the same, which is what False means in PyTorch.
    context_fn      () -> two contexts, around the first and the second run. With
                    `create_selective_checkpoint_contexts` results of some operations are kept.
    determinism_check   "default" compares operations, shapes and dtypes of both runs and raises
                    CheckpointError; "none" does not.
    debug           the error lists the operations of both runs.
    early_stop      end the second run when all that backward needs is there.

    Source: torch.utils.checkpoint.checkpoint.
    """
    if use_reentrant and (context_fn is not noop_context_fn or debug):
        raise ValueError(
            "Passing `context_fn` or `debug` is only supported when use_reentrant=False."
        )
    if determinism_check not in ("default", "none"):
        raise ValueError(
            f"determinism_check should be one of ['default', 'none'], but got {determinism_check}"
        )
    preserve = kwargs.pop("preserve_rng_state", True)
    first, second = context_fn()
    if not is_grad_enabled():
        with first:
            return function(*args, **kwargs)
    region = _Region(
        function, args, kwargs, second, preserve, determinism_check == "default",
        _chosen(_debug, debug), _chosen(_early_stop, early_stop),
    )  # fmt: skip
    around = grad_enabled.get()
    if around is not True:
        around.recorded(region.inputs)
    with _selected_by(first) as region.selection, watch(region):
        return function(*args, **kwargs)


@contextlib.contextmanager
def _selected_by(context: AbstractContextManager[Any]) -> Iterator[Selection | None]:
    """Enter `context`; gives the selection that it sets itself, not one of a region around."""
    with _setting(selection, None), context:
        yield selection.get()


def _chosen(setting: ContextVar[bool | None], given: bool) -> bool:
    """What a `set_checkpoint_...` block says, else the argument."""
    value = setting.get()
    return given if value is None else value


def checkpoint_sequential(
    functions: Any, segments: int, input: Any, use_reentrant: bool | None = None, **kwargs: Any
) -> Any:
    """Run `functions` (an nn.Sequential or a list) one after the other in `segments` regions.

    The last segment keeps what it needs: backward begins with it. Source:
    torch.utils.checkpoint.checkpoint_sequential.
    """
    preserve = kwargs.pop("preserve_rng_state", True)
    if kwargs:
        raise ValueError("Unexpected keyword arguments: " + ",".join(kwargs))
    steps = list(functions.children() if hasattr(functions, "children") else functions)
    if not 1 <= segments <= len(steps):
        raise ValueError(f"segments must be from 1 to {len(steps)}, got {segments}")
    size = len(steps) // segments
    for start in range(0, size * (segments - 1), size):
        input = checkpoint(
            _chain(steps[start : start + size]), input,
            use_reentrant=use_reentrant, preserve_rng_state=preserve,
        )  # fmt: skip
    return _chain(steps[size * (segments - 1) :])(input)


def _chain(steps: list[Callable[[Any], Any]]) -> Callable[[Any], Any]:
    def run(value: Any) -> Any:
        for step in steps:
            value = step(value)
        return value

    return run


@contextlib.contextmanager
def _setting(setting: ContextVar[T], value: T) -> Iterator[None]:
    token = setting.set(value)
    try:
        yield
    finally:
        setting.reset(token)


def set_checkpoint_early_stop(enable: bool) -> AbstractContextManager[None]:
    """A block in which regions stop early, or not, whatever they were told."""
    return _setting(_early_stop, enable)


def set_checkpoint_debug_enabled(enabled: bool | None) -> AbstractContextManager[None]:
    """A block in which regions list their operations in errors; None: as they were told."""
    return _setting(_debug, enabled)
