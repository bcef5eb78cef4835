"""The only place that binds: what may be listened on, and the directories of unix sockets.

Rules: 1. a socket listens behind a gate on one TCP address, or on a unix path inside a directory of
mode 0700, or without a gate, when told so, on a private TCP address; on nothing else, and never on
every address of the machine. (The abstract unix socket over which ranks of one host give each other
memory has no path; who accepts there refuses other users.) 2. Options that keep strangers out are
read back after the bind.
"""

from __future__ import annotations

import functools
import os
import secrets
import shutil
import socket as socket_module
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path

import zmq

from dtrain.comm.security.addresses import bindable
from dtrain.comm.security.sockets import BACKLOG, PROTECTION, ask_for_signs_of_life
from dtrain.errors import DistNetworkError

__all__ = [
    "GATE",
    "Listener",
    "listen",
    "listen_nameless",
    "process_of",
    "remove_leftover",
    "same_user",
]

# sun_path holds 108 bytes with the closing zero.
MAX_UNIX_PATH = 107

# Where libzmq looks for the gate of a context (RFC 27).
GATE = "inproc://zeromq.zap.01"

_PREFIX = "dtrain-"  # followed by the process id
_SOCKET = "s"


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
    socket: zmq.Socket[bytes],
    where: str = "ipc",
    *,
    plain: bool = False,
    listen_fd: int | None = None,
) -> Listener:
    """Bind `socket`; with `listen_nameless` the only call of `bind` in the project.

    `where`: "ipc" for a unix socket in a fresh directory of mode 0700, "tcp://HOST[:PORT]" (port 0,
    the default, takes a free one) for a socket that a gate protects, or `GATE` for the gate itself.
    `plain` does without a gate, on private addresses. `listen_fd` is a socket that listens there
    already, and stays the caller's. Raises `DistNetworkError` for an address that is taken or not
    allowed. Blocks while a name is looked up.
    """
    directory = None
    if where == "ipc":
        directory = _fresh_directory()
        where = f"ipc://{directory}/{_SOCKET}"
    elif where != GATE:
        where = bindable(where, plain=plain)
        if not plain:
            _check_protection(socket, where)
    ask_for_signs_of_life(socket, where)
    if listen_fd is not None:
        socket.setsockopt(zmq.USE_FD, os.dup(listen_fd))  # libzmq closes its own
    try:
        socket.bind(where)
        if where.startswith("tcp:") and not plain:
            _check_protection(socket, where)
    except zmq.ZMQError as error:
        Listener(where, directory).remove()
        raise DistNetworkError(
            f"cannot listen on {where}: {zmq.strerror(error.errno or 0)}", address=where
        ) from error
    bound = socket.getsockopt(zmq.LAST_ENDPOINT)
    assert isinstance(bound, bytes)
    return Listener(bound.rstrip(b"\0").decode(), directory)


def _check_protection(socket: zmq.Socket[bytes], where: str) -> None:
    """Raise unless the socket lets in nobody but whom a gate admits."""
    for option, wanted in PROTECTION.items():
        found = socket.getsockopt(option)
        if found != wanted:
            raise DistNetworkError(
                f"refusing to listen on {where}: the socket is not authenticated (option {option}"
                f" is {found!r}, not {wanted!r})",
                address=where,
            )


def listen_nameless() -> socket_module.socket:
    """A unix socket in the abstract namespace (Linux): no file, it goes with its last descriptor.

    Anybody on the host can connect: check `same_user` of each connection.
    """
    listener = socket_module.socket(socket_module.AF_UNIX, socket_module.SOCK_STREAM)
    try:
        listener.bind(f"\0{_PREFIX}{os.getpid()}-{secrets.token_hex(16)}")
        listener.listen(BACKLOG)
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
    """A new private directory whose socket path fits into sun_path.

    It is in the run directory if there is one: that goes with the launcher, however ranks ended.
    """
    wished = tempfile.gettempdir()
    for base in (os.environ.get("DTRAIN_RUN_DIR", wished), wished, "/tmp"):
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


def remove_leftover(address: str) -> None:
    """Remove the unix socket of a peer on this host that died without doing so itself."""
    path = Path(address.removeprefix("ipc://"))
    if address.startswith("ipc://") and path.parent.name.startswith(_PREFIX):
        shutil.rmtree(path.parent, ignore_errors=True)
