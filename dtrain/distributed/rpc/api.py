"""Joining, calling and leaving: `init_rpc`, `rpc_sync`, `rpc_async`, `remote`, `shutdown`.

Rule: one worker in a process (a thread rank of a test), which `current` finds. Source:
torch.distributed.rpc.
"""

from __future__ import annotations

import gc
import logging
import time
from typing import Any

from dtrain.distributed.rpc import current
from dtrain.distributed.rpc.calls import RpcFuture
from dtrain.distributed.rpc.constants import DEFAULT_SHUTDOWN_TIMEOUT, UNSET_RPC_TIMEOUT
from dtrain.distributed.rpc.drain import drain
from dtrain.distributed.rpc.meeting import meet
from dtrain.distributed.rpc.options import (
    BackendType,
    RpcBackendOptions,
    WorkerInfo,
    check_name,
    check_place,
    timeout_of,
)
from dtrain.distributed.rpc.rref import RRef

_log = logging.getLogger("dtrain.rpc")


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
    Where none of these says a world size, the world is open: workers of one host, which join and
    leave as they like; `rank` defaults to the next free one, and rank 0 serves the store.
    `accept_code` (not in torch): lambdas, closures and objects of any class may be sent to this
    worker, pickled; whoever may send them can run any code here. `backend` is accepted and ignored.

    RuntimeError when called twice; ValueError for a name that is taken or has wrong characters, and
    for a rank that is not one of `world_size`; TypeError for arguments of wrong types.
    """
    check_name(name)
    if backend is not None and not isinstance(backend, BackendType):
        raise TypeError(f"Argument backend must be a member of BackendType, got {backend!r}")
    if not isinstance(rpc_backend_options, RpcBackendOptions | None):
        raise TypeError(
            "Argument rpc_backend_options must be an instance of RpcBackendOptions, got "
            f"{rpc_backend_options!r}"
        )
    check_place(rank, world_size)
    if current.installed() is not None:
        raise RuntimeError("RPC is already initialized: call shutdown() first")
    options = rpc_backend_options or RpcBackendOptions()
    agent = meet(name, rank, world_size, options, accept_code)
    current.install(agent)
    current.at_end(_leave)
    agent.start()


def _leave() -> None:
    if current.installed() is not None:
        shutdown(graceful=False)


def rpc_sync(
    to: Any, func: Any, args: Any = None, kwargs: Any = None, timeout: float = UNSET_RPC_TIMEOUT
) -> Any:
    """Run `func(*args, **kwargs)` on worker `to` (name, rank or WorkerInfo); its result.

    Blocks until it is there, at most `timeout` seconds (or a timedelta; 0: for ever; default: that
    of the options, 60). Raises what the function raised, with the remote traceback as its cause;
    `RpcTimeout`; `PeerLost` at once when the worker is gone; TypeError for what cannot be sent.
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

    `owned`: {reference: the other workers that hold it}; `made_at`: {reference: file and line where
    it was made}; `held`: {reference: its owner}; `pinned`: how many are passed on and not yet in
    their owner's books; `calls_waiting`, `calls_served`.
    """
    info: dict[str, Any] = current.agent().debug_info()
    return info


def get_rpc_timeout() -> float:
    """How long calls of this worker may take that give no timeout, in seconds; 0: for ever."""
    return float(current.agent().patience)


def _set_rpc_timeout(timeout: float) -> None:
    """Change `get_rpc_timeout`, for later calls. Source: torch.distributed.rpc."""
    current.agent().patience = timeout_of(timeout)


def _get_debug_info() -> dict[str, str]:
    """Counts under torch's names, and as text, as there; `autograd._get_debug_info` has others.

    References: `num_owner_rrefs` live here, `num_forks` are with other workers,
    `num_pending_futures` have no value yet, `num_pending_users` are not known to their owner.
    """
    counts = current.agent().counts()
    return {name: str(count) for name, count in counts.items()}


def shutdown(graceful: bool = True, timeout: float = DEFAULT_SHUTDOWN_TIMEOUT) -> None:
    """Leave. Source: torch.distributed.rpc.shutdown.

    Graceful: blocks until all workers have called it and every call is answered (in an open world:
    those that this worker has made and runs), at most `timeout` seconds (0: for ever, or until all
    others are gone); then DistError says who owes what, and this worker has left. References that
    others still hold are reported with a warning.
    """
    agent, patience = current.agent(), timeout_of(timeout)
    try:
        if graceful:
            if agent.references.holds_others():
                gc.collect()  # an error that was caught may hold them in a cycle of frames
            drain(agent, time.monotonic() + patience if patience else float("inf"))
            info = agent.debug_info()
            for name, who in info["owned"].items():
                if who:
                    what = "reference %s, made at %s, is still held by %s at shutdown"
                    _log.warning(what, name, info["made_at"][name], who)
    finally:
        current.install(None)
        try:
            agent.close()
        finally:
            if agent.store is not None:
                agent.store.close()
