"""The flags of a job on several nodes: how many may take part, where they meet, on which terms.

Pure functions from text to values; every one raises ValueError with the whole complaint. Nodes
meet (`membership.Meeting`) when their number may change, when ranks may be started again, or when
`--rdzv-backend c10d` asks for it; otherwise each knows its place from its flags and the ranks alone
find each other.
"""

from __future__ import annotations

from typing import Any

from dtrun.membership import Terms

# What torchrun knows too, and dtrun has no use for: a store's timeouts are those of its calls.
NO_EFFECT = ("close_timeout", "heartbeat_timeout", "read_timeout", "store_type", "rank")
SECONDS = {
    "join_timeout": "join_timeout",
    "timeout": "join_timeout",  # as older versions of torch call it
    "last_call_timeout": "last_call",
    "keep_alive_interval": "alive_every",
}
ATTEMPTS = "keep_alive_max_attempt"
KNOWN = (*SECONDS, ATTEMPTS, "is_host")


def nodes(text: str) -> tuple[int, int]:
    """N or MIN:MAX."""
    least, colon, most = text.partition(":")
    most = most if colon else least
    if not all(part.isdecimal() and int(part) >= 1 for part in (least, most)):
        raise ValueError(f"--nnodes must be a number from 1, or MIN:MAX, got {text!r}")
    if int(least) > int(most):
        raise ValueError(f"--nnodes {text}: at least {least} and at most {most} nodes is no range")
    return int(least), int(most)


def conf(text: str) -> dict[str, str]:
    """`name=value,name=value` of --rdzv-conf."""
    pairs = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not value:
            raise ValueError(f"--rdzv-conf: expected name=value,name=value, got {part!r}")
        if name not in KNOWN + NO_EFFECT:
            known = ", ".join(KNOWN)
            raise ValueError(f"--rdzv-conf: {name} is not known, expected one of {known}")
        pairs[name] = value
    return pairs


def terms(given: dict[str, str], least: int, most: int, restarts: int, *, static: bool) -> Terms:
    """What the nodes must agree on, with the times of --rdzv-conf."""
    named = {name: field for name, field in SECONDS.items() if name in given}
    seconds: dict[str, Any] = {f: _seconds(name, given[name]) for name, f in named.items()}
    made = Terms(least, most, restarts, static)._replace(**seconds)
    attempts = int(_seconds(ATTEMPTS, given.get(ATTEMPTS, "5")))
    return made._replace(dead_after=made.alive_every * max(1, attempts))


def is_host(given: dict[str, str], node_rank: int, *, static: bool) -> bool | None:
    """Whether this node is the head; None: if the meeting's address is its own."""
    if static:
        return node_rank == 0
    text = given.get("is_host")
    if text is None:
        return None
    if text.lower() not in ("0", "1", "true", "false"):
        raise ValueError(f"--rdzv-conf: is_host must be true or false, got {text!r}")
    return text.lower() in ("1", "true")


def _seconds(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value > 0:
        raise ValueError(f"--rdzv-conf: {name} must be a number above 0, got {text!r}")
    return value
