"""Faults that a rank can suffer, as data, and what a rank of a trial does (`trials` judges it).

Owns: `FAULTS` (how each is injected, what the survivors must see), `CALLS` (in the midst of what),
`suffer`, the program of every rank. Rules: 1. a victim injects the fault into itself, at a moment
that is reached by counting, never by waiting: before the call, or amid it, where it has taken half
of its steps. 2. It notes the injection in the store first; without that note a trial was not run.
3. The seams are the transport's own methods, wrapped in the victim; the product knows nothing.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from dtrain.comm import collectives as c
from dtrain.comm.group import ProcessGroup
from dtrain.comm.security import sockets
from dtrain.comm.store.base import Store
from dtrain.distributed.objects import all_gather_object
from dtrain.errors import DistError
from dtrain.testing.distributed import joined
from dtrain.testing.leaks import check_leaks

__all__ = ["CALLS", "FAULTS", "MOMENTS", "Fault", "suffer"]

MOMENTS = ("before", "amid")

# Seconds within which a death must be told, and the heartbeats of trials in which a rank stops.
SOON = 1.0
_QUICK = sockets.Heartbeat(every_ms=100, dead_ms=500)

# What ranks of a trial wait for each other when they meet, and at most in a call.
MEETING, _CALL = 1.0, 8.0

# Calls that survivors go on to make: some may have been done before the fault struck.
_ROUNDS = 200


class Struck(RuntimeError):
    """What the fault "exception" raises in the victim."""


class Gone(BaseException):
    """Ends the victim's part after it has left without goodbye."""


@dataclass(frozen=True, slots=True)
class Fault:
    """`inject(group, store)` runs in the victim's thread that makes the call (`group` is None while
    ranks meet). Survivors must raise one of `errors` within `within` seconds; the victim's process
    ends with `status`.
    """

    inject: Callable[[ProcessGroup | None, Store], Any]
    errors: tuple[str, ...] = ("PeerLost",)
    within: float = SOON
    status: int = 0


def _kill_with(signum: int, group: ProcessGroup | None, store: Store) -> None:
    os.kill(os.getpid(), signum)


def _raise(error: BaseException, group: ProcessGroup | None, store: Store) -> None:
    raise error


def _close_sockets(group: ProcessGroup | None, store: Store) -> None:
    if group is None:
        store.close()
    else:
        group.abandon()
    raise Gone


FAULTS = {
    "SIGKILL": Fault(partial(_kill_with, signal.SIGKILL), status=-signal.SIGKILL),
    "SIGSTOP": Fault(partial(_kill_with, signal.SIGSTOP), within=_QUICK.dead_ms / 1000 + SOON),
    "exception": Fault(partial(_raise, Struck("no such column")), errors=("GroupAborted",)),
    "socket close": Fault(_close_sockets),
    "sys.exit": Fault(partial(_raise, SystemExit(3)), errors=("GroupAborted",)),
    "os._exit": Fault(lambda group, store: os._exit(7), status=7),
    "segfault": Fault(lambda group, store: ctypes.string_at(0), status=-signal.SIGSEGV),
}


def _all_reduce(count: int, group: ProcessGroup) -> None:
    buf = np.full(count, group.rank + 1.0, np.float32)
    group.submit(c.AllReduce(buf))
    assert buf[0] == buf[-1] == group.size * (group.size + 1) / 2


def _all_to_all(group: ProcessGroup) -> None:
    inp, out = np.full((group.size, 5000), group.rank), np.empty((group.size, 5000), int)
    group.submit(c.AllToAll(inp, out))
    assert out[:, -1].tolist() == list(range(group.size))


def _objects(group: ProcessGroup) -> None:
    found: list[Any] = [None] * group.size
    all_gather_object(found, {"rank": group.rank})
    assert found == [{"rank": rank} for rank in range(group.size)]


