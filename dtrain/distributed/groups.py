"""Joining and leaving: `init_process_group`, `destroy_process_group`, `new_group`, who is who.

Rules: a rank joins once and may leave at any time; whatever it has not left when the interpreter
ends is closed then, silently and in bounded time.
"""

from __future__ import annotations

import atexit
import functools
import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from dtrain import env
from dtrain.comm.fake import FakeGroup
from dtrain.comm.group import DEFAULT_TIMEOUT, ProcessGroup as ArrayGroup
from dtrain.comm.mpi import MpiGroup
from dtrain.comm.store.base import Store
from dtrain.comm.store.prefix import PrefixStore
from dtrain.distributed.backend import Backend, BackendConfig, transport_for
from dtrain.distributed.peers import peers_of
from dtrain.distributed.rendezvous import rendezvous
from dtrain.distributed.work import seconds
from dtrain.distributed.world import GroupMember, ProcessGroup, World, current_world, resolve
from dtrain.ranks import set_peers, set_world
from dtrain.tape import Tape


def is_available() -> bool:
    """True: process groups work wherever dtrain does."""
    return True


def is_initialized() -> bool:
    """Whether this rank has joined the default process group."""
    return current_world().default is not None


def is_torchelastic_launched() -> bool:
    """Whether dtrun (or torchrun) started this process."""
    return env.is_launched()


is_dtrun_launched = is_torchelastic_launched


def init_process_group(
    backend: str | None = None,
    init_method: str | None = None,
    timeout: timedelta | float | None = None,
    world_size: int = -1,
    rank: int = -1,
    store: Store | None = None,
    group_name: str = "",
    pg_options: Any = None,
    device_id: Any = None,
) -> None:
    """Join the default process group. Source: torch.distributed.init_process_group.

    Either `store` with `rank` and `world_size`, or an `init_method` URL (default `env://`). All
    ranks must call it; it blocks until they have, at most `timeout` (timedelta or seconds,
    default 30 minutes, which is also the default deadline of every collective).
    `backend`: None, "shm", "zmq", "local" or a registered one; "gloo" and "nccl" are taken as names
    for ours, and of "cpu:gloo,cuda:nccl" the CPU's part counts. "mpi" takes rank and world size
    from mpiexec and needs neither store nor URL. "fake" is this rank alone, of `world_size`: every
    call returns at once, and nothing comes from others (`dtrain.comm.fake`).
    `group_name`, `pg_options` and `device_id` are accepted and change nothing.

    ValueError when called twice or when rank, world size or address are missing.
    """
    world = current_world()
    if world.default is not None:
        raise ValueError("trying to initialize the default process group twice!")
    if store is not None and init_method is not None:
        raise ValueError("Cannot specify both init_method and store.")
    patience = seconds(timeout) or DEFAULT_TIMEOUT
    asked = None if backend is None else BackendConfig(backend).for_cpu()
    if asked == Backend.MPI:
        arrays: Any = _join_mpi(rank, world_size, patience)
        name: str = Backend.MPI
    elif asked == Backend.FAKE:
        arrays, name = FakeGroup(rank, world_size, timeout=patience), Backend.FAKE
    else:
        arrays, name = _join_store(world, backend, init_method, store, rank, world_size, patience)
    world.default = ProcessGroup(arrays, range(arrays.size), name, "default_pg")
    world.add(world.default)
    folder = env.trace_folder()
    if folder is not None:
        world.record_on(Tape(arrays.rank, arrays.size, folder))
    _close_at_exit()


def _join_store(
    world: World,
    backend: str | None,
    init_method: str | None,
    store: Store | None,
    rank: int,
    world_size: int,
    patience: float,
) -> tuple[ArrayGroup, str]:
    """Meet in a store; the group, and its backend's name."""
    owned = store is None
    if store is None:
        meeting = rendezvous(init_method or "env://", rank, world_size, timeout=patience)
        store, rank, world_size = next(iter(meeting))
    elif rank < 0 or world_size < 1:
        raise ValueError(
            f"store needs rank and world_size, got rank={rank}, world_size={world_size}"
        )
    try:
        transport = transport_for(backend, store)
        arrays = ArrayGroup(
            PrefixStore("default", store), rank, world_size,
            transport=transport, name="default", timeout=patience,
        )  # fmt: skip
    except BaseException:
        if owned:
            store.close()
        raise
    world.store, world.owns_store = store, owned
    asked = None if backend is None else str(BackendConfig(backend).for_cpu())
    return arrays, asked or arrays.transport.name


def _join_mpi(rank: int, world_size: int, patience: float) -> MpiGroup:
    """The ranks that mpiexec started; ValueError when others were asked for."""
    arrays = MpiGroup(timeout=patience)
    for what, asked, have in (("rank", rank, arrays.rank), ("world_size", world_size, arrays.size)):
        if asked not in (-1, have):
            raise ValueError(f"{what}={asked}, but mpiexec started this process with {have}")
    return arrays


