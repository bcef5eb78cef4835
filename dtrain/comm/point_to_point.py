"""Send and Recv: messages between two ranks of a group, outside the sequence of its collectives.

Matched by (source, destination, tag), in the order in which they were sent and posted. A send does
not wait for its receive. The message carries what was sent; a receive of another dtype or shape
raises on the receiving rank.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dtrain.comm.arrays import check_array, describe
from dtrain.comm.channel import note_of, read_note
from dtrain.comm.transports.base import ANY_SOURCE, Transport
from dtrain.comm.transports.mailbox import Array
from dtrain.comm.vigil import WATCH, Vigil
from dtrain.comm.work import Work
from dtrain.errors import CollectiveMismatch, TransportTimeout

__all__ = ["Pending", "Recv", "Send", "reference"]

# finish(deadline) completes a started call and returns the source of a receive
Finish = Callable[[float], int | None]


@dataclass(slots=True)
class Send:
    """Send `buf` to rank `dst`."""

    buf: Array
    dst: int
    tag: int = 0
    kind: ClassVar[str] = "send"

    def validate(self, rank: int, size: int) -> None:
        """Raise for an array or a rank that cannot be used."""
        check_array(self.buf, self.kind, writable=False)
        _check_peer(self.dst, self.tag, rank, size, "destination")

    @property
    def nbytes(self) -> int:
        """Bytes of the message."""
        return int(self.buf.nbytes)

    @property
    def signature(self) -> str:
        """What travels, for the receiver to compare."""
        return describe(self.buf)

    def start(self, transport: Transport, group: str, site: str) -> Finish:
        """Hand the array to the transport; the result waits until it may be changed again."""
        transport.send(self.dst, -1 - self.tag, self.buf, note_of(self.signature, site))
        return transport.flush

    def __str__(self) -> str:
        return f"send({describe(self.buf)}, dst={self.dst}, tag={self.tag})"


@dataclass(slots=True)
class Recv:
    """Receive into `buf` from rank `src`, or from whoever sends first when it is None."""

    buf: Array
    src: int | None = None
    tag: int = 0
    kind: ClassVar[str] = "recv"

    def validate(self, rank: int, size: int) -> None:
        """Raise for an array or a rank that cannot be used."""
        check_array(self.buf, self.kind, writable=True)
        if self.src is not None:
            _check_peer(self.src, self.tag, rank, size, "source")
        elif self.tag < 0:
            raise ValueError(f"recv: tag must not be negative, got {self.tag}")

    @property
    def nbytes(self) -> int:
        """Bytes of the message."""
        return int(self.buf.nbytes)

    @property
    def signature(self) -> str:
        """What must have been sent."""
        return describe(self.buf)

    def start(self, transport: Transport, group: str, site: str) -> Finish:
        """Post the receive; the result waits until the message is here."""

        def inspect(source: int, note: bytes, nbytes: int) -> None:
            sent, sender = read_note(note)
            if sent != self.signature:
                raise CollectiveMismatch(
                    f"group {group!r}: rank {transport.rank} called {self} at {site}"
                    f" but rank {source} sent {sent} at {sender}.",
                    group=group,
                    seq=None,
                    calls=[[transport.rank, str(self), site], [source, f"send({sent})", sender]],
                )

        src = ANY_SOURCE if self.src is None else self.src
        receive = transport.post(src, -1 - self.tag, self.buf, inspect)
        return lambda deadline: transport.wait(receive, deadline)

    def __str__(self) -> str:
        source = "any" if self.src is None else self.src
        return f"recv({describe(self.buf)}, src={source}, tag={self.tag})"


class Pending:
    """A started point-to-point call: it moves on while somebody waits for its `work`, until
    `deadline`. `ended` is told how it went and says with which error it ends.
    """

    def __init__(
        self,
        where: str,
        buf: Array,
        finish: Finish,
        ended: Callable[[BaseException | None], BaseException | None],
        vigil: Callable[[], Vigil],
        deadline: float,
    ) -> None:
        self._finish, self._ended, self._vigil, self._deadline = finish, ended, vigil, deadline
        self._watch: Vigil | None = None  # made for the first look around
        self._lock = threading.Lock()
        self._finished = False
        self.work = Work(where, buf, self._drive)

    def _drive(self, timeout: float | None) -> None:
        until = self._deadline
        if timeout is not None:
            until = min(until, time.monotonic() + timeout)
        source: int | None = None
        error: BaseException | None = None
        try:
            source = self._endure(until)
        except TransportTimeout as late:
            if until < self._deadline:
                return
            error = late
        except BaseException as failure:
            error = failure
        with self._lock:
            first, self._finished = not self._finished, True
        if first:
            self.work.finish(self._ended(error), source)

    def _endure(self, until: float) -> int | None:
        """Wait until then, with a look around from time to time."""
        look_at = time.monotonic() + WATCH
        while True:
            try:
                return self._finish(min(look_at, until))
            except TransportTimeout as late:
                if look_at >= until:
                    raise
                self._watch = self._watch or self._vigil()
                look_at = self._watch.look(None if late.rank is None else [late.rank])


def _check_peer(peer: int, tag: int, rank: int, size: int, role: str) -> None:
    if peer == rank:
        raise ValueError(
            f"Invalid {role} rank: {role} rank should not be the same as the rank of the current"
            f" process ({rank})."
        )
    if not 0 <= peer < size:
        raise ValueError(f"Invalid {role} rank {peer}: not a rank of this group (range({size}))")
    if tag < 0:
        raise ValueError(f"tag must not be negative, got {tag}")


def reference(ranks: Sequence[Sequence[Send | Recv]]) -> list[list[Array | None]]:
    """What each call leaves in `buf` (None for a send), given the calls of all ranks.

    No `src=None`.
    """
    sent: dict[tuple[int, int, int], list[Array]] = {}
    for src, calls in enumerate(ranks):
        for call in calls:
            if isinstance(call, Send):
                sent.setdefault((src, call.dst, call.tag), []).append(np.copy(call.buf))
    return [
        [
            sent[call.src, dst, call.tag].pop(0)
            if isinstance(call, Recv) and call.src is not None
            else None
            for call in calls
        ]
        for dst, calls in enumerate(ranks)
    ]
