"""The process groups of this rank: the default one, those made from it, and who is in which.

A process is one rank and has one world. Where ranks are threads (`dtrain.testing.run_world`) each
thread installs its own, so everything here asks `current_world()`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from datetime import timedelta
from typing import Any

from dtrain.comm.group import ProcessGroup as ArrayGroup
from dtrain.comm.store.base import Store, as_seconds
from dtrain.comm.work import Work as ArrayWork
from dtrain.distributed.hooks import Hooks, PostHookArgs, PreHookArgs
from dtrain.tape import Tape
from dtrain.tensor import Tensor

# Where a thread is in a block in which other ranks do something else: "rank0_section at file:line".
alone: ContextVar[str | None] = ContextVar("dtrain_alone", default=None)


class ProcessGroup:
    """The ranks that take part in a collective together. Source: torch.distributed.ProcessGroup.

    `arrays` is the group of the comm tower that does the work; `ranks[i]` is the global rank of
    group rank i.
    """

    def __init__(self, arrays: ArrayGroup, ranks: Sequence[int], backend: str, desc: str) -> None:
        self.arrays = arrays
        self.ranks = tuple(ranks)
        self.backend = backend
        self.group_desc = desc
        self.pickles = False  # whether object collectives may, see `objects.allow_pickle`
        self._hooks: Hooks | None = None  # most groups have none

    def issue(
        self,
        call: Any,
        *,
        async_op: bool = False,
        timeout: float | None = None,
        inputs: Sequence[Tensor] = (),
        outputs: Sequence[Tensor] = (),
    ) -> ArrayWork:
        """Submit a call on arrays: the way of every call of this rank into the comm tower.

        `inputs` and `outputs` are shown to hooks. RuntimeError inside `rank0_first` and
        `rank0_section`: the other ranks are not there.
        """
        place = alone.get()
        if place is not None:
            raise RuntimeError(
                f"{call.kind} was called inside {place}, where the ranks do different things: it "
                "would wait for ranks that never call it. Call it before or after the block."
            )
        if self._hooks is None:
            return self.arrays.submit(call, async_op=async_op, timeout=timeout)
        return self._hooks.around(self.arrays.submit, call, async_op, timeout, inputs, outputs)

    def rank(self) -> int:
        """The caller's rank in this group."""
        return self.arrays.rank

    def size(self) -> int:
        """How many ranks the group has."""
        return self.arrays.size

    @property
    def shares_memory(self) -> bool:
        """Whether all its ranks communicate through memory that they share."""
        transport = getattr(self.arrays, "transport", None)  # MPI and fake have none
        return transport is not None and transport.window is not None

    def name(self) -> str:
        """The backend's name, as in torch."""
        return self.backend

    @property
    def group_name(self) -> str:
        return self.arrays.name

    def group_rank_of(self, global_rank: int) -> int:
        """The rank in this group of a global rank; ValueError when it is not a member."""
        try:
            return self.ranks.index(global_rank)
        except ValueError:
            raise ValueError(
                f"Global rank {global_rank} is not part of group {self.arrays.name!r} "
                f"(members: {list(self.ranks)})"
            ) from None

    def get_group_store(self) -> Store:
        """The store through which the group was made, with its prefix."""
        return self.arrays.store

    def set_timeout(self, timeout: timedelta | float) -> None:
        """Set the deadline of later calls that have none of their own, on this rank."""
        self.arrays.timeout = as_seconds(timeout)

    def abort(self, reason: str = "aborted by the program") -> None:
        """Make every call of the group fail, on all ranks, after calling the abort hooks."""
        if self._hooks is not None:
            self._hooks.abort.call()
        self.arrays.abort(reason)

    def shutdown(self) -> None:
        """Leave the group: finish what is queued, at most a few seconds, and give all back."""
        self.arrays.close()

    @property
    def hooks(self) -> Hooks:
        """The tables of hooks, made at first use."""
        if self._hooks is None:
            self._hooks = Hooks()
        return self._hooks

    def register_pre_hook(self, hook_id: int, hook: Callable[[PreHookArgs], None]) -> None:
        """Call `hook` before every call of this rank; ValueError when the id is taken."""
        self.hooks.pre.register(hook_id, hook)

    def register_post_hook(self, hook_id: int, hook: Callable[[PostHookArgs], None]) -> None:
        """Call `hook` when a call is complete, well or not, in the thread that completes it."""
        self.hooks.post.register(hook_id, hook)

    def register_abort_hook(self, hook_id: int, hook: Callable[[], None]) -> None:
        """Call `hook` when this rank calls `abort`, before the group fails."""
        self.hooks.abort.register(hook_id, hook)

    def unregister_pre_hook(self, hook_id: int) -> None:
        """Forget a pre hook; KeyError when there is none with this id."""
        del self.hooks.pre[hook_id]

    def unregister_post_hook(self, hook_id: int) -> None:
        """Forget a post hook; KeyError when there is none with this id."""
        del self.hooks.post[hook_id]

    def unregister_abort_hook(self, hook_id: int) -> None:
        """Forget an abort hook; KeyError when there is none with this id."""
        del self.hooks.abort[hook_id]

    def __repr__(self) -> str:
        return repr(self.arrays)


