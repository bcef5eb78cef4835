"""What goes over a socket: frames = [header + msgpack body | raw buffers].

Owns: the fixed header, the msgpack settings, the size of a chunk. Used by stores and transports, by
nobody else. Rules: no pickle here or below. A header is checked before anything else of a message
is looked at.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgpack

__all__ = [
    "CHUNK",
    "HEAD",
    "MAGIC",
    "Buffer",
    "Header",
    "WireError",
    "dumps",
    "joined",
    "loads",
    "pack",
    "unpack",
]

MAGIC = b"DTR1"
# On loopback 64 MiB take 34 ms in frames of 1 or 2 MiB, 40 ms in larger ones, which fall out of the
# caches on their way; smaller ones cost more steps. (And one frame of some GiB is more than libzmq
# takes gracefully.)
CHUNK = 2 << 20
# magic, kind, 1 spare byte, sender, tag, payload bytes that follow, job
HEAD = struct.Struct("<4sBxHqQQ")

Buffer = bytes | bytearray | memoryview


class WireError(ValueError):
    """A frame that is not ours: wrong magic, too short, or not msgpack."""


class Header(NamedTuple):
    """`kind`: meaning given by the protocol.

    `src`: rank; `nbytes`: raw bytes to follow; `job`: who belongs together.
    """

    kind: int
    src: int = 0
    tag: int = 0
    nbytes: int = 0
    job: int = 0


def pack(header: Header, body: bytes = b"") -> bytes:
    """The first frame of a message."""
    return HEAD.pack(MAGIC, *header) + body


def unpack(frame: bytes) -> tuple[Header, bytes]:
    """Header and body of a first frame; raises `WireError` when it is not one."""
    if len(frame) < HEAD.size or frame[:4] != MAGIC:
        raise WireError(f"not a dtrain frame: {bytes(frame[:16])!r}")
    _, *fields = HEAD.unpack_from(frame)
    return Header(*fields), frame[HEAD.size :]


def dumps(value: Any) -> bytes:
    """`value` (None, bool, int, float, str, bytes, list, dict) as msgpack."""
    return msgpack.packb(value, use_bin_type=True)  # type: ignore[no-any-return]


def joined(bodies: Sequence[bytes]) -> bytes:
    """The list (of at most 65535) whose items are these values, which `dumps` has made bytes of."""
    return b"\xdc" + len(bodies).to_bytes(2, "big") + b"".join(bodies)


def loads(data: Buffer) -> Any:
    """The value of msgpack bytes; tuples come back as lists.

    Raises `WireError` on anything malformed.
    """
    try:
        return msgpack.unpackb(data, raw=False, strict_map_key=False)
    except Exception as error:
        raise WireError(f"malformed msgpack: {error}") from error