CALLS: dict[str, Callable[[ProcessGroup], object]] = {
    "rendezvous": lambda group: group.submit(c.Barrier()),
    "all_reduce 4 B": partial(_all_reduce, 1),
    "all_reduce 16 MiB": partial(_all_reduce, 4 << 20),
    "all_to_all": _all_to_all,
    "barrier": lambda group: group.submit(c.Barrier()),
    "objects": _objects,
}


class _Steps:
    """Counts what this rank does for others, and strikes just before step `at`."""

    def __init__(self) -> None:
        self.taken = 0
        self.at: int | None = None
        self.strike: Callable[[], object] = lambda: None

    def watch(self, owner: object, name: str) -> None:
        """Count the calls of `owner.name` too."""
        step = getattr(owner, name)

        def counted(*args: Any, **options: Any) -> Any:
            self.taken += 1
            if self.taken == self.at:
                self.strike()
            return step(*args, **options)

        setattr(owner, name, counted)


def suffer(
    store: Store,
    rank: int,
    size: int,
    fault: str,
    call: str,
    transport: str,
    victim: int,
    moment: str,
) -> list[Any]:
    """What each rank of a trial does; [error, blamed ranks, sentence, seconds since the injection].

    The seconds are None when there was no injection. Raises LeakError.
    """
    store.set(f"up{rank}", b"")  # opens what a client of the store opens
    if fault == "SIGSTOP":
        sockets.HEARTBEAT = _QUICK

    def strike(group: ProcessGroup | None = None) -> None:
        store.set("struck", str(time.monotonic_ns()).encode())
        FAULTS[fault].inject(group, store)

    with check_leaks():
        error, when = _take_part(
            store, rank, size, call, transport, moment, strike if rank == victim else None
        )
    if rank == victim:
        return [type(error).__name__, [], str(error), None]
    blamed = getattr(error, "ranks", None) or [getattr(error, "rank", None)]
    struck = int(store.get("struck")) if store.check(["struck"]) else None
    seconds = None if struck is None else (when - struck) / 1e9
    return [type(error).__name__, blamed, str(error), seconds]


def _take_part(
    store: Store,
    rank: int,
    size: int,
    call: str,
    transport: str,
    moment: str,
    strike: Callable[..., None] | None,
) -> tuple[BaseException | None, int]:
    """The error that ended this rank's part, and when it was raised."""
    when, meeting = 0, call == "rendezvous"
    try:
        if meeting and strike is not None:
            _strike_while_meeting(store, moment, strike)
        patience = MEETING if meeting else _CALL
        group = ProcessGroup(store, rank, size, transport=transport, timeout=patience)
        with group, joined(group):
            try:
                _work(group, CALLS[call], moment, None if meeting else strike)
            except BaseException:
                when = time.monotonic_ns()  # before the group is closed, which may take 1 s more
                raise
    except (DistError, Struck, Gone, SystemExit) as error:
        return error, when or time.monotonic_ns()
    return None, 0


def _strike_while_meeting(store: Store, moment: str, strike: Callable[..., None]) -> None:
    """Before this rank says where it is, or when it has just said so."""
    if moment == "before":
        return strike()
    gather = store.gather

    def struck(*args: Any) -> Any:
        store.gather = gather  # type: ignore[method-assign]
        values = gather(*args)
        strike()
        return values

    store.gather = struck  # type: ignore[method-assign]


def _work(
    group: ProcessGroup,
    call: Callable[[ProcessGroup], object],
    moment: str,
    strike: Callable[..., None] | None,
) -> None:
    """Make the call over and over; twice before anything happens."""
    steps = _Steps()
    steps.watch(group.transport, "_send")
    if group.transport.window is not None:
        steps.watch(group.transport.window, "arrive")
    call(group)
    first = steps.taken
    call(group)
    if strike is not None and moment == "before":
        strike(group)
    elif strike is not None and moment == "amid" and steps.taken > first:
        steps.at = steps.taken + (steps.taken - first) // 2 + 1
        steps.strike = partial(strike, group)
    for _ in range(_ROUNDS):
        call(group)
