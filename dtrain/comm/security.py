"""The only place that opens ZeroMQ contexts and sockets, sets their limits, and binds.

Owns: every socket option of the project, the addresses that may be bound, the directories of unix
sockets. Rules: 1. a socket listens on loopback, or on a unix path inside a directory of mode 0700;
on nothing else. (The abstract unix socket over which ranks of one host give each other memory has
no path; who accepts there refuses other users.) 2. A frame has a maximum size that is checked
before it is allocated. 3. Nothing is dropped silently and nothing lingers: LINGER is 0 unless a
close asks for time to deliver. 4. A broken connection stays broken; a peer that comes back is a new
peer.
"""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import os
import secrets
import shutil
import socket as socket_module
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path

import zmq

from dtrain.errors import DistNetworkError
from dtrain.wire import CHUNK

__all__ = [
    "Listener",
    "context",
    "listen",
    "listen_nameless",
    "open_socket",
    "process_of",
    "remove_leftover",
    "same_user",
    "silence",
]

# sun_path holds 108 bytes with the closing zero.
MAX_UNIX_PATH = 107

MAX_FRAME = CHUNK + 64 * 1024
MAX_STORE_FRAME = 64 << 20

_HANDSHAKE_MS = 10_000
_BACKLOG = 1024
# The I/O thread answers heartbeats by itself, so that only a stopped or unreachable process misses
# them.
HEARTBEAT_MS = 1_000
HEARTBEAT_TIMEOUT_MS = 4_000


def silence() -> float:
    """Seconds for which a rank may be stopped: the others notice before its connections break."""
    return (HEARTBEAT_TIMEOUT_MS - HEARTBEAT_MS) / 1000


_PREFIX = "dtrain-"  # followed by the process id
_SOCKET = "s"


def context() -> zmq.Context[zmq.Socket[bytes]]:
    """A context of its own for each transport and store: closing it gives everything back at a
    known moment.
    """
    made: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    made.setsockopt(zmq.BLOCKY, False)
    made.setsockopt(zmq.MAX_SOCKETS, 4096)
    return made


def open_socket(
    ctx: zmq.Context[zmq.Socket[bytes]],
    kind: int,
    *,
    max_frame: int = MAX_FRAME,
    receive_limit: int = 64,
    reconnect: bool = False,
) -> zmq.Socket[bytes]:
    """A socket with the project's options.

    The queue of what is sent has no limit (it holds references to arrays, and a limit would block
    or drop); the queue of what was received holds `receive_limit` frames per peer, the rest stays
    with the sender.
    """
    socket = ctx.socket(kind)
    options = {
        zmq.LINGER: 0,
        zmq.MAXMSGSIZE: max_frame,
        zmq.HANDSHAKE_IVL: _HANDSHAKE_MS,
        zmq.HEARTBEAT_IVL: HEARTBEAT_MS,
        zmq.HEARTBEAT_TIMEOUT: HEARTBEAT_TIMEOUT_MS,
        zmq.HEARTBEAT_TTL: HEARTBEAT_TIMEOUT_MS,
        zmq.BACKLOG: _BACKLOG,
        zmq.SNDHWM: 0,
        zmq.RCVHWM: receive_limit,
        zmq.RECONNECT_IVL: 50 if reconnect else -1,
    }
    if kind == zmq.ROUTER:
        options[zmq.ROUTER_MANDATORY] = 1
    for option, value in options.items():
        socket.setsockopt(option, value)
    return socket


@dataclass(slots=True)
class Listener:
    """A bound address, and what has to be removed from the file system when it is closed."""

    address: str
    directory: Path | None = None

    def remove(self) -> None:
        """Remove the socket's directory; call it after the socket is closed. Idempotent."""
        if self.directory is not None:
            shutil.rmtree(self.directory, ignore_errors=True)
            self.directory = None


