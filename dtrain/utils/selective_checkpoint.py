"""Which operations of a checkpointed region keep their results, so that the second run skips them.

Rules: 1. A policy is asked once for each operation that is recorded, in the first run; the second
run does as the first did. Operations are numbered in the order in which they are called.
2. What is kept is what the operation's forward function returned. A view is never kept: it costs
nothing, and a kept one would not follow the memory it is of.
3. A kept result that was changed in place is refused, unless that is allowed.
Source: torch.utils.checkpoint.create_selective_checkpoint_contexts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar, Token
from enum import Enum
from types import TracebackType
from typing import Any

from dtrain.autograd.node import make
from dtrain.autograd.op import OPS, Op
from dtrain.autograd.value import Value, Version

# What the contexts around the first and the second run tell the region.
selection: ContextVar[Selection | None] = ContextVar("dtrain_checkpoint_selection", default=None)


class CheckpointPolicy(Enum):
    """What a policy says of one operation. MUST and PREFER are the same here: nothing but the
    policy decides.
    """

    MUST_SAVE = 0
    PREFER_SAVE = 1
    MUST_RECOMPUTE = 2
    PREFER_RECOMPUTE = 3


_SAVE = (CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_SAVE)


class SelectiveCheckpointContext:
    """What a policy is told beside the operation.

    is_recompute    False: policies are asked in the first run only (PyTorch asks in both).
    op_output       what the operation computed: a Tensor, or a tuple of them.
    """

    def __init__(self, *, is_recompute: bool, op_output: Any = None) -> None:
        self.is_recompute, self.op_output = is_recompute, op_output


class Selection:
    """The kept results of one region: `first` and `keep` fill it, `again` reads it."""

    def __init__(self, policy: Callable[..., Any], allow_mutation: bool) -> None:
        self._policy, self._allow = policy, allow_mutation
        self._kept: dict[int, tuple[Any, list[tuple[Version, int]]]] = {}
        self._calls = 0
        self._due: tuple[int, Any] | None = None  # a result that is to be kept, until it is boxed

    def start(self) -> None:
        """A run begins: count from 0."""
        self._calls, self._due = 0, None

    def first(self, op: Op, inputs: tuple[Any, ...], attrs: dict[str, Any]) -> Any:
        """Compute, and ask the policy."""
        result = op.forward(*inputs, **attrs)
        takes = not op.view and self._takes(op, inputs, attrs, result)
        self._due = (self._calls, result) if takes else None
        self._calls += 1
        return result

    def _takes(self, op: Op, inputs: tuple[Any, ...], attrs: dict[str, Any], result: Any) -> bool:
        output = tuple(map(make, result)) if isinstance(result, tuple) else make(result)
        boxed = [make(v) if hasattr(v, "dtype") else v for v in inputs]
        context = SelectiveCheckpointContext(is_recompute=False, op_output=output)
        answer = self._policy(context, op, *boxed, **attrs)
        if isinstance(answer, bool):
            return answer
        if not isinstance(answer, CheckpointPolicy):
            raise TypeError(
                f"a selective checkpoint policy must return a CheckpointPolicy or a bool, but for "
                f"operation {op.name!r} it returned {answer!r}"
            )
        return answer in _SAVE

    def keep(self, boxes: Sequence[Value]) -> None:
        """The result of the last `first` is in `boxes`."""
        if self._due is None:
            return
        (i, result), self._due = self._due, None
        versions = []
        for box in boxes:
            version = box._version = box._version or Version()
            versions.append((version, version.count))
        self._kept[i] = (result, versions)

    def again(self, op: Op, inputs: tuple[Any, ...], attrs: dict[str, Any]) -> Any:
        """The kept result, or compute."""
        i, self._calls = self._calls, self._calls + 1
        if i not in self._kept:
            return op.forward(*inputs, **attrs)
        result, versions = self._kept[i]
        if not self._allow and any(version.count != count for version, count in versions):
            raise RuntimeError(
                "Tensor cached during selective activation checkpoint has been mutated: the result "
                f"of operation {i} of the region, {op.name!r}, was changed in place after it was "
                "computed. Do not save this operation, or change a clone()."
            )
        return result


class _Context:
    """A block in which `selection` is this one."""

    def __init__(self, chosen: Selection) -> None:
        self._chosen = chosen
        self._tokens: list[Token[Selection | None]] = []

    def __enter__(self) -> None:
        self._chosen.start()
        self._tokens.append(selection.set(self._chosen))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        selection.reset(self._tokens.pop())


def create_selective_checkpoint_contexts(
    policy_fn_or_list: Callable[..., Any] | list[Any], allow_cache_entry_mutation: bool = False
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The two contexts of a region that keeps results of some operations: a `context_fn` for
    `checkpoint`, with functools.partial.

    policy_fn_or_list   `policy_fn(ctx, op, *args, **kwargs)` -> CheckpointPolicy or bool (True
                        saves), or a list of operations to save: names ("linear", "matmul") or
                        functions of that name (torch.matmul). `op.name` is the name of an
                        operation; ValueError for one that there is not.
    allow_cache_entry_mutation  do not refuse kept results that were changed in place.
    """
    if isinstance(policy_fn_or_list, list):
        names = frozenset(_name_of(entry) for entry in policy_fn_or_list)
        chosen = Selection(
            lambda context, op, *_, **__: op.name in names, allow_cache_entry_mutation
        )
    elif callable(policy_fn_or_list):
        chosen = Selection(policy_fn_or_list, allow_cache_entry_mutation)
    else:
        raise TypeError("policy_fn_or_list must be either a function or a list of ops.")
    return _Context(chosen), _Context(chosen)


def _name_of(entry: Any) -> str:
    op = getattr(entry, "op", entry)
    name = op if isinstance(op, str) else getattr(op, "name", None) or op.__name__
    if name not in OPS:
        raise ValueError(f"there is no operation {name!r} in dtrain.autograd.op.OPS")
    return name
