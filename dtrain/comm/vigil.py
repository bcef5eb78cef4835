"""A look around while a call waits long: is the rank it waits for stopped, and who should know?

Owns: `Vigil`, made for a call that has waited for `agreement.STALL` seconds already, so that calls
that go well pay nothing for it. Rules: 1. a rank that computes is not an error, however long it
takes: after `stall_after` seconds there is one warning, with what it is doing. 2. One that is
stopped (SIGSTOP) is, after `security.silence()` seconds, since nothing moves until somebody lets it
go on.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence

from dtrain.comm import security
from dtrain.comm.topology import host_id
from dtrain.comm.transports.base import Transport
from dtrain.errors import PeerLost
from dtrain.logs import get_logger
from dtrain.processes import is_stopped

__all__ = ["WATCH", "Vigil"]

# How often a call that waits looks around.
WATCH = 0.25


class Vigil:
    """The looks around of one call.

    `announce` tells everybody what this rank waits in; `report(absent, seconds)` is what a warning
    at `warn_at` (monotonic clock) says; `level` is that of the warning.
    """

    def __init__(
        self,
        transport: Transport,
        announce: Callable[[], None],
        report: Callable[[Sequence[int]], str],
        warn_at: float,
        level: int = logging.WARNING,
    ) -> None:
        self._transport = transport
        self._announce, self._report = announce, report
        self._warn_at, self._level = warn_at, level
        self._stopped: dict[int, float] = {}  # {rank: since when it has been seen stopped}

    def look(self, absent: Sequence[int] | None) -> float:
        """Look after the ranks that are waited for (None: any); returns when to look again.

        Raises `PeerLost` for one that has been stopped for too long.
        """
        self._announce()
        self._transport.look()  # from now on, whoever dies is seen to
        now = time.monotonic()
        ranks = self._transport.peers if absent is None else absent
        for rank in ranks:
            if not self._is_stopped(rank):
                self._stopped.pop(rank, None)
            elif now - self._stopped.setdefault(rank, now) >= security.silence():
                raise PeerLost(rank)
        if now >= self._warn_at:
            self._warn_at = float("inf")
            log = get_logger("dtrain.comm")
            if log.isEnabledFor(self._level):
                log.log(self._level, "%s", self._report(ranks))
        return now + WATCH

    def _is_stopped(self, rank: int) -> bool:
        peer = self._transport.peer(rank)
        if peer is None or peer.host != host_id() or peer.pid == os.getpid():
            return False
        return is_stopped(peer.pid)
