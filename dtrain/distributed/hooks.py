"""Hooks of a process group: functions that see every call before and after it.

Owns: `PreHookArgs`, `PostHookArgs` and `Hooks`, the three tables of one group. They are the seam
for timelines, counters and fault injection: what a pre hook raises comes out of the call, and
nothing has been sent then. Source: torch.distributed.ProcessGroup.register_pre_hook and its like.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dtrain.comm.work import Future, Work as ArrayWork
from dtrain.tensor import Tensor


@dataclass(frozen=True, slots=True)
class PreHookArgs:
    """A call that is about to be made.

    `name`: "all_reduce" ...; `root`: the group rank of a rooted call's root, of a message's other
    end, else None; `op_id` counts the calls of the group on this rank. Calls on objects, and those
    of DistributedDataParallel, have no tensors.
    """

    name: str
    async_op: bool
    input_tensors: tuple[Tensor, ...]
    output_tensors: tuple[Tensor, ...]
    root: int | None
    op_id: int


@dataclass(frozen=True, slots=True)
class PostHookArgs:
    """The call `op_id` is complete; `exception` says why it failed, or is None."""

    name: str
    op_id: int
    exception: BaseException | None


class Table(dict[int, Callable[..., None]]):
    """Hooks by their id, called in the order in which they were registered."""

    def register(self, hook_id: int, hook: Callable[..., None]) -> None:
        """Add a hook; ValueError when its id is taken."""
        if hook_id in self:
            raise ValueError(f"a hook with id {hook_id} is already registered on this group")
        self[hook_id] = hook

    def call(self, *args: Any) -> None:
        """Call every hook."""
        for hook in list(self.values()):
            hook(*args)


class Hooks:
    """The hooks of one group on this rank."""

    def __init__(self) -> None:
        self.pre, self.post, self.abort = Table(), Table(), Table()
        self._op_ids = itertools.count()

    def around(
        self,
        submit: Callable[..., ArrayWork],
        call: Any,
        async_op: bool,
        timeout: float | None,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
    ) -> ArrayWork:
        """Submit `call` between the hooks.

        Post hooks run in the thread that completes the call; what they raise is logged.
        """
        op_id, name = next(self._op_ids), call.kind
        root = next((getattr(call, n) for n in ("root", "dst", "src") if hasattr(call, n)), None)
        self.pre.call(PreHookArgs(name, async_op, tuple(inputs), tuple(outputs), root, op_id))
        try:
            work = submit(call, async_op=async_op, timeout=timeout)
        except BaseException as error:
            self.post.call(PostHookArgs(name, op_id, error))
            raise

        def done(future: Future[Any]) -> None:
            self.post.call(PostHookArgs(name, op_id, future.exception()))

        work.get_future().add_done_callback(done)
        return work
