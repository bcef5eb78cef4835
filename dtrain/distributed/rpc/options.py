"""What `init_rpc` can be told, and who is who: options and `WorkerInfo`.

Names, defaults and places as in torch.distributed.rpc. What is accepted and ignored says so.
Times are in seconds.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import numpy as np

from dtrain.distributed.rpc.constants import (
    DEFAULT_INIT_METHOD,
    DEFAULT_NUM_WORKER_THREADS,
    DEFAULT_RPC_TIMEOUT_SEC,
    UNSET_RPC_TIMEOUT,
)

__all__ = [
    "BackendType",
    "RpcBackendOptions",
    "TensorPipeRpcBackendOptions",
    "WorkerInfo",
    "patience",
    "timeout_of",
]

NAME_LIMIT = 128
TRANSPORTS = ("unix", "zmq", "tcp")


class WorkerInfo(NamedTuple):
    """A worker: its `name` and its `id`, which is its rank."""

    name: str
    id: int


class BackendType(enum.Enum):
    """There is one backend; the name is that of torch, for scripts that give it."""

    TENSORPIPE = "TENSORPIPE"


def patience(timeout: Any, default: float) -> float:
    """How many seconds a call may take, 0: for ever; as `timeout` says, or by default."""
    unset = type(timeout) is float and timeout == UNSET_RPC_TIMEOUT
    return default if unset else timeout_of(timeout)


def timeout_of(timeout: Any) -> float:
    """`timeout`, a number or a timedelta, in seconds. TypeError, ValueError for anything else."""
    seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
    if isinstance(seconds, bool) or not isinstance(seconds, int | float | np.number):
        raise TypeError(
            f"timeout must be a number of seconds or a timedelta (0: for ever), got {timeout!r}"
        )
    if not seconds >= 0:
        raise ValueError(f"timeout must be at least 0 seconds (0: for ever), got {timeout!r}")
    return float(seconds)


class RpcBackendOptions:
    """`rpc_timeout`: of calls that have none (0: none at all), in seconds or a timedelta.

    `init_method`: where workers meet.
    """

    def __init__(
        self, rpc_timeout: float = DEFAULT_RPC_TIMEOUT_SEC, init_method: str = DEFAULT_INIT_METHOD
    ) -> None:
        self.rpc_timeout = timeout_of(rpc_timeout)
        self.init_method = init_method
        self.num_worker_threads = DEFAULT_NUM_WORKER_THREADS
        self.transport: str | None = None


class TensorPipeRpcBackendOptions(RpcBackendOptions):
    """Also `num_worker_threads`: how many calls run at a time (those that wait do not count).

    `_transports`: the first that is one of ours ("unix", "zmq", "tcp") carries the messages, the
    same on all workers; by default unix sockets on one host and `zmq` where there are several.
    `device_maps`, `devices` (which can be read again) and `_channels` are accepted and ignored:
    tensors are in the memory of the host.
    """

    def __init__(
        self,
        *,
        num_worker_threads: int = DEFAULT_NUM_WORKER_THREADS,
        rpc_timeout: float = DEFAULT_RPC_TIMEOUT_SEC,
        init_method: str = DEFAULT_INIT_METHOD,
        device_maps: Mapping[str, Any] | None = None,
        devices: Sequence[Any] | None = None,
        _transports: Sequence[str] | None = None,
        _channels: Sequence[str] | None = None,
    ) -> None:
        super().__init__(rpc_timeout, init_method)
        if num_worker_threads < 1:
            raise ValueError(f"num_worker_threads must be at least 1, got {num_worker_threads}")
        self.num_worker_threads = num_worker_threads
        self.device_maps = dict(device_maps or {})
        self.devices = list(devices or ())
        ours = [name for name in _transports or () if name in TRANSPORTS]
        self.transport = ours[0] if ours else None

    def set_device_map(self, to: str, device_map: Mapping[Any, Any]) -> None:
        """Noted in `device_maps`, and ignored."""
        self.device_maps[to] = {**self.device_maps.get(to, {}), **device_map}

    def set_devices(self, devices: Sequence[Any]) -> None:
        """Noted in `devices`, and ignored."""
        self.devices = list(devices)


def check_name(name: Any) -> str:
    """`name` if a worker can be called so; ValueError in torch's sense."""
    good = isinstance(name, str) and 0 < len(name) < NAME_LIMIT
    if not good or any(not (c.isascii() and (c.isalnum() or c in "_-:")) for c in name):
        raise ValueError(
            f"Worker name must match ^[A-Za-z0-9-_:]*$ and have fewer than {NAME_LIMIT} characters,"
            f" got {name!r}"
        )
    return str(name)


def check_place(rank: Any, world_size: Any) -> None:
    """ValueError, TypeError if `rank` (-1: not told) is none of `world_size` (None: not told)."""
    for name, number in (("rank", rank), ("world_size", world_size)):
        if isinstance(number, bool) or not isinstance(number, int | None):
            raise TypeError(f"{name} must be a whole number, got {number!r}")
    if world_size is not None and world_size < 1:
        raise ValueError(
            f"world_size must be at least 1, got {world_size} (None: as the environment says, else "
            "workers join and leave)"
        )
    if rank is None or rank < -1 or (world_size is not None and rank >= world_size):
        raise ValueError(f"rank must be one of {world_size} workers, 0 for the first, got {rank}")