class GroupMember:
    """Markers: `WORLD` stands for the default group, `NON_GROUP_MEMBER` for not being in one."""

    WORLD: Any = None
    NON_GROUP_MEMBER: Any = object()


class _WorldGroup(type):
    @property
    def WORLD(cls) -> ProcessGroup | None:
        return current_world().default


class group(metaclass=_WorldGroup):
    """`group.WORLD` is the default process group, None before `init_process_group`."""


class World:
    """What this rank has joined. `made` lists the groups in the order they were made.

    `tape`: where this rank's calls and passes are recorded, None while nobody wants it. `at_end`:
    what a rank that is a thread does at its end, as a process does with `atexit`.
    """

    def __init__(self) -> None:
        self.default: ProcessGroup | None = None
        self.made: list[ProcessGroup] = []
        self.store: Store | None = None
        self.owns_store = False
        self.tape: Tape | None = None
        self.stop_wanted = False  # by `notice.request_stop`, here or on another rank
        self.at_end: list[Callable[[], None]] = []

    def add(self, group: ProcessGroup) -> None:
        """A group of which this rank has become a member."""
        self.made.append(group)
        group.arrays.record_on(self.tape)

    def record_on(self, tape: Tape | None) -> None:
        """From now on record on `tape`; None: no more."""
        self.tape = tape
        for made in self.made:
            made.arrays.record_on(tape)

    def clear(self, reason: BaseException | None = None) -> None:
        """Close all groups, youngest first, and the store if it was opened here; save the tape.

        `reason`: the exception that ends this rank; the others are told.
        """
        for made in reversed(self.made):
            if reason is not None and isinstance(made.arrays, ArrayGroup):
                made.arrays.excuse(reason)
            made.arrays.close()
        if self.store is not None and self.owns_store:
            self.store.close()
        tape, at_end = self.tape, self.at_end
        self.__init__()  # type: ignore[misc]
        self.at_end = at_end
        if tape is not None:
            tape.save()


_process_world = World()
_installed: ContextVar[World] = ContextVar("dtrain_world")


def current_world() -> World:
    """The world of this thread if it has its own, else the process's."""
    return _installed.get(_process_world)


def is_own_world() -> bool:
    """Whether the world is this thread's own, not the process's."""
    return current_world() is not _process_world


@contextlib.contextmanager
def own_world() -> Iterator[World]:
    """Give this thread (context) a world of its own inside the block, cleared at its end."""
    world = World()
    token = _installed.set(world)
    try:
        yield world
    finally:
        for leave in world.at_end:
            leave()
        _installed.reset(token)
        world.clear()


def resolve(group: Any) -> ProcessGroup:
    """The group that an argument means: None is the default one.

    ValueError, in torch's words, before `init_process_group` and for a group one is not in.
    """
    if group is None:
        default = current_world().default
        if default is None:
            raise ValueError(
                "Default process group has not been initialized, please make sure to call "
                "init_process_group."
            )
        return default
    if group is GroupMember.NON_GROUP_MEMBER:
        raise ValueError("Invalid process group specified: this rank is not one of its members")
    if not isinstance(group, ProcessGroup):
        raise TypeError(f"expected a ProcessGroup, got {type(group).__name__}")
    return group
