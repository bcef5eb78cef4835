"""Staging: a copy of a state dict that training no longer touches, for `async_save` to write.

A stager returns the copy, or a Future of it, in which case it is made while training goes on and
the state must not change before. Copies are of this rank's parts. Memory: as much again as the
state; freed afterwards, or kept by a stager that caches. Source:
torch.distributed.checkpoint.staging.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np

from dtrain.autograd.node import make
from dtrain.distributed.checkpoint._nested_dict import (
    flatten_state_dict,
    is_tensor,
    unflatten_state_dict,
)
from dtrain.distributed.checkpoint.default_planner import array_of
from dtrain.distributed.tensor import DTensor
from dtrain.distributed.tensor._api import wrap

T = TypeVar("T")
StateDict = dict[str, Any]


@runtime_checkable
class AsyncStager(Protocol):
    """Copies state dicts. `should_synchronize_after_execute`: call `synchronize_staging` before
    `async_save` returns.
    """

    @property
    def should_synchronize_after_execute(self) -> bool:
        """Whether `async_save` waits for the copy."""
        ...

    def stage(self, state_dict: StateDict) -> Future[StateDict] | StateDict:
        """A copy, or a Future of one."""
        ...

    def synchronize_staging(self) -> None:
        """Wait until the state may change again."""
        ...

    def close(self) -> None:
        """Give back what the stager holds."""
        ...


class BlockingAsyncStager:
    """Copies at once. `cache_staged_state_dict`: the memory of the last copy is used again, for
    tensors of the same names, shapes and dtypes. `type_check` is accepted and ignored.
    """

    def __init__(self, cache_staged_state_dict: bool = False, type_check: bool = False) -> None:
        self.cache_staged_state_dict = cache_staged_state_dict
        self._held: dict[str, np.ndarray[Any, Any]] = {}

    @property
    def should_synchronize_after_execute(self) -> bool:
        """False: there is nothing to wait for."""
        return False

    def stage(self, state_dict: StateDict) -> StateDict:
        """A copy of all tensors and values. TypeError and ValueError as `save`."""
        flat, paths = flatten_state_dict(state_dict)
        held = self._held if self.cache_staged_state_dict else {}
        copies = {key: _copied(leaf, held, key) for key, leaf in flat.items()}
        return unflatten_state_dict(copies, paths)

    def synchronize_staging(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Forget the cached copy."""
        self._held.clear()


def _copied(leaf: Any, held: dict[str, np.ndarray[Any, Any]], key: str) -> Any:
    if not is_tensor(leaf):
        return copy.deepcopy(leaf)
    array, memory = array_of(leaf), held.get(key)
    if memory is None or (memory.shape, memory.dtype) != (array.shape, array.dtype):
        memory = held[key] = np.empty(array.shape, array.dtype)
    np.copyto(memory, array)
    if isinstance(leaf, DTensor):
        return wrap(make(memory), leaf._spec)
    return memory if isinstance(leaf, np.ndarray) else make(memory)


@dataclass
class StagingOptions:
    """`use_async_staging`: copy in a thread. The others are accepted and ignored."""

    use_pinned_memory: bool = True
    use_shared_memory: bool = True
    use_async_staging: bool = True
    use_non_blocking_copy: bool = True


class DefaultStager:
    """Copies in a thread, into memory that it keeps for the next time; at once without
    `use_async_staging`. Close it after the last checkpoint.
    """

    def __init__(self, config: StagingOptions | None = None) -> None:
        self._config = config or StagingOptions()
        self._inner = BlockingAsyncStager(cache_staged_state_dict=True)
        self._staging: Future[StateDict] | None = None

    @property
    def should_synchronize_after_execute(self) -> bool:
        """False: who wants to wait has the Future."""
        return False

    def stage(self, state_dict: StateDict) -> StateDict | Future[StateDict]:
        """A copy, or a Future of one."""
        if not self._config.use_async_staging:
            return self._inner.stage(state_dict)
        self._staging = in_background(lambda: self._inner.stage(state_dict), "checkpoint-staging")
        return self._staging

    def synchronize_staging(self) -> None:
        """Wait for the copy that is being made; raises its error."""
        if self._staging is not None:
            self._staging.result()

    def close(self) -> None:
        """Wait for the copy that is being made, and forget it."""
        if self._staging is not None:
            self._staging.exception()
        self._inner.close()


def in_background(work: Callable[[], T], name: str) -> Future[T]:
    """Run `work` in a thread of its own, with the caller's context (its process groups)."""
    pool = ThreadPoolExecutor(1, name)
    future = pool.submit(copy_context().run, work)
    pool.shutdown(wait=False)
    return future
