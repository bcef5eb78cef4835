"""What a transport does, how ranks meet to make one, and the registry of names.

Owns: the `Transport` protocol and all of it that does not depend on the medium: receiving, waiting,
counting. Rules: 1. messages between two ranks arrive in the order sent, per tag; nothing is ever
dropped. 2. `send` never waits for the receiver; `flush` waits until sent arrays may be changed
again. 3. Several threads may receive at once; sends to one peer are serialised inside the
transport. 4. A rank that dies is noticed by everyone who waits for it or talks to it (`PeerLost`);
one that closes says goodbye.
"""

from __future__ import annotations

import importlib
import logging
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dtrain.comm.store.base import Store
from dtrain.comm.topology import host_id
from dtrain.comm.transports.island import Island
from dtrain.comm.transports.mailbox import ANY_SOURCE, Accept, Array, Mailbox, Receive
from dtrain.comm.transports.window import NOWHERE, Window
from dtrain.errors import DistError, ForkedProcessError, PeerLost, TransportTimeout
from dtrain.wire import dumps, loads

__all__ = [
    "ANY_SOURCE",
    "Factory",
    "Peer",
    "Transport",
    "create",
    "known",
    "register",
    "rendezvous",
    "seconds_left",
]


# How long a message may take that was sent before a third rank died.
_UNDER_WAY = 0.03

_log = logging.getLogger("dtrain.comm")

# How many forks lie between the first process and this one; cheaper to compare than the process id.
_forks = 0


def _count_fork() -> None:
    global _forks
    _forks += 1


os.register_at_fork(after_in_child=_count_fork)


def seconds_left(deadline: float) -> float:
    """How long a wait may last until it looks again: until the deadline, and never beyond what a
    lock can wait.
    """
    return max(0.0, min(deadline - time.monotonic(), 3600.0))


@dataclass(frozen=True, slots=True)
class Peer:
    """What a rank tells the others about itself."""

    host: str
    pid: int
    address: str

    @property
    def host_name(self) -> str:
        """The host as people call it."""
        return self.host.partition("/")[0]


def rendezvous(store: Store, rank: int, size: int, address: str, timeout: float) -> list[Peer]:
    """Exchange addresses and host ids: one `gather`.

    Every rank gets the same list, in rank order.
    """
    mine = dumps([host_id(), os.getpid(), address])
    values = store.gather("transport", rank, size, mine, timeout)
    return [Peer(*loads(value)) for value in values]


