"""Bytes that nobody should send: mutated greetings, handshakes, frames, messages and requests.

Everything is drawn from a seeded generator, so that a failure comes again.
"""

from __future__ import annotations

import contextlib
import random
import socket
import struct
from collections.abc import Iterator

from dtrain.wire import HEAD, MAGIC, Header, dumps, pack

# ZMTP 3.1 (RFC 23): signature, version, mechanism, as-server, filler.
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"%-20s" + b"\0" + bytes(31)
READY = b"\x04\x19\x05READY\x0bSocket-Type\0\0\0\x06DEALER"
HELLO = b"\x04\xc8\x05HELLO\x01\0" + bytes(192)


def greeting(mechanism: bytes) -> bytes:
    """What a peer says first."""
    return GREETING.replace(b"%-20s", mechanism.ljust(20, b"\0"))


def mutated(rng: random.Random, sound: bytes) -> bytes:
    """`sound` with some of its bytes changed, lost or repeated."""
    spoilt = bytearray(sound)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(spoilt) + 1)
        how = rng.randrange(4)
        if how == 0 and at < len(spoilt):
            spoilt[at] = rng.randrange(256)
        elif how == 1:
            del spoilt[at : at + rng.randint(1, 8)]
        elif how == 2:
            spoilt[at:at] = rng.randbytes(rng.randint(1, 8))
        else:
            spoilt[at:at] = spoilt[: rng.randint(1, 16)]
    return bytes(spoilt)


def frame(rng: random.Random) -> bytes:
    """One ZMTP frame, sound or not: its length may be a lie, up to 2**63 bytes."""
    body = rng.randbytes(rng.randrange(60))
    how = rng.randrange(8)
    if how == 0:
        return b"\x02" + struct.pack(">Q", rng.getrandbits(rng.randint(1, 64))) + body
    if how == 1:
        return rng.randbytes(rng.randint(1, 20))
    return bytes([rng.choice((0, 1, 4)), len(body)]) + body


def conversation(rng: random.Random, frames: int) -> bytes:
    """All that a stranger sends on one connection: as much of a handshake as he likes, and
    `frames` frames.
    """
    mechanism = rng.choice((b"CURVE", b"NULL", b"PLAIN", b"GSSAPI", rng.randbytes(8)))
    start = greeting(mechanism)
    if rng.random() < 0.5:
        start = mutated(rng, start)
    shake = rng.choice((READY, HELLO, mutated(rng, HELLO), mutated(rng, READY), b""))
    return start + shake + b"".join(frame(rng) for _ in range(frames))


def message(rng: random.Random, size: int) -> list[bytes]:
    """The frames of a message to a rank's inbox, which is none of its group's.

    Its number of the group is random: one that a mutation could mend would be a member's message.
    """
    kind = rng.randrange(9)
    group = rng.getrandbits(64)
    header = Header(kind, rng.randrange(size + 2), rng.getrandbits(40), rng.getrandbits(10), group)
    sound = pack(header, rng.randbytes(rng.randrange(40)))
    first = sound if rng.random() < 0.5 else mutated(rng, sound)[: HEAD.size + 200]
    return [first, *(rng.randbytes(rng.randrange(30)) for _ in range(rng.randrange(3)))]


def request(rng: random.Random, number: int) -> bytes:
    """A request to the store that should not be served: wrong types, lengths, names or bytes."""
    junk = [None, -1, 1 << 60, 0.5, float("nan"), float("inf"), "key", b"value", [], {}, ["a", 5]]
    commands = ["set", "get", "multi_get", "add", "append", "wait", "gather", "collect", "check"]
    commands += ["compare_set", "queue_pop", "queue_push", "list_keys", "delete_key", "join", "?"]
    args = [rng.choice(junk) for _ in range(rng.randrange(5))]
    timeout = rng.choice([0.0, 0.001, "soon", None, float("nan"), float("-inf"), -1.0, []])
    sound = pack(Header(0, tag=number), dumps([rng.choice(commands), args, timeout]))
    return sound if rng.random() < 0.6 else MAGIC + mutated(rng, sound[4:])


def strangers(rng: random.Random, address: tuple[str, int], connections: int) -> Iterator[int]:
    """Connect that often, send a conversation each time, hang up; yields the frames sent."""
    for _ in range(connections):
        with socket.create_connection(address, timeout=5) as sock:
            # Without it every connection would keep its port for a minute.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            with contextlib.suppress(OSError):  # refused in the middle, as it should be
                sock.sendall(conversation(rng, 20))
        yield 20
