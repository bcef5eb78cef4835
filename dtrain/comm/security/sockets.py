"""Contexts and sockets with the project's limits, and connecting them.

Rules: 1. a frame has a maximum size that is checked before it is allocated, by strangers' frames
too. 2. Nothing is dropped silently and nothing lingers: LINGER is 0 unless a close asks for time to
deliver. 3. A broken connection stays broken; a peer that comes back is a new peer. 4. Who connects
to a TCP socket knows its public key beforehand, and proves its own.
"""

from __future__ import annotations

from typing import NamedTuple

import zmq

from dtrain.comm.security.keys import Keys
from dtrain.wire import CHUNK

__all__ = [
    "BACKLOG",
    "BROKEN",
    "DOMAIN",
    "HEARTBEAT",
    "MAX_FRAME",
    "MAX_STORE_FRAME",
    "PROTECTION",
    "REFUSED",
    "Heartbeat",
    "ask_for_signs_of_life",
    "connect",
    "context",
    "open_socket",
    "protect",
    "silence",
    "user_of",
]

MAX_FRAME = CHUNK + 64 * 1024
# A stranger can make the server hold one frame per connection, for as long as a handshake may take.
MAX_STORE_FRAME = (8 << 20) + 64 * 1024

# The ZAP domain: with an empty one libzmq lets everybody in.
DOMAIN = b"dtrain"

# What keeps strangers out of a listening socket, each with the value it must have.
PROTECTION: dict[int, int | bytes] = {
    zmq.CURVE_SERVER: 1,
    zmq.ZAP_DOMAIN: DOMAIN,
    zmq.ZAP_ENFORCE_DOMAIN: 1,
}

HANDSHAKE_MS = 10_000
BACKLOG = 1024


class Heartbeat(NamedTuple):
    """How often a silent connection is asked for a sign of life, and when it counts as dead."""

    every_ms: int
    dead_ms: int


# The I/O thread answers heartbeats by itself, so that only a stopped or unreachable process misses
# them.
HEARTBEAT = Heartbeat(1_000, 4_000)


def silence() -> float:
    """Seconds for which a rank may be stopped: the others notice before its connections break."""
    return (HEARTBEAT.dead_ms - HEARTBEAT.every_ms) / 1000


# What a connecting socket's monitor tells: the peer does not take our key (or it is not the one we
# know), and: the connection is no more.
REFUSED = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
)
BROKEN = zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED | REFUSED


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
    or drop); the queue of what was received holds `receive_limit` frames per peer (0: all), the
    rest stays with the sender.
    """
    socket = ctx.socket(kind)
    options = {
        zmq.LINGER: 0,
        zmq.MAXMSGSIZE: max_frame,
        zmq.HANDSHAKE_IVL: HANDSHAKE_MS,
        zmq.CONNECT_TIMEOUT: HANDSHAKE_MS,
        zmq.HEARTBEAT_TIMEOUT: HEARTBEAT.dead_ms,
        zmq.HEARTBEAT_TTL: HEARTBEAT.dead_ms,
        zmq.BACKLOG: BACKLOG,
        zmq.SNDHWM: 0,
        zmq.RCVHWM: receive_limit,
        zmq.RECONNECT_IVL: 50 if reconnect else -1,
    }
    if kind == zmq.ROUTER:
        options[zmq.ROUTER_MANDATORY] = 1
    for option, value in options.items():
        socket.setsockopt(option, value)
    return socket


def protect(socket: zmq.Socket[bytes], keys: Keys) -> None:
    """Let nobody in whom the context's gate does not admit; before the bind."""
    socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)
    for option, value in PROTECTION.items():
        socket.setsockopt(option, value)


def ask_for_signs_of_life(socket: zmq.Socket[bytes], address: str) -> None:
    """Heartbeats on what is bound or connected next, unless it is a unix socket.

    There the kernel tells of a death; and a reader that is busy while its queue is full would be
    taken for dead, since its heartbeats are behind what it has not read.
    """
    every = 0 if address.startswith("ipc:") else HEARTBEAT.every_ms
    socket.setsockopt(zmq.HEARTBEAT_IVL, every)


def connect(
    socket: zmq.Socket[bytes], address: str, keys: Keys | None = None, server: bytes = b""
) -> None:
    """Connect to a unix socket, or as `keys` to the TCP socket whose public key is `server`."""
    if keys is None:
        socket.setsockopt(zmq.CURVE_SERVER, 0)  # as if no key had ever been set
    else:
        socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.public)
        socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)
        socket.setsockopt(zmq.CURVE_SERVERKEY, server)
    socket.setsockopt(zmq.IPV6, int(address.startswith("tcp://[")))
    ask_for_signs_of_life(socket, address)
    socket.connect(address)


def user_of(frame: zmq.Frame) -> str:
    """The name that the gate gave to the key this frame came with; "" when it came with none."""
    try:
        return str(frame.get("User-Id"))
    except zmq.ZMQError:
        return ""
