"""One collective's view of the transport: its peers, its tag, its deadline, its fingerprint.

Owns: `Channel`. Made by the group for each collective; algorithms talk to it and never see a
transport. Rules: the first message to each peer carries the fingerprint ("signature, call site");
the first message from each peer is compared with it before one byte is written. Through a window,
the first phase does the same with a hash of the signature. A wait that takes long looks around from
time to time (`vigil`), and tells everybody what this rank is waiting in.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from hashlib import blake2b
from typing import Protocol

from dtrain.comm.record import CallRecord
from dtrain.comm.transports.base import Transport
from dtrain.comm.transports.mailbox import Array, Receive
from dtrain.comm.transports.window import NOWHERE
from dtrain.comm.vigil import Vigil
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

    def vigil(self, record: CallRecord) -> Vigil:
        """What looks around while this rank waits long in `record`."""


class Channel:
    """What an algorithm may do, knowing `rank`, `size` and `peers`: by messages `post`, `send`,
    `wait`, `flush`; where there is a `window` of all ranks, or one of the ranks of each host
    (`island`), `meet`, `share` and `phase` among those who have it in common.
    """

    __slots__ = (
        "_deadline",
        "_expected",
        "_greeted",
        "_look_at",
        "_memory",
        "_met",
        "_note",
        "_record",
        "_tag",
        "_transport",
        "_vigil",
        "_watcher",
        "island",
        "peers",
        "rank",
        "size",
        "waits",
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
        self._look_at, self._deadline = min(stall_at, deadline), deadline
        self._vigil: Vigil | None = None  # made for the first look around
        self.waits: dict[int, float] | None = None  # {rank: seconds for which it was waited for}
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
        if receive.done:
            self._transport.wait(receive, self._deadline)
            return
        started = time.monotonic()
        self._endure(partial(self._transport.wait, receive, together=True))
        self._charge(receive.source, started)

    def flush(self) -> None:
        """Wait until everything sent may be changed."""
        if self._greeted:
            self._endure(self._transport.flush)

    def _endure(self, attempt: Callable[[float], object]) -> None:
        """Wait to the deadline, with a look around from time to time."""
        while True:
            try:
                attempt(self._look_at)
                return
            except TransportTimeout as late:
                if time.monotonic() >= self._deadline:
                    raise
                self._look_around(None if late.rank is None else [late.rank])

    def _look_around(self, absent: Sequence[int] | None) -> None:
        if self._vigil is None:
            self._vigil = self._watcher.vigil(self._record)
        self._look_at = min(self._vigil.look(absent), self._deadline)

    def _charge(self, rank: int, since: float) -> None:
        """Note that this rank has waited for `rank`."""
        if self.waits is None:
            self.waits = {}
        self.waits[rank] = self.waits.get(rank, 0.0) + time.monotonic() - since

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
        started, doomed = time.monotonic(), False
        while (place := window.lagging()) is not None:
            window.sleep(place, _LOOK)
            if window.lagging() is None:
                break
            transport.look()
            absent = [self._rank_at(place) for place in window.missing()]
            if not absent:  # after the look: who leaves has announced before
                break
            failure = self._failure(absent, doomed)
            if failure is not None:
                raise failure.copy() if isinstance(failure, DistError) else failure
            doomed = transport.mailbox.dead is not None
            self._mind(absent)
        if place is not None:
            self._charge(self._rank_at(place), started)

    def _failure(self, absent: Sequence[int], doomed: bool) -> BaseException | None:
        """Why the `absent` will not come. `doomed`: somebody of the group was dead a look ago, whom
        they may be waiting for.
        """
        box = self._transport.mailbox
        gone = [box.lost[rank] for rank in absent if rank in box.lost]
        return box.failure or next(iter(gone), box.dead if doomed else None)

    def _rank_at(self, place: int) -> int:
        """The rank in the group of a rank of the window."""
        return place if self.island is None else self.island.members[place]

    def _mind(self, absent: Sequence[int]) -> None:
        """Look around when this takes long; raise when it takes too long."""
        assert self._memory is not None
        now = time.monotonic()
        if now >= self._deadline:
            for place in self._memory.missing():
                rank, seen = self._rank_at(place), self._memory.seen(place)
                if seen is not None:
                    self._watcher.heard[rank] = max(seen, self._watcher.heard.get(rank, -1))
            raise TransportTimeout(absent[0])
        if now >= self._look_at:
            self._look_around(absent)

    def share(
        self,
        own: Array | None,
        shape: tuple[int, ...],
        like: Array,
        *,
        but: slice = slice(0, 0),
    ) -> list[Array]:
        """Show `own` (at most `HALF` bytes, of that shape; None: nothing) to all ranks.

        `but`: elements of it that no other rank is going to read.

        Returns what each rank shows, as arrays of `shape` and the dtype of `like`, to be read
        before the next call and never written, except by who has it to himself; that of a rank
        that shows nothing is garbage, this rank's is `own` itself. All ranks call it alike.
        """
        window = self._memory
        assert window is not None
        shown = window.next_half_as(shape, like.dtype)
        if own is not None:
            here = window.rank
            if but.stop:
                shown[here][: but.start] = own[: but.start]
                shown[here][but.stop :] = own[but.stop :]
            else:
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
