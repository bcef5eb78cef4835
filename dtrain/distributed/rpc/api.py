"""Joining, calling and leaving: `init_rpc`, `rpc_sync`, `rpc_async`, `remote`, `shutdown`.

Rules: 1. workers meet in the store of the process group if there is one, else where `init_method`
says. 2. `shutdown` never hangs: it drains until all workers that live have sent nothing that is not
answered, or until its timeout, and then says who owes what.

Source: torch.distributed.rpc.
"""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

from dtrain.comm.store.base import Store
from dtrain.comm.store.prefix import PrefixStore
from dtrain.comm.topology import host_id
from dtrain.comm.transports.base import create
from dtrain.distributed.backend import transport_for
from dtrain.distributed.rendezvous import rendezvous
from dtrain.distributed.rpc import current
from dtrain.distributed.rpc.agent import Agent
from dtrain.distributed.rpc.calls import RpcFuture
from dtrain.distributed.rpc.line import Line
from dtrain.distributed.rpc.options import (
    UNSET_RPC_TIMEOUT,
    BackendType,
    RpcBackendOptions,
    WorkerInfo,
    check_name,
)
from dtrain.distributed.rpc.rref import RRef
from dtrain.distributed.world import current_world
from dtrain.errors import DistError
from dtrain.wire import dumps, loads

_log = logging.getLogger("dtrain.rpc")

# How long joining may take.
_MEETING = 300.0


def is_available() -> bool:
    """True: rpc is part of dtrain."""
    return True


def init_rpc(
    name: str,
    backend: BackendType | None = None,
    rank: int = -1,
    world_size: int | None = None,
    rpc_backend_options: RpcBackendOptions | None = None,
    *,
    accept_code: bool = False,
) -> None:
    """Become the worker `name`. Source: torch.distributed.rpc.init_rpc.

    All `world_size` workers must call it; it blocks until they have, at most 5 minutes. `rank` and
    `world_size` default to those of the process group, else to the environment (RANK, WORLD_SIZE).
    `accept_code` (not in torch): lambdas, closures and objects of any class may be sent to this
    worker, pickled; whoever may send them can run any code here. Workers that join later are not
    there yet: the world is the one that starts. `backend` is accepted and ignored.

    RuntimeError when called twice, ValueError for a name that is taken or has wrong characters.
    """
    check_name(name)
    if current.installed() is not None:
        raise RuntimeError("RPC is already initialized: call shutdown() first")
    options = rpc_backend_options or RpcBackendOptions()
    store, rank, size, owned = _meet(options, rank, world_size)
    try:
        agent = _agent(store, name, rank, size, options, accept_code)
    except BaseException:
        if owned:
            store.close()
        raise
    agent.store = store if owned else None
    current.install(agent)
    agent.start()
    current.at_end(_leave)


def _meet(options: RpcBackendOptions, rank: int, size: int | None) -> tuple[Store, int, int, bool]:
    """Store, rank, world size, and whether the store is ours to close."""
    world = current_world()
    if world.default is not None and world.store is not None:
        found = world.default.rank(), world.default.size()
        if rank not in (-1, found[0]) or size not in (None, found[1]):
            raise ValueError(
                f"rank={rank}, world_size={size}, but this is rank {found[0]} of {found[1]} of the "
                "process group"
            )
        return world.store, *found, False
    meeting = rendezvous(options.init_method, rank, -1 if size is None else size, _MEETING)
    return *next(iter(meeting)), True


def _agent(
    store: Store, name: str, rank: int, size: int, options: RpcBackendOptions, code: bool
) -> Agent:
    mine = [name, code, host_id(), options.transport]
    told = store.gather("rpc/names", rank, size, dumps(mine), _MEETING)
    names, accepts, hosts, wishes = map(list, zip(*map(loads, told), strict=True))
    for worker in names:
        if names.count(worker) > 1:
            ranks = [r for r, other in enumerate(names) if other == worker]
            raise ValueError(f"RPC worker name {worker!r} is not unique: ranks {ranks} have it")
    kind = _transport(store, hosts, wishes)
    line = Line(create(kind, PrefixStore("rpc", store), rank, size, _MEETING), f"rpc io {name}")
    return Agent(line, rank, names, accepts, options.num_worker_threads, options.rpc_timeout)


def _transport(store: Store, hosts: list[str], wishes: list[str | None]) -> str:
    """What carries the messages; all workers decide alike, by what all have told."""
    if len(set(wishes)) > 1:
        raise ValueError(f"_transports must be the same on all workers, got {wishes}")
    if wishes[0] is not None:
        return wishes[0]
    if transport_for(None, store) == "local":
        return "local"
    return "unix" if len(set(hosts)) == 1 and sys.platform == "linux" else "zmq"


