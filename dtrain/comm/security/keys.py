"""Key pairs (X25519, as CURVE uses them), drawn fresh or derived from the job's secret.

Rules: 1. whoever has the secret can compute the store's key and that of its clients, so that both
ends of the first connection know each other without asking. 2. The keys of ranks are drawn for one
group and told through the store; they are worth nothing to another group or attempt. 3. What a key
is derived for goes into it: protocol version, run, attempt and role. Another one of these is
another key, and is refused in the handshake.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass, field
from typing import NamedTuple

import zmq
from zmq.utils import z85

from dtrain import env
from dtrain.comm.security.secret import job_secret
from dtrain.wire import MAGIC

__all__ = ["Keys", "StoreKeys", "fresh_keys", "hkdf", "member_keys", "store_keys"]

_SALT = b"dtrain"


@dataclass(frozen=True, slots=True)
class Keys:
    """A pair in Z85, which is what libzmq takes. The secret half is in no text."""

    public: bytes
    secret: bytes = field(repr=False)


class StoreKeys(NamedTuple):
    """What the server of a job's store and its clients prove themselves with."""

    server: Keys
    client: Keys


def fresh_keys() -> Keys:
    """A pair that nobody else has."""
    return Keys(*zmq.curve_keypair())


def store_keys(secret: bytes | None = None) -> StoreKeys:
    """The pairs of this run's store, from its secret (default: `job_secret()`).

    Raises `SecretError` when there is no usable secret.
    """
    secret = job_secret() if secret is None else secret
    run = env.run_identity()
    return StoreKeys(*(_derived(secret, f"store {role} {run}") for role in ("server", "client")))


def member_keys() -> Keys:
    """The pair that shows that somebody has the secret of this run, as all workers of an open world
    do. Raises `SecretError` when there is no usable secret.
    """
    return _derived(job_secret(), f"member {env.run_identity()}")


def _derived(secret: bytes, purpose: str) -> Keys:
    half = z85.encode(hkdf(secret, MAGIC + purpose.encode()))
    return Keys(zmq.curve_public(half), half)


def hkdf(secret: bytes, purpose: bytes) -> bytes:
    """32 bytes for one purpose: HKDF-SHA256 (RFC 5869), extract and one block of expand."""
    extracted = hmac.digest(_SALT, secret, hashlib.sha256)
    return hmac.digest(extracted, purpose + b"\x01", hashlib.sha256)
