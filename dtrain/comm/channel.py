"""One collective's view of the transport: its peers, its tag, its deadline, its fingerprint.

Owns: `Channel`. Made by the group for each collective; algorithms talk to it and never see a
transport. Rules: the first message to each peer carries the fingerprint ("signature, call site");
the first message from each peer is compared with it before one byte is written. A wait that takes
long tells everybody what this rank is waiting in.
"""

from __future__ import annotations

from typing import Protocol

from dtrain.comm.record import CallRecord
from dtrain.comm.transports.base import Transport
from dtrain.comm.transports.mailbox import Array, Receive
from dtrain.errors import TransportTimeout

__all__ = ["Channel", "Watcher", "note_of", "read_note"]


def note_of(signature: str, site: str) -> bytes:
    """The fingerprint as it travels."""
    return f"{signature}\0{site}".encode()


def read_note(note: bytes) -> tuple[str, str]:
    """Signature and call site of a fingerprint."""
    signature, _, site = note.decode().partition("\0")
    return signature, site


class Watcher(Protocol):
    """Who judges fingerprints and tells others what this rank waits in (`agreement.Agreement`).

    `heard`: {rank: highest sequence number it is known to have started}.
    """

    heard: dict[int, int]

    def inspect(self, record: CallRecord, source: int, note: bytes, nbytes: int) -> None:
        """Raise when the fingerprint `note` of `source` is not that of `record`."""

    def announce(self, record: CallRecord) -> None:
        """Tell all ranks that this one waits in `record`."""


class Channel:
    """What an algorithm may do: `post`, `send`, `wait`, `flush`, knowing `rank`, `size` and
    `peers`.
    """

    def __init__(
        self,
        transport: Transport,
        watcher: Watcher,
        record: CallRecord,
        *,
        stall_at: float,
        deadline: float,
    ) -> None:
        self.rank, self.size = transport.rank, transport.size
        self.peers = [r for r in range(self.size) if r != self.rank]
        self._transport, self._watcher = transport, watcher
        self._record, self._tag = record, record.seq
        self._note = note_of(record.signature, record.site)
        self._stall_at, self._deadline = stall_at, deadline
        self._greeted: set[int] = set()  # peers that have been sent the fingerprint
        self._expected: set[int] = set()  # peers whose fingerprint a posted receive checks

    def post(self, src: int, out: Array) -> Receive:
        """Start to receive `out` from `src`."""
        if src in self._expected:
            return self._transport.post(src, self._tag, out)
        self._expected.add(src)
        return self._transport.post(src, self._tag, out, self._inspect)

    def _inspect(self, source: int, note: bytes, nbytes: int) -> None:
        self._watcher.heard[source] = self._tag
        if note != self._note:  # equal when the calls were made at the same line, too
            self._watcher.inspect(self._record, source, note, nbytes)

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
            self._watcher.announce(self._record)
            self._transport.wait(receive, self._deadline)

    def flush(self) -> None:
        """Wait until everything sent may be changed."""
        self._transport.flush(self._deadline)