def _leave() -> None:
    if current.installed() is not None:
        shutdown(graceful=False)


def rpc_sync(
    to: Any, func: Any, args: Any = None, kwargs: Any = None, timeout: float = UNSET_RPC_TIMEOUT
) -> Any:
    """Run `func(*args, **kwargs)` on worker `to` (name, rank or WorkerInfo); its result.

    Blocks until it is there, at most `timeout` seconds (0: for ever; default: that of the options,
    60). Raises what the function raised, with the remote traceback as its cause; `RpcTimeout`;
    `PeerLost` at once when the worker is gone; TypeError for what cannot be sent.
    """
    return current.caller().rpc_sync(to, func, args, kwargs, timeout)


def rpc_async(
    to: Any, func: Any, args: Any = None, kwargs: Any = None, timeout: float = UNSET_RPC_TIMEOUT
) -> RpcFuture:
    """As `rpc_sync`, but returns a future at once. Arrays must not change until it is complete.

    Waits when thousands of calls to this worker have no answer yet.
    """
    future: RpcFuture = current.caller().rpc_async(to, func, args, kwargs, timeout)
    return future


def remote(
    to: Any, func: Any, args: Any = None, kwargs: Any = None, timeout: float = UNSET_RPC_TIMEOUT
) -> RRef:
    """Run `func` on worker `to`, which keeps the result; a reference to it, at once."""
    handle: RRef = current.caller().remote(to, func, args, kwargs, timeout)
    return handle


def get_worker_info(worker_name: str | None = None) -> WorkerInfo:
    """Name and rank of a worker, of this one by default; ValueError for a name nobody has."""
    agent = current.agent()
    rank = agent.rank if worker_name is None else agent.worker(worker_name)
    return WorkerInfo(agent.names[rank], rank)


def statistics() -> dict[str, dict[str, float]]:
    """What this worker has served, by function: calls, bytes, queue_seconds, run_seconds.

    Not in torch.
    """
    table: dict[str, dict[str, float]] = current.agent().server.statistics.table()
    return table


def get_debug_info() -> dict[str, Any]:
    """The references and calls alive here. Not in torch.

    `owned`: {reference: the other workers that hold it}; `held`: {reference: its owner}; `pinned`:
    how many are passed on and not yet in their owner's books; `calls_waiting`, `calls_served`.
    """
    info: dict[str, Any] = current.agent().debug_info()
    return info


def shutdown(graceful: bool = True, timeout: float = 0) -> None:
    """Leave. Source: torch.distributed.rpc.shutdown.

    Graceful: blocks until all workers have called it and every call is answered, at most `timeout`
    seconds (0: for ever, or until all others are gone); then DistError says who owes what, and this
    worker has left. References that others still hold are reported with a warning.
    """
    agent = current.agent()
    try:
        if graceful:
            _drain(agent, time.monotonic() + timeout if timeout > 0 else float("inf"))
            held = {name: who for name, who in agent.debug_info()["owned"].items() if who}
            if held:
                _log.warning("references still held by others at shutdown: %s", held)
    finally:
        current.install(None)
        agent.close()
        if agent.store is not None:
            agent.store.close()


def _drain(agent: Agent, deadline: float) -> None:
    """Rounds of telling each other [sent, served], until nothing moved between two of them."""
    before = None
    for turn in range(1 << 30):
        _wait(agent, lambda: agent.idle(), deadline, f"it {'; '.join(agent.owes())}")
        mine = agent.tell_drain(turn)
        others = [worker for worker in range(len(agent.names)) if worker != agent.rank]

        def missing(turn: int = turn, others: list[int] = others) -> list[str]:
            gone = agent.lost
            return [
                agent.names[w] for w in others if (turn, w) not in agent.drains and w not in gone
            ]

        _wait(agent, lambda: not missing(), deadline, "others have not called shutdown", missing)
        told = [agent.drains.pop((turn, worker), None) for worker in others]
        counts = [mine, *(count for count in told if count is not None)]
        whole = None in told or sum(c[0] for c in counts) == sum(c[1] for c in counts)
        if whole and counts == before:
            return
        before = counts


def _wait(agent: Agent, done: Any, deadline: float, what: str, who: Any = list) -> None:
    with agent.moved:
        while not done():
            left = deadline - time.monotonic()
            if left <= 0:
                raise DistError(
                    f"shutdown of worker {agent.names[agent.rank]!r} is not complete in time: "
                    f"{what} {who()}".rstrip("[] ")
                )
            agent.moved.wait(min(left, 0.01))
