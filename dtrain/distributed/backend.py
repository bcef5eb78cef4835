"""The names of backends, and what builds each: `Backend`, `BackendConfig`, who is available.

A backend is a transport of the comm tower. torch's names are taken as names for ours. New ones come
through `Backend.register_backend`. Source: torch.distributed.Backend.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ClassVar

from dtrain.comm.store.base import Store
from dtrain.comm.store.memory import MemoryStore
from dtrain.comm.store.prefix import PrefixStore
from dtrain.comm.transports.base import Transport, known, register

_log = logging.getLogger("dtrain.distributed")

ALIASES = ("gloo", "nccl")


@dataclass(frozen=True, slots=True)
class BackendOptions:
    """What the builder of a backend with `extended_api` gets first. `timeout` is a timedelta."""

    store: Store
    group_rank: int
    group_size: int
    timeout: timedelta


class Backend(str):
    """A backend's name, in lower case: `Backend("GLOO") == Backend.GLOO == "gloo"`.

    ValueError for a name that nobody has registered.
    """

    __slots__ = ()

    UNDEFINED: ClassVar[str] = "undefined"
    GLOO: ClassVar[str] = "gloo"
    NCCL: ClassVar[str] = "nccl"
    MPI: ClassVar[str] = "mpi"
    UCC: ClassVar[str] = "ucc"
    XCCL: ClassVar[str] = "xccl"
    FAKE: ClassVar[str] = "fake"
    LOCAL: ClassVar[str] = "local"
    SHM: ClassVar[str] = "shm"
    TCP: ClassVar[str] = "tcp"
    ZMQ: ClassVar[str] = "zmq"

    def __new__(cls, name: str) -> Backend:
        if not isinstance(name, str):
            raise ValueError(f"Backend constructor parameter must be string-ish, got {name!r}")
        if name.lower() not in (*cls.names(), cls.UNDEFINED):
            raise ValueError(f"Invalid backend: '{name.lower()}' (known: {', '.join(cls.names())})")
        return str.__new__(cls, name.lower())

    @classmethod
    def names(cls) -> list[str]:
        """All names that `init_process_group` takes."""
        return [*known(), *ALIASES, cls.MPI, cls.FAKE]

    @classmethod
    def register_backend(
        cls,
        name: str,
        func: Callable[..., Transport],
        extended_api: bool = False,
        devices: str | Sequence[str] | None = None,
    ) -> None:
        """Make `name` a backend that `func` builds.

        `func(store, rank, size, timeout)` makes this rank's end of a transport
        (`dtrain.comm.transports.base.Transport`; `timeout` in seconds), and with `extended_api`
        `func(options, None)` does, `options` being `BackendOptions`. The collectives stand on it
        as on ours, so that a test can plug in one that injects faults. `devices` is accepted and
        ignored: there are only CPUs. RuntimeError when the name is taken.
        """
        if name.lower() in cls.names():
            raise RuntimeError(f"{name.upper()} c10d backend already exist")

        def extended(store: Store, rank: int, size: int, timeout: float) -> Transport:
            return func(BackendOptions(store, rank, size, timedelta(seconds=timeout)), None)

        register(name.lower(), extended if extended_api else func)
        setattr(cls, name.upper(), name.lower())


class BackendConfig:
    """Which backend serves which device: from "gloo", or from "cpu:gloo,cuda:nccl"."""

    def __init__(self, backend: str) -> None:
        pairs = [part.rpartition(":") for part in str(backend).split(",")]
        self.device_backend_map = {device or "cpu": Backend(name) for device, _, name in pairs}

    def get_device_backend_map(self) -> dict[str, Backend]:
        """{device type: backend}."""
        return self.device_backend_map

    def for_cpu(self) -> Backend:
        """The backend that counts here; ValueError when there is none for the CPU."""
        if "cpu" not in self.device_backend_map:
            raise ValueError(f"no backend for device cpu in {self!r}: dtrain runs on the CPU")
        return self.device_backend_map["cpu"]

    def __repr__(self) -> str:
        return ",".join(f"{device}:{name}" for device, name in self.device_backend_map.items())


def transport_for(backend: str | None, store: Store) -> str:
    """The transport that a backend name means.

    None and torch's names mean ours: `local` for ranks that are threads of one process (their
    store is in memory), `shm` otherwise, whose ranks agree on messages alone (`zmq`) where they
    cannot share memory.
    """
    name = None if backend is None else str(BackendConfig(backend).for_cpu())
    if name is not None and name not in ALIASES:
        return name
    chosen = "local" if isinstance(_underlying(store), MemoryStore) else "shm"
    if name is not None:
        _log.info("backend %r: dtrain's own transport %r takes its place", name, chosen)
    return chosen


def _underlying(store: Store) -> Store:
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    return store


def get_default_backend_for_device(device: Any) -> str:
    """The backend for "cpu" or a device object of it; ValueError for another one."""
    name = str(getattr(device, "type", device)).partition(":")[0]
    if name != "cpu":
        raise ValueError(f"Default backend not registered for device : {device}")
    return Backend.GLOO


def is_backend_available(backend: str) -> bool:
    """Whether `init_process_group(backend)` can work here, as what it is named after."""
    name = backend.lower()
    if name == Backend.MPI:
        return is_mpi_available()
    return name in known() or name in (Backend.GLOO, Backend.FAKE)


def is_gloo_available() -> bool:
    """True: what gloo does on CPUs, ours does under its name."""
    return True


def is_nccl_available() -> bool:
    """False: there is no CUDA (the name "nccl" is taken for ours all the same)."""
    return False


def is_mpi_available() -> bool:
    """Whether mpi4py is installed (extra `mpi`)."""
    return importlib.util.find_spec("mpi4py") is not None


def is_ucc_available() -> bool:
    """False."""
    return False


def is_xccl_available() -> bool:
    """False."""
    return False