@functools.cache
def _close_at_exit() -> None:
    # What is registered last runs first: with pyzmq's collector gone no goodbye could be sent.
    import zmq.utils.garbage  # noqa: F401

    # An exception that nobody caught has been shown by now, and stands there.
    atexit.register(lambda: current_world().clear(getattr(sys, "last_value", None)))


def destroy_process_group(group: ProcessGroup | None = None) -> None:
    """Leave a group, or (None, or the default group) all of them; idempotent.

    Waits a few seconds at most for calls that are under way. While an exception is handled (in
    `finally`, in `except`) the other ranks are told of it.
    """
    world = current_world()
    if group is GroupMember.NON_GROUP_MEMBER:
        return
    if group is None or group is world.default:
        world.clear(sys.exception())
        return
    if group in world.made:
        world.made.remove(group)
        group.arrays.close()


def get_rank(group: Any = None) -> int:
    """The caller's rank in `group` (default: all); -1 when it is not a member."""
    return -1 if group is GroupMember.NON_GROUP_MEMBER else resolve(group).rank()


def get_world_size(group: Any = None) -> int:
    """The number of ranks in `group` (default: all); -1 when the caller is not a member."""
    return -1 if group is GroupMember.NON_GROUP_MEMBER else resolve(group).size()


def get_backend(group: Any = None) -> str:
    """The name of the group's backend, as it was asked for."""
    return resolve(group).backend


def get_backend_config(group: Any = None) -> str:
    """The group's backend by device: "cpu:zmq"."""
    return repr(BackendConfig(get_backend(group)))


def get_pg_count() -> int:
    """How many groups this rank is a member of now, the default one among them."""
    return len(current_world().made)


def set_timeout(timeout: timedelta | float, group: Any = None) -> None:
    """Set the deadline of the group's later calls on this rank, as a timedelta or in seconds."""
    patience = seconds(timeout)
    assert patience is not None
    resolve(group).set_timeout(patience)


def get_node_local_rank(fallback_rank: int | None = None) -> int:
    """The rank among those on this node, from LOCAL_RANK, else `fallback_rank`."""
    if "LOCAL_RANK" in os.environ:
        return int(os.environ["LOCAL_RANK"])
    if fallback_rank is not None:
        return fallback_rank
    raise RuntimeError(
        "LOCAL_RANK is not in the environment. Consider passing fallback_rank to allow "
        "`get_node_local_rank` to work, assuming you are not running in a multi-device context "
        "and want the code to run locally instead."
    )


def get_process_group_ranks(group: Any = None) -> list[int]:
    """The global ranks of the members, in group order."""
    return list(resolve(group).ranks)


def get_group_rank(group: Any, global_rank: int) -> int:
    """The rank in `group` of a global rank."""
    return resolve(group).group_rank_of(global_rank)


def get_global_rank(group: Any, group_rank: int) -> int:
    """The global rank of a rank of `group`."""
    ranks = resolve(group).ranks
    if not 0 <= group_rank < len(ranks):
        raise ValueError(f"Group rank {group_rank} is not part of group (size {len(ranks)})")
    return ranks[group_rank]


def new_group(
    ranks: Sequence[int] | None = None,
    timeout: timedelta | float | None = None,
    backend: str | None = None,
    pg_options: Any = None,
    use_local_synchronization: bool = False,
    group_desc: str | None = None,
    device_id: Any = None,
    sort_ranks: bool = True,
) -> Any:
    """A group of some global ranks (default: all). Source: torch.distributed.new_group.

    Only the members need to call it, and it blocks only for them; any other rank gets
    `GroupMember.NON_GROUP_MEMBER` at once. `use_local_synchronization` is therefore always on,
    and accepted; `pg_options` and `device_id` are accepted and change nothing.
    """
    world, default = current_world(), resolve(None)
    members = list(range(default.size())) if ranks is None else [int(r) for r in ranks]
    if sort_ranks:
        members.sort()
    if len(members) > default.size():
        raise ValueError(
            "the new group's world size should be less or equal to the world size set by "
            "init_process_group"
        )
    for member in members:
        if not 0 <= member < default.size():
            raise ValueError(
                "The new group's rank should be within the world_size set by init_process_group: "
                f"got {member}, the world has {default.size()} ranks"
            )
    if default.rank() not in members:
        return GroupMember.NON_GROUP_MEMBER
    transport = None
    if backend is not None and backend != default.backend:
        if world.store is None:
            raise ValueError(
                f"the groups of a job on {default.backend!r} are on it, not {backend!r}"
            )
        transport = transport_for(backend, world.store)
    arrays = default.arrays.split(members, timeout=seconds(timeout), transport=transport)
    made = ProcessGroup(arrays, members, backend or default.backend, group_desc or "undefined")
    world.add(made)
    return made


set_world(lambda: (get_world_size(), get_rank()))  # whom DistributedSampler asks
set_peers(peers_of)  # and SyncBatchNorm
