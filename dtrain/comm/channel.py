"""One collective's view of the transport: its peers, its tag, its deadline, its fingerprint.

Owns: `Channel`. Made by the group for each collective; algorithms talk to it and never see a
transport. Rules: the first message to each peer carries the fingerprint ("signature, call site");
the first message from each peer is compared with it before one byte is written. Through a window,
the first phase does the same with a hash of the signature. A wait that takes long tells everybody
what this rank is waiting in.
"""

from __future__ import annotations

import time
from functools import lru_cache
from hashlib import blake2b
from typing import Protocol

from dtrain.comm.record import CallRecord
from dtrain.comm.transports.base import Transport
from dtrain.comm.transports.mailbox import Array, Receive
from dtrain.comm.transports.window import NOWHERE
from dtrain.errors import DistError, TransportTimeout

__all__ = ["Channel", "Watcher", "note_of", "read_note"]


def note_of(signature: str, site: str) -> bytes:
    """The fingerprint as it travels."""
    return f"{signature}\0{site}".encode()


def read_note(note: bytes) -> tuple[str, str]:
    """Signature and call site of a fingerprint."""
    signature, _, site = note.decode().partition("\0")
    return signature, site


# How long a rank sleeps in the window before it looks for news, deaths and its deadline.
_LOOK = 0.02


@lru_cache(maxsize=4096)
def fingerprint(signature: str) -> int:
    """63 bits that differ when signatures do: what a window can hold of them."""
    return int.from_bytes(blake2b(signature.encode(), digest_size=8).digest(), "little") >> 1


class Watcher(Protocol):
    """Who judges fingerprints and tells others what this rank waits in (`agreement.Agreement`).

    `heard`: {rank: highest sequence number it is known to have started}.
    """

    heard: dict[int, int]

    def inspect(self, record: CallRecord, source: int, note: bytes, nbytes: int) -> None:
        """Raise when the fingerprint `note` of `source` is not that of `record`."""

    def disturb(self, record: CallRecord) -> None:
        """Raise: another rank has shown a different fingerprint than that of `record`."""

    def announce(self, record: CallRecord) -> None:
        """Tell all ranks that this one waits in `record`."""


class Channel:
    """What an algorithm may do, knowing `rank`, `size` and `peers`: by messages `post`, `send`,
    `wait`, `flush`; where there is a `window` of all ranks, or one of the ranks of each host
    (`island`), `meet`, `share` and `phase` among those who have it in common.
    """

    __slots__ = (
        "_deadline",
        "_expected",
        "_greeted",
        "_memory",
        "_met",
        "_note",
        "_record",
        "_stall_at",
        "_tag",
        "_transport",
        "_watcher",
        "island",
        "peers",
        "rank",
        "size",
        "window",
    )

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
        self.peers = transport.peers
        self.window, self.island = transport.window, transport.island
        self._memory = transport.memory
        self._transport, self._watcher = transport, watcher
        self._record, self._tag = record, record.seq
        self._note = b""  # made for the first message
        self._stall_at, self._deadline = stall_at, deadline
        self._greeted: set[int] = set()  # peers that have been sent the fingerprint
        self._expected: set[int] = set()  # peers whose fingerprint a posted receive checks
        self._met = False  # whether the fingerprint has gone through the window

    # ---- messages

    def _fingerprint(self) -> bytes:
        self._note = self._note or note_of(self._record.signature, self._record.site)
        return self._note

    def post(self, src: int, out: Array | int) -> Receive:
        """Start to receive `out` from `src`, or so many bytes (`Receive.data`)."""
        if src in self._expected:
            return self._transport.post(src, self._tag, out)
        self._expected.add(src)
        return self._transport.post(src, self._tag, out, self._inspect)

    def _inspect(self, source: int, note: bytes, nbytes: int) -> None:
        self._watcher.heard[source] = self._tag
        if note != self._fingerprint():  # equal when the calls were made at the same line, too
            self._watcher.inspect(self._record, source, note, nbytes)

    def all_have_come(self) -> None:
        """Note that this rank knows, from whomever, that all ranks have started this call."""
        self._watcher.heard.update(dict.fromkeys(self.peers, self._tag))

    def send(self, dst: int, buf: Array) -> None:
        """Send `buf` to `dst`; it must not change before `flush`, or before `dst` answers."""
        note = b"" if dst in self._greeted else self._fingerprint()
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

    # ---- the window

    def meet(self, place: int = NOWHERE) -> None:
        """Come together in the window, for the first time in this call: all have called the same.

        `place` tells the others where this rank's array lives; `window.places` then knows all.
        """
        window = self._memory
        assert window is not None
        code = fingerprint(self._record.signature)
        window.write_header(code, self._tag, place)
        self._met = True
        self.phase()
        if not window.agrees(code):
            self._watcher.disturb(self._record)

    def step(self) -> None:
        """`phase`, or `meet` for the first time in this call."""
        if self._met:
            self.phase()
        else:
            self.meet()

    def phase(self) -> None:
        """Announce that everything written so far may be read; return when all ranks have."""
        assert self._memory is not None
        if not self._memory.arrive():
            self._linger()

    def _linger(self) -> None:
        """Sleep until all have announced the phase, with a look at everything else every `_LOOK`
        seconds.
        """
        window, transport = self._memory, self._transport
        assert window is not None
        while (place := window.lagging()) is not None:
            window.sleep(place, _LOOK)
            if window.lagging() is None:
                return
            transport.look()
            lost = dict(transport.mailbox.lost)
            place = window.lagging()  # after the look: who leaves has announced before
            if place is None:
                return
            failure = transport.mailbox.failure or lost.get(self._rank_at(place))
            if failure is not None:
                raise failure.copy() if isinstance(failure, DistError) else failure
            self._tell_stall(place)

    def _rank_at(self, place: int) -> int:
        """The rank in the group of a rank of the window."""
        return place if self.island is None else self.island.members[place]

    def _tell_stall(self, place: int) -> None:
        """Say so when this takes long; raise when it takes too long."""
        assert self._memory is not None
        now = time.monotonic()
        if now >= self._stall_at:
            self._watcher.announce(self._record)
        if now >= self._deadline:
            seen, rank = self._memory.seen(place), self._rank_at(place)
            if seen is not None:
                self._watcher.heard[rank] = max(seen, self._watcher.heard.get(rank, -1))
            raise TransportTimeout(rank)

    def share(self, own: Array | None, shape: tuple[int, ...], like: Array) -> list[Array]:
        """Show `own` (at most `HALF` bytes, of that shape; None: nothing) to all ranks.

        Returns what each rank shows, as arrays of `shape` and the dtype of `like`, to be read
        before the next call and never written, except by who has it to himself; that of a rank
        that shows nothing is garbage, this rank's is `own` itself. All ranks call it alike.
        """
        window = self._memory
        assert window is not None
        shown = window.next_half_as(shape, like.dtype)
        if own is not None:
            here = window.rank
            shown[here][...] = own
            shown = [*shown[:here], own, *shown[here + 1 :]]
        self.step()
        return shown

    def show_again(self, own: Array, changed: slice) -> None:
        """After `share(own, ...)`: show what stands in the `changed` elements of it now."""
        window = self._memory
        assert window is not None
        half = window.this_half()[window.rank]
        half[: own.nbytes].view(own.dtype)[changed] = own[changed]
        self.phase()