class Transport(ABC):
    """Ordered, reliable messages between the ranks of one group.

    `messages_sent` and `bytes_sent` count what `send` was asked to send (not chunks, not control
    messages). `on_news(source, body)` is called for each body a peer passed to `tell`, in a thread
    that waits in this transport.
    """

    name = "?"
    # Memory that all ranks of the group share, where the medium has it.
    window: Window | None = None
    # The ranks of this host, where the group spans hosts and each of them has memory to share.
    island: Island | None = None
    # Memory that the ranks of this host share: the one or the other's.
    memory: Window | None = None

    # Who can share an array with this rank (`lend`, `borrow`), itself too; none: nobody.
    neighbours: Sequence[int] = ()
    shares = 0  # how many arrays have been shared so far

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.peers = [r for r in range(size) if r != rank]
        self.mailbox = Mailbox(size)
        self.messages_sent = 0
        self.bytes_sent = 0
        self.closed = False
        self.on_news: Callable[[int, bytes], None] = lambda source, body: None
        self._owner, self._forks = os.getpid(), _forks

    # ---- arrays that neighbours share

    def lend(self, nbytes: int) -> int:
        """Set aside memory for all neighbours; returns the place by which they `borrow` it, or
        `NOWHERE` (and warns) when there is no more.

        It is used again when all of them have let go of it.
        """
        raise NotImplementedError(f"the {self.name} transport has no memory to share")

    def borrow(self, rank: int, place: int, nbytes: int) -> Array:
        """The bytes at `place` of the neighbour `rank`, lent just now."""
        raise NotImplementedError(f"the {self.name} transport has no memory to share")

    # ---- arrays handed to one rank

    def hand(self, dst: int, array: Array) -> int:
        """Copy the C-contiguous `array` to where rank `dst` can `take` it from; the place, or
        `NOWHERE`: send it, there is no memory to share with that rank.
        """
        return NOWHERE

    def take(self, src: int, place: int, nbytes: int) -> Array:
        """The bytes that `src` has handed over at `place`, to be taken once; ValueError for none.

        They are this rank's until the last view is gone.
        """
        raise ValueError(f"the {self.name} transport has no memory to share")

    # ---- what each medium brings

    @abstractmethod
    def _send(self, dst: int, tag: int, buf: Array, note: bytes) -> None:
        """Hand `buf` to the medium."""

    @abstractmethod
    def _tell(self, dst: int, body: bytes) -> None:
        """Hand a control message to the medium."""

    @abstractmethod
    def _advance(self, version: int, deadline: float) -> None:
        """Return when the mailbox is not at `version` any more, or at the deadline."""

    @abstractmethod
    def _watch(self, src: int) -> None:
        """Make sure that the death of `src` (or of anybody) will be noticed while waiting."""

    @abstractmethod
    def _wake(self) -> None:
        """Interrupt a thread that is blocked in the medium itself."""

    @abstractmethod
    def flush(self, deadline: float) -> None:
        """Wait until every array given to `send` may be changed.

        Raises `PeerLost`, `TransportTimeout`.
        """

    @abstractmethod
    def close(self, timeout: float = 1.0) -> None:
        """Say goodbye and give everything back; what was sent still arrives.

        Idempotent, bounded by `timeout`.
        """

    @abstractmethod
    def abandon(self) -> None:
        """Leave without goodbye: to the others this rank has died. For tests of just that."""

    # ---- the same for all

    def send(self, dst: int, tag: int, buf: Array, note: bytes = b"") -> None:
        """Send the C-contiguous `buf` (zero bytes are a message too); `note` travels with its first
        frame.

        Does not wait. `buf` must not change before `flush`. Raises `PeerLost` if `dst` is known to
        be gone.
        """
        self.check_usable()
        self._check_peer(dst)
        self._send(dst, tag, buf, note)
        self.messages_sent += 1
        self.bytes_sent += buf.nbytes

    def post(self, src: int, tag: int, out: Array | int, accept: Accept | None = None) -> Receive:
        """Start to receive into the C-contiguous `out`, or that many bytes into memory that comes
        with the message (`Receive.data`); does not wait. `src` may be `ANY_SOURCE`.

        `accept(source, note, nbytes)` may raise to refuse the message before `out` is touched.
        """
        self.check_usable()
        if src != ANY_SOURCE:
            self._check_peer(src)
        receive = Receive(src, tag, out, accept)
        self.mailbox.post(receive)
        return receive

    def wait(self, receive: Receive, deadline: float, *, together: bool = False) -> int:
        """Wait for a posted receive; returns the rank it came from.

        `together`: all ranks take part in this call. When one of them is seen to die, it fails,
        whomever this rank is waiting for, who may be waiting for somebody who never comes.

        `deadline` is in `time.monotonic()` seconds. Raises `TransportTimeout` (the receive stays
        posted), `PeerLost`, or whatever made the receive fail.
        """
        if not receive.done:
            self._watch(receive.src)
            box = self.mailbox
            if not self.wait_until(
                lambda: receive.done or (together and box.dead is not None), deadline
            ):
                raise TransportTimeout(None if receive.src == ANY_SOURCE else receive.src)
            if not receive.done and not self._comes_after_all(receive):
                assert box.dead is not None
                raise box.dead.copy()
        if receive.error is not None:
            error = receive.error
            raise error.copy() if isinstance(error, DistError) else error
        return receive.source

    def _comes_after_all(self, receive: Receive) -> bool:
        """Whether what is waited for comes although another rank is dead: it was under way."""
        return self.wait_until(lambda: receive.done, time.monotonic() + _UNDER_WAY)

    def recv_into(
        self, src: int, tag: int, out: Array, deadline: float, accept: Accept | None = None
    ) -> int:
        """`post` and `wait` in one."""
        return self.wait(self.post(src, tag, out, accept), deadline)

    def wait_until(self, condition: Callable[[], bool], deadline: float) -> bool:
        """Move messages and news until `condition()`; False when the deadline came first."""
        expired = False
        while True:
            version = self.mailbox.version
            while (news := self.mailbox.take_news()) is not None:
                self.on_news(*news)
            if condition():
                return True
            if expired:
                return False
            self.check_usable()
            expired = time.monotonic() >= deadline  # one more look, which does not wait
            self._advance(version, deadline)

    def tell(self, dst: int, body: bytes) -> None:
        """Give `body` to `on_news` of `dst`, ahead of nothing sent before; raises `PeerLost`."""
        self.check_usable()
        self._check_peer(dst)
        self._tell(dst, body)

    def fail(self, error: BaseException) -> None:
        """Wake every waiting thread with `error`; receives fail from now on."""
        self.mailbox.fail(error)
        self._wake()

    def peer(self, rank: int) -> Peer | None:
        """Which process `rank` is; None where all ranks are threads of this one."""
        return None

    def distrust(self, src: int, error: Exception) -> None:
        """Take `src` for lost: what it sent is `error`, and what follows would be no better."""
        _log.warning("rank %d hears no more of rank %d: %s", self.rank, src, error)
        self.mailbox.lose(src, PeerLost(src))

    def look(self) -> None:
        """Take in what has arrived, news and deaths too, without waiting.

        For those who wait somewhere else than in this transport.
        """
        self._watch(ANY_SOURCE)
        self.take_in()

    def take_in(self) -> None:
        """As `look`, without a connection to those that this rank has never talked to."""
        version = -1
        while version != self.mailbox.version:
            version = self.mailbox.version
            self.wait_until(lambda: False, 0.0)

    @property
    def runs_aside(self) -> bool:
        """Whether a queued call can run beside what this rank computes meanwhile.

        Messages do: ZeroMQ's threads and the network carry them. Through a window all is copied and
        added by the ranks' own cores: it does when there are two for each rank.
        """
        return self.window is None or len(os.sched_getaffinity(0)) >= 2 * self.size

    def check_usable(self) -> None:
        """Raise in a forked child (`ForkedProcessError`) and after `close` (`PeerLost`)."""
        if self._forks != _forks:
            raise ForkedProcessError(f"the {self.name} transport of rank {self.rank}", self._owner)
        if self.closed:
            raise PeerLost(self.rank, where="this transport", orderly=True)

    def _check_peer(self, peer: int) -> None:
        if not 0 <= peer < self.size or peer == self.rank:
            raise ValueError(
                f"rank {self.rank} cannot exchange messages with rank {peer}: expected another rank"
                f" of range({self.size})"
            )


