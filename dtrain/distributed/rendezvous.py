"""How ranks find each other: `init_method` URLs, each turned into (store, rank, world size).

env://            RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT, as dtrun and torchrun give them.
tcp://host:port   rank 0 serves the store there; rank and world_size are arguments.
file:///path      a file that every rank can reach; rank and world_size are arguments.

Source: torch.distributed.rendezvous.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import parse_qs, urlparse

from dtrain import env
from dtrain.comm.store.base import Store
from dtrain.comm.store.file import FileStore
from dtrain.comm.store.tcp import TcpStore

Meeting = tuple[Store, int, int]
Handler = Callable[..., Iterator[Meeting]]


def _numbers(url: str, rank: int, world_size: int) -> tuple[int, int]:
    """Rank and world size from the arguments or else from the URL's query."""
    query = {name: values[-1] for name, values in parse_qs(urlparse(url).query).items()}
    found = {"rank": rank, "world_size": world_size}
    for name, value in found.items():
        if value < 0 and name in query:
            found[name] = int(query[name])
    for name, value in found.items():
        if value < 0:
            scheme = urlparse(url).scheme
            raise ValueError(
                f"Error initializing torch.distributed using {scheme}:// rendezvous: "
                f"{name.replace('_', ' ')} parameter missing"
            )
    return found["rank"], found["world_size"]


def _env(url: str, rank: int, world_size: int, timeout: float) -> Iterator[Meeting]:
    meeting = env.rendezvous(rank if rank >= 0 else None, world_size if world_size >= 0 else None)
    store = TcpStore(
        meeting.master_addr, meeting.master_port, is_master=meeting.is_host, timeout=timeout
    )
    yield store, meeting.rank, meeting.world_size


def _tcp(url: str, rank: int, world_size: int, timeout: float) -> Iterator[Meeting]:
    parts = urlparse(url)
    if not parts.port:
        raise ValueError(
            "Error initializing torch.distributed using tcp:// rendezvous: port number missing"
        )
    rank, world_size = _numbers(url, rank, world_size)
    store = TcpStore(
        parts.hostname or "127.0.0.1", parts.port, is_master=rank == 0, timeout=timeout
    )
    yield store, rank, world_size


def _file(url: str, rank: int, world_size: int, timeout: float) -> Iterator[Meeting]:
    path = urlparse(url).path
    if not path:
        raise ValueError(
            "Error initializing torch.distributed using file:// rendezvous: path missing"
        )
    rank, world_size = _numbers(url, rank, world_size)
    yield FileStore(path, run_id=env.run_identity(), timeout=timeout), rank, world_size


_handlers: dict[str, Handler] = {"env": _env, "tcp": _tcp, "file": _file}


def register_rendezvous_handler(scheme: str, handler: Handler) -> None:
    """Make `scheme://` URLs meet through `handler(url, rank, world_size, timeout=seconds)`.

    The handler yields (store, rank, world_size). RuntimeError when the scheme is taken.
    """
    if scheme in _handlers:
        raise RuntimeError(f"Rendezvous handler for {scheme}:// already registered")
    _handlers[scheme] = handler


def rendezvous(
    url: str, rank: int = -1, world_size: int = -1, timeout: float = 1800.0, **kwargs: Any
) -> Iterator[Meeting]:
    """Meet at `url`; yields (store, rank, world_size). `timeout` is in seconds.

    RuntimeError for a scheme nobody registered.
    """
    scheme = urlparse(url).scheme
    if scheme not in _handlers:
        raise RuntimeError(
            f"No rendezvous handler for {scheme}:// (known: {', '.join(sorted(_handlers))})"
        )
    return _handlers[scheme](url, rank, world_size, timeout=timeout, **kwargs)