def listen(
    socket: zmq.Socket[bytes], where: str = "ipc", *, listen_fd: int | None = None
) -> Listener:
    """Bind `socket`; with `listen_nameless` the only call of `bind` in the project.

    `where`: "ipc" for a unix socket in a fresh directory of mode 0700, or "tcp://HOST[:PORT]" with
    a loopback host; port 0 (the default) takes a free one. `listen_fd` is a socket that listens
    there already, and stays the caller's. Raises `DistNetworkError` for an address that is taken or
    not allowed.
    """
    directory = None
    if where == "ipc":
        directory = _fresh_directory()
        where = f"ipc://{directory}/{_SOCKET}"
    else:
        where = _loopback(where)
    if listen_fd is not None:
        socket.setsockopt(zmq.USE_FD, os.dup(listen_fd))  # libzmq closes its own
    try:
        socket.bind(where)
    except zmq.ZMQError as error:
        Listener(where, directory).remove()
        raise DistNetworkError(
            f"cannot listen on {where}: {error.strerror}", address=where
        ) from error
    bound = socket.getsockopt(zmq.LAST_ENDPOINT)
    assert isinstance(bound, bytes)
    return Listener(bound.rstrip(b"\0").decode(), directory)


def listen_nameless() -> socket_module.socket:
    """A unix socket in the abstract namespace (Linux): no file, it goes with its last descriptor.

    Anybody on the host can connect: check `same_user` of each connection.
    """
    listener = socket_module.socket(socket_module.AF_UNIX, socket_module.SOCK_STREAM)
    try:
        listener.bind(f"\0{_PREFIX}{os.getpid()}-{secrets.token_hex(16)}")
        listener.listen(_BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


def _credentials(connection: socket_module.socket) -> tuple[int, int, int]:
    """Process, user and group at the other end, as the kernel knows them (SO_PEERCRED)."""
    raw = connection.getsockopt(
        socket_module.SOL_SOCKET, socket_module.SO_PEERCRED, struct.calcsize("3i")
    )
    process, user, group = struct.unpack("3i", raw)
    return process, user, group


def same_user(connection: socket_module.socket) -> bool:
    """Whether the process at the other end of a unix socket runs as this process's user."""
    return _credentials(connection)[1] == os.geteuid()


def process_of(connection: socket_module.socket) -> int:
    """The process at the other end of a unix socket."""
    return _credentials(connection)[0]


def _fresh_directory() -> Path:
    """A new private directory whose socket path fits into sun_path."""
    for base in (tempfile.gettempdir(), "/tmp"):
        if len(os.fsencode(base)) + len(_PREFIX) + 24 <= MAX_UNIX_PATH and os.access(base, os.W_OK):
            _sweep(base)
            return Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=base))
    raise DistNetworkError(
        f"no directory for unix sockets: {tempfile.gettempdir()} is too long (a socket's path has"
        f" at most {MAX_UNIX_PATH} bytes) and /tmp is not writable; set TMPDIR"
    )


@functools.cache
def _sweep(base: str) -> None:
    """Remove what processes left in `base` that were killed; once per process and directory.

    A directory goes when its process is gone and its socket refuses connections (the process id
    alone may belong to another container that shares `base`).
    """
    for path in Path(base).glob(f"{_PREFIX}*/{_SOCKET}"):
        pid = path.parent.name.removeprefix(_PREFIX).partition("-")[0]
        if not Path(f"/proc/{pid}").exists() and _refuses(path):
            shutil.rmtree(path.parent, ignore_errors=True)


def _refuses(path: Path) -> bool:
    with socket_module.socket(socket_module.AF_UNIX) as probe:
        probe.settimeout(0.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return True
        except OSError:  # gone already, or not ours
            return False
        return False


def _loopback(where: str) -> str:
    host, _, port = where.removeprefix("tcp://").rpartition(":")
    if not host:
        host, port = port, "0"
    name = "127.0.0.1" if host == "localhost" else host.strip("[]")
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(name).is_loopback:
            return f"tcp://{f'[{name}]' if ':' in name else name}:{port}"
    raise DistNetworkError(
        f"refusing to listen on {where}: connections are not authenticated, so only loopback"
        " addresses (127.0.0.1, localhost) and unix sockets are allowed",
        address=where,
    )


def remove_leftover(address: str) -> None:
    """Remove the unix socket of a peer on this host that died without doing so itself."""
    path = Path(address.removeprefix("ipc://"))
    if address.startswith("ipc://") and path.parent.name.startswith(_PREFIX):
        shutil.rmtree(path.parent, ignore_errors=True)
