"""How the ranks of a group come to the same error.

Owns: what is known of the other ranks' calls (`Report`), the search for a mismatch, the words of a
failure (`explain`) and its telling. Called by the group when a call starts and when it fails, and
by the transport when news arrive.

[Note: how a mismatch is found] A rank finds out in one of three ways, none of which costs a message
while all is well: 1. the fingerprint in the first message of a peer differs from its own call; 2. a
peer has waited for `STALL` seconds and tells everybody what it waits in, and that differs (two
ranks that both wait to receive would never see 1); 3. it starts a call for which such a report is
already here. It then tells everybody its own call, which makes the others find out in the same way,
and waits up to `SETTLE` seconds for all calls to be known. So all ranks see the same table of calls
and raise the same error. The result is told once more, for ranks that have gone on to a later call.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from dtrain.comm.blame import explained
from dtrain.comm.channel import read_note
from dtrain.comm.record import POINT_TO_POINT, RING, CallRecord, Recorder
from dtrain.comm.transports.base import Transport
from dtrain.comm.vigil import Vigil
from dtrain.comm.witness import whereabouts
from dtrain.errors import (
    CollectiveMismatch,
    CollectiveTimeout,
    DistError,
    GroupAborted,
    PeerLost,
    TransportTimeout,
    WrongSize,
    from_wire,
    to_wire,
)
from dtrain.wire import dumps, loads

__all__ = ["STALL", "Agreement", "Disturbed"]

# Long against any collective that goes well on one host, short against the second within which a
# mismatch is told.
STALL = 0.2
SETTLE = 0.5

# Of how many absent ranks a report tells the stacks.
_WITNESSED = 4


class Disturbed(Exception):
    """Call `seq` of this rank is not what another rank called under this number."""

    def __init__(self, seq: int) -> None:
        super().__init__(seq)
        self.seq = seq


@dataclass(frozen=True, slots=True)
class Report:
    """What a rank called under a sequence number. `told`: by itself, with its last calls."""

    signature: str
    site: str
    last: list[str] = field(default_factory=list)
    told: bool = False


class Agreement:
    """The knowledge of one rank about the calls of the others."""

    def __init__(
        self, group: str, transport: Transport, recorder: Recorder, stall_after: float
    ) -> None:
        self._group = group
        self._transport = transport
        self._recorder = recorder
        self._stall_after = stall_after
        self._lock = threading.Lock()
        self._reports: defaultdict[int, dict[int, Report]] = defaultdict(dict)  # {seq: {rank: ..}}
        self._announced: set[int] = set()
        self.heard: dict[int, int] = {}  # {rank: highest seq it has started}
        self._told: DistError | None = None  # the failure that another rank told first
        self._left: dict[int, str] = {}  # {rank: why it left in good order, when it said so}
        transport.on_news = self._on_news

    def enter(self, record: CallRecord) -> None:
        """A call starts; raises `Disturbed` if somebody is known to have called something else."""
        with self._lock:
            if not self._reports:
                return
            for seq in [s for s in self._reports if s < record.seq - RING]:
                del self._reports[seq]
            self._announced = {s for s in self._announced if s >= record.seq - RING}
            others = self._reports.get(record.seq, {}).values()
        if any(report.signature != record.signature for report in others):
            raise Disturbed(record.seq)

    def inspect(self, record: CallRecord, source: int, note: bytes, nbytes: int) -> None:
        """Compare the fingerprint in the first message of `source` with the call of this rank."""
        signature, site = read_note(note)
        if signature != record.signature:
            with self._lock:
                self._reports[record.seq].setdefault(source, Report(signature, site))
            raise Disturbed(record.seq)

    def disturb(self, record: CallRecord) -> None:
        """Another rank has shown that it called something else, without saying what."""
        raise Disturbed(record.seq)

    def vigil(self, record: CallRecord) -> Vigil:
        """What looks around while this rank waits long in `record`; it tells everybody, first."""
        return Vigil(
            self._transport,
            partial(self.announce, record),
            partial(self._plight, record),
            record.begun + self._stall_after,
            logging.INFO if record.patient else logging.WARNING,
        )

    def _plight(self, record: CallRecord, absent: Sequence[int]) -> str:
        """Who waits where, for whom, and what these do."""
        waiting = self._waiting(record.seq)
        seconds = time.monotonic() - record.begun
        also = f"; {_ranks(waiting)} in it as well" if waiting else ""
        first = (
            f"{record} at {record.site}: rank {self._transport.rank} has waited {seconds:.1f} s for"
            f" {_ranks(absent)}{also}"
        )
        return "\n    ".join([first, *self._witness(self._away(record.seq, absent))])

    def _away(self, seq: int | None, absent: Sequence[int]) -> list[int]:
        """Who keeps this rank waiting in call `seq`: the `absent`, or those these may wait for."""
        if seq is None or seq == POINT_TO_POINT:
            return list(absent)
        waiting = self._waiting(seq)
        unheard = [r for r in self._transport.peers if self.heard.get(r, -1) < seq]
        return [r for r in dict.fromkeys([*absent, *unheard]) if r not in waiting] or list(absent)

    def _waiting(self, seq: int) -> list[int]:
        """Who has told that it waits in this call."""
        with self._lock:
            return sorted(r for r, report in self._reports.get(seq, {}).items() if report.told)

    def _witness(self, ranks: Sequence[int]) -> list[str]:
        """What these ranks do."""
        lines = []
        for rank in ranks[:_WITNESSED]:
            peer = self._transport.peer(rank)
            lines += whereabouts(self._group, rank, peer, self._whereabouts(rank))
        left = len(ranks) - _WITNESSED
        return [*lines, f"and {left} more ranks"] if left > 0 else lines

    def announce(self, record: CallRecord) -> None:
        """Tell everybody, once, what this rank called under this number."""
        if record.seq == POINT_TO_POINT:
            return  # which only two ranks know of
        with self._lock:
            if record.seq in self._announced:
                return
            self._announced.add(record.seq)
        last = self._recorder.last()
        self._tell(["call", record.seq, record.signature, record.site, last])

    def tell_failure(self, error: BaseException) -> None:
        """Tell everybody why this group has failed; of an error that is not ours, whose it was."""
        if not isinstance(error, DistError):
            rank, what = self._transport.rank, f"{type(error).__name__}: {error}"
            error = GroupAborted(f"group {self._group!r}: rank {rank} failed: {what}", rank=rank)
        self._tell(["fail", to_wire(error)])

    def tell_leave(self, reason: str) -> None:
        """Tell everybody why this rank is about to leave."""
        self._tell(["leave", reason])

    def _tell(self, news: list[object]) -> None:
        body = dumps(news)
        for peer in range(self._transport.size):
            if peer == self._transport.rank:
                continue
            try:
                self._transport.tell(peer, body)
            except PeerLost:
                continue  # it is about a failure: a rank that is gone needs no telling

    def _on_news(self, source: int, body: bytes) -> None:
        try:
            self._take(source, *loads(body))
        except (TypeError, ValueError) as error:  # not what a member of the group sends
            self._transport.distrust(source, error)

    def _take(self, source: int, what: str, *rest: Any) -> None:
        if what == "fail":
            self._told = self._told or from_wire(rest[0])
            self._transport.fail(self._told)
        elif what == "leave":
            (self._left[source],) = rest
        else:
            self._hear(source, *rest)

    def _hear(self, source: int, seq: int, signature: str, site: str, last: list[str]) -> None:
        self.heard[source] = max(seq, self.heard.get(source, -1))
        with self._lock:
            self._reports[seq][source] = Report(signature, site, last, told=True)
        mine = self._recorder.find(seq)
        if mine is not None and mine.signature != signature:
            self.announce(mine)
            self._transport.fail(Disturbed(seq))

    def explain(
        self, error: BaseException, where: str, seq: int | None, timeout: float
    ) -> BaseException:
        """The error to raise for what ended call `seq`: with all that is known of who caused it.

        What another rank has told goes before what this one has seen.
        """
        if isinstance(error, Disturbed):
            return self._settle(error.seq)
        told = self._catch_up()
        if told is not None and isinstance(error, DistError):
            return told
        if isinstance(error, TransportTimeout):
            return self._timeout(where, seq, error.rank, timeout)
        if isinstance(error, PeerLost):
            peer, reason = self._transport.peer(error.rank), self._left.get(error.rank, "")
            loss = explained(error, self._group, peer, reason)
            # Somebody who was told the reason may have left: the reason is what counts.
            found = self._catch_up() or loss
            found.add_note(f"while this rank was in {where}")
            return found
        if isinstance(error, WrongSize):
            return CollectiveMismatch(
                f"{where}: rank {error.rank} sent {error.got} bytes where rank"
                f" {self._transport.rank} expects {error.expected}. All ranks must agree on the"
                " sizes.",
                group=self._group,
                seq=seq,
                calls=[],
            )
        return error

    def _catch_up(self) -> DistError | None:
        """The failure that another rank has told, after a look at all news that are here."""
        with contextlib.suppress(PeerLost):  # this rank itself has closed: nothing more comes
            self._transport.take_in()
        return self._told

    def _settle(self, seq: int) -> DistError:
        """The error of a mismatch, once all calls are known; at most `SETTLE` seconds."""
        mine = self._recorder.find(seq)
        assert mine is not None
        self.announce(mine)
        with contextlib.suppress(PeerLost):  # this rank itself is closing: tell what is known
            self._transport.wait_until(lambda: self._known(seq), time.monotonic() + SETTLE)
        return self._told or self._mismatch(mine)

    def _known(self, seq: int) -> bool:
        if self._told is not None:
            return True
        with self._lock:
            reports = self._reports[seq].values()
            return len(reports) == self._transport.size - 1 and all(r.told for r in reports)

    def _mismatch(self, mine: CallRecord) -> CollectiveMismatch:
        with self._lock:
            reports = dict(self._reports[mine.seq])
        reports[self._transport.rank] = Report(mine.signature, mine.site, self._recorder.last())
        ranks = sorted(reports)
        one = ranks[0]
        other = next(r for r in ranks if reports[r].signature != reports[one].signature)
        lines = [
            f"group {self._group!r} #{mine.seq}: rank {one} called {reports[one].signature}"
            f" but rank {other} called {reports[other].signature}.",
            "All ranks must issue the same collectives in the same order.",
            *(f"rank {r} called {reports[r].signature} at {reports[r].site}" for r in ranks),
            *(f"last calls of rank {r}: {'; '.join(reports[r].last)}" for r in (one, other)),
        ]
        calls = [[r, reports[r].signature, reports[r].site] for r in ranks]
        return CollectiveMismatch(
            "\n    ".join(lines), group=self._group, seq=mine.seq, calls=calls
        )

    def _timeout(self, where: str, seq: int | None, rank: int | None, timeout: float) -> DistError:
        """The error of a call that waited for `rank` in vain, with what is known of that rank.

        Ranks that give up at the same time raise the same one: the lowest of them words it.
        """
        waiting = [] if seq is None else self._waiting(seq)
        if waiting and waiting[0] < self._transport.rank:
            self._transport.wait_until(lambda: self._told is not None, time.monotonic() + SETTLE)
            if self._told is not None:
                return self._told
        peer = "any rank" if rank is None else f"rank {rank}"
        known = "" if rank is None else f" ({self._whereabouts(rank)})"
        away = self._away(seq, self._transport.peers if rank is None else [rank])
        first = f"{where}: no data from {peer} for {timeout:.1f} s{known}."
        return CollectiveTimeout(
            "\n    ".join([first, *self._witness(away)]),
            group=self._group,
            seq=seq,
            rank=rank,
            timeout=timeout,
        )

    def _whereabouts(self, rank: int) -> str:
        seq = self.heard.get(rank)
        if seq is None:
            return "it has not been heard from in this group"
        with self._lock:
            report = self._reports.get(seq, {}).get(rank)
        if report is not None:
            return f"it waits in #{seq} {report.signature} at {report.site}"
        return f"it last took part in #{seq}"


def _ranks(ranks: Sequence[int]) -> str:
    numbers = ", ".join(map(str, ranks))
    return f"rank {numbers}" if len(ranks) == 1 else f"ranks {numbers}"
