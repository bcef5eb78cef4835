"""One collective's view of the transport: its peers, its tag, its deadline, its fingerprint.

Owns: `Channel`. Made by the group for each collective; algorithms talk to it and never see a transport.
Rules: the first message to each peer carries the fingerprint ("signature, call site"); the first message from each peer
is compared with it before one byte is written. A wait that takes long tells everybody what this rank is waiting in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from dtrain.comm.transports.base import Transport
from dtrain.comm.transports.mailbox import Array, Receive
from dtrain.errors import TransportTimeout

__all__ = ["Channel", "Inspector", "note_of", "read_note"]


def note_of(signature: str, site: str) -> bytes:
    """The fingerprint as it travels."""
    return f"{signature}\0{site}".encode()


def read_note(note: bytes) -> tuple[str, str]:
    """Signature and call site of a fingerprint."""
    signature, _, site = note.decode().partition("\0")
    return signature, site


class Inspector(Protocol):
    """Whoever judges fingerprints: raises when `note` of `source` does not fit the running call."""

    def __call__(self, source: int, note: bytes, nbytes: int) -> None: ...


class Channel:
    """What an algorithm may do: `post`, `send`, `wait`, `flush`, knowing `rank`, `size` and `peers`."""

    def __init__(
        self,
        transport: Transport,
        tag: int,
        note: bytes,
        *,
        inspect: Inspector,
        stalled: Callable[[], None],
        stall_at: float,
        deadline: float,
    ) -> None:
        self.rank, self.size = transport.rank, transport.size
        self.peers = [r for r in range(self.size) if r != self.rank]
        self._transport = transport
        self._tag, self._note = tag, note
        self._inspect, self._stalled = inspect, stalled
        self._stall_at, self._deadline = stall_at, deadline
        self._greeted: set[int] = set()  # peers that have been sent the fingerprint
        self._expected: set[int] = set()  # peers whose fingerprint a posted receive checks

    def post(self, src: int, out: Array) -> Receive:
        """Start to receive `out` from `src`."""
        first = src not in self._expected
        self._expected.add(src)
        return self._transport.post(src, self._tag, out, self._inspect if first else None)

    def send(self, dst: int, buf: Array) -> None:
        """Send `buf` to `dst`; it must not change before `flush`, or before `dst` answers."""
        note = b"" if dst in self._greeted else self._note
        self._greeted.add(dst)
        self._transport.send(dst, self._tag, buf, note)

    def wait(self, receive: Receive) -> None:
        """Wait until a posted receive is complete."""
        if receive.done or self._deadline <= self._stall_at:
            self._transport.wait(receive, self._deadline)
            return
        try:
            self._transport.wait(receive, self._stall_at)
        except TransportTimeout:
            self._stalled()
            self._transport.wait(receive, self._deadline)

    def flush(self) -> None:
        """Wait until everything sent may be changed."""
        self._transport.flush(self._deadline)