Factory = Callable[[Store, int, int, float], Transport]

# {name: factory, or "module:attribute" of one that is imported when it is first asked for}
_factories: dict[str, Factory | str] = {
    "local": "dtrain.comm.transports.local:LocalTransport",
    "shm": "dtrain.comm.transports.shm:ShmTransport",
    "tcp": "dtrain.comm.transports.zmq:TcpTransport",
    "unix": "dtrain.comm.transports.unix:UnixTransport",
    "zmq": "dtrain.comm.transports.zmq:ZmqTransport",
}


def register(name: str, factory: Factory) -> None:
    """Make `factory(store, rank, size, timeout)` known as a transport called `name`."""
    _factories[name] = factory


def known() -> list[str]:
    """The names of all transports."""
    return sorted(_factories)


def create(name: str, store: Store, rank: int, size: int, timeout: float) -> Transport:
    """Make this rank's end of transport `name`.

    Waits up to `timeout` seconds for all `size` ranks.
    """
    if name not in _factories:
        raise ValueError(f"unknown transport {name!r} (known: {', '.join(known())})")
    factory = _factories[name]
    if isinstance(factory, str):
        module, attribute = factory.split(":")
        factory = getattr(importlib.import_module(module), attribute)
    assert callable(factory)
    return factory(store, rank, size, timeout)
