"""Ranks as processes (or threads): messages over unix sockets on one host, over TCP between hosts.

Owns: two sockets per rank. `inbox` (DEALER, bound) takes what everybody sends; `outbox` (ROUTER,
connecting) has one connection per peer, made when the peer is first talked to or waited for. Its
monitor sees connections break. A message is [header + note | first chunk] and, if longer than a
chunk, further [header | chunk] messages. Where ranks are on several hosts each has a second inbox
(`Network`) for those on others.

[Note: how a death is told from a goodbye] A rank that closes sends GOODBYE behind everything else
to every peer, waits until that is written, and only then closes its inbox. Everybody who waits for
a rank holds a connection to its inbox. So a connection that breaks, or is refused, means: the
goodbye is here, or will be read within `GRACE` (both are in this host's kernel; between hosts they
travel on two connections, hence `FAR_GRACE`), or there is none, and the peer has died.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import threading
import time
from collections import deque
from typing import Any, Protocol

import zmq
from zmq.utils.monitor import parse_monitor_message

from dtrain.comm import security
from dtrain.comm.security.addresses import endpoint
from dtrain.comm.store.base import Store
from dtrain.comm.topology import host_id
from dtrain.comm.transports.base import Peer, rendezvous, seconds_left
from dtrain.comm.transports.mailbox import ANY_SOURCE, Array, as_bytes
from dtrain.comm.transports.network import Network, own_address
from dtrain.comm.transports.pumped import PumpedTransport
from dtrain.errors import DistError, PeerLost, TransportTimeout
from dtrain.processes import ENDED, STOPPED, state_of
from dtrain.wire import CHUNK, Header, WireError, pack, unpack

__all__ = ["TcpTransport", "Unreachable", "ZmqTransport"]

# Kinds of messages. INLINE carries note and payload behind its header, DATA and MORE in a second
# frame; STRANGE is no message of ours; PARTED says that the sender takes the receiver for lost.
INLINE, DATA, MORE, NEWS, GOODBYE, WAKE, STRANGE, PARTED = range(8)

GRACE, FAR_GRACE = 0.2, 0.5
# As soon as its process has ended, all that it ever sent is in this host's kernel.
_GRACE_ENDED = 0.03
_SUSPECT_LOOK = 0.005

# One short frame costs less than two.
_INLINE_BELOW = 8 * 1024

# pyzmq copies shorter frames faster than it can hand over a reference, which its thread takes back:
# an all_reduce of 200 KB takes 620 us instead of 830 when its 100 KB are copied.
_COPY_BELOW = 256 * 1024

# How often a close looks whether its goodbyes are written, and what it then gives the kernel to
# take the last of them. (A linger alone would take its whole time whenever a connection breaks
# meanwhile.)
_CLOSE_LOOK = 0.002
_LAST_WRITE = 0.02

# What the tracker of a frame may take after its receiver has left.
_PARTING = 1.0

# How often a flush that has to wait looks whether the peer is still there.
_FLUSH_LOOK = 0.05

_log = logging.getLogger("dtrain.comm")

# Plain numbers: operations on pyzmq's enums cost microseconds.
_IN, _MORE, _NOW = int(zmq.POLLIN), int(zmq.SNDMORE), int(zmq.DONTWAIT)


class Unreachable(Exception):
    """The connection to this peer has broken; whether it died is not known yet."""


class Door(Protocol):
    """How ranks of other hosts come in: what a transport wants of `Network` and its like."""

    @property
    def inbox(self) -> zmq.Socket[bytes]: ...

    def connect(self, outbox: zmq.Socket[bytes], peer: int) -> None: ...

    def is_from(self, frame: zmq.Frame, src: int) -> bool: ...

    def close(self) -> None: ...


class ZmqTransport(PumpedTransport):
    """One rank's end of a group over ZeroMQ.

    `where` is "ipc" (the default: unix sockets among ranks of one host, TCP between hosts), "tcp"
    for TCP among all, or "tcp://HOST" to say by which address. Sending is zero-copy for arrays of
    256 KiB and more; receiving copies once, from the socket's frame to where the array belongs, or
    not at all where the receiver takes the frame.
    """

    name = "zmq"

    def __init__(
        self, store: Store, rank: int, size: int, timeout: float, *, where: str = "ipc"
    ) -> None:
        super().__init__(rank, size)
        self._listener: security.Listener | None = None
        self._network: Door | None = None
        self.ignored = 0
        # Two contexts, because they end at different times: first all is sent, then the inbox goes.
        self._in_context, self._out_context = security.context(), security.context()
        try:
            self._open(store, where, timeout)
        except BaseException:
            self._destroy(linger=0.0)
            raise

    def _open(self, store: Store, where: str, timeout: float) -> None:
        listener = self._open_sockets()
        self._peers = dict(
            enumerate(rendezvous(store, self.rank, self.size, listener.address, timeout))
        )
        addresses = [peer.address for peer in self._peers.values()]
        self._rank_at = {address: r for r, address in enumerate(addresses)}
        self._join_network(store, where, timeout)
        self._job = _job_of(addresses)

    def _open_sockets(self) -> security.Listener:
        """What needs no peers; returns where those of this host reach the inbox."""
        self._inbox = security.open_socket(self._in_context, zmq.DEALER)
        self._listener = security.listen(self._inbox)
        self._outbox = security.open_socket(self._out_context, zmq.ROUTER)
        self._monitor = self._outbox.get_monitor_socket(security.BROKEN)
        self._polled = [(self._inbox, _IN), (self._monitor, _IN)]  # in this order
        self._connected: set[int] = set()
        self._out_lock = threading.Lock()  # guards the outbox and `_connected`
        self._in_flight: deque[tuple[int, zmq.MessageTracker]] = deque()  # (destination, tracker)
        self._suspects: dict[int, float] = {}  # {peer whose connection broke: when}
        return self._listener

    def peer(self, rank: int) -> Peer | None:
        return self._peers[rank]

    def _join_network(self, store: Store, where: str, timeout: float) -> None:
        """Open a second inbox if there are peers that unix sockets do not reach, or shall not."""
        abroad = [r for r in self.peers if self._peers[r].host != host_id()]
        self._far = set(abroad if where == "ipc" else self.peers)
        if not self._far:
            return
        if where in ("ipc", "tcp"):
            where = endpoint(own_address(store, far=bool(abroad)), 0)
        network = Network(self._in_context, store, self.rank, self.size, timeout, where)
        self._network = network
        self._rank_at |= {network.address_of(r): r for r in self._far}
        self._polled.insert(1, (network.inbox, _IN))

    # ---- sending

    def _send(self, dst: int, tag: int, buf: Array, note: bytes) -> None:
        try:
            if buf.nbytes < _INLINE_BELOW:
                header = Header(INLINE, self.rank, tag, buf.nbytes, self._job)
                self._emit(dst, pack(header, note + as_bytes(buf).tobytes()))
            else:
                self._send_chunks(dst, tag, as_bytes(buf), note)
        except Unreachable:
            raise self._loss_of(dst) from None

    def _send_chunks(self, dst: int, tag: int, data: Array, note: bytes) -> None:
        with self._out_lock:  # for all chunks: they must not mix with those of another message
            for start in range(0, data.nbytes, CHUNK):
                kind, extra = (MORE, b"") if start else (DATA, note)
                head = pack(Header(kind, self.rank, tag, data.nbytes, self._job), extra)
                chunk = data[start : start + CHUNK].data
                self._push(dst, head, _MORE)
                if data.nbytes < _COPY_BELOW:
                    self._outbox.send(chunk)
                else:
                    frame = zmq.Frame(chunk, track=True, copy=False, copy_threshold=0)
                    self._outbox.send(frame, copy=False)
                    self._in_flight.append((dst, frame.tracker))

    def _tell(self, dst: int, body: bytes) -> None:
        try:
            self._emit(dst, pack(Header(NEWS, self.rank, job=self._job), body))
        except Unreachable:
            raise self._loss_of(dst) from None

    def _emit(self, dst: int, frame: bytes | zmq.Frame) -> None:
        with self._out_lock:
            self._push(dst, frame, 0)

    def _push(self, dst: int, frame: bytes | zmq.Frame, flags: int) -> None:
        """Begin a message to `dst`; with `_out_lock` held."""
        if dst in self.mailbox.lost:
            raise self.mailbox.lost[dst].copy()
        self._connect(dst)
        try:
            self._outbox.send(b"r%d" % dst, _MORE)
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            raise Unreachable from None
        self._outbox.send(frame, flags, copy=type(frame) is bytes)

    def _connect(self, peer: int) -> None:
        if peer not in self._connected:
            self._dial(peer, b"r%d" % peer)
            self._connected.add(peer)

    def _dial(self, peer: int, routing_id: bytes) -> None:
        self._outbox.setsockopt(zmq.CONNECT_ROUTING_ID, routing_id)
        if self._network is not None and peer in self._far:
            self._network.connect(self._outbox, peer)
        else:
            security.connect(self._outbox, self._peers[peer].address)

    def _part(self, peer: int) -> None:
        """Tell `peer`, which is lost to this rank but may live, over a new connection: it would
        wait for what never comes. If it is dead, nobody hears it.
        """
        with self._out_lock, contextlib.suppress(zmq.ZMQError):  # dead
            self._dial(peer, b"p%d" % peer)
            self._outbox.send(b"p%d" % peer, _MORE)
            self._outbox.send(pack(Header(PARTED, self.rank, job=self._job)))

    def _loss_of(self, peer: int) -> DistError:
        """Wait until it is known whether `peer`, whose connection broke, died or said goodbye."""
        self._suspects.setdefault(peer, time.monotonic())
        return self._await_loss(peer, 5 * GRACE)

    def flush(self, deadline: float) -> None:
        while self._in_flight:
            self.check_usable()
            dst, tracker = item = self._in_flight[0]
            if not tracker.done:
                self._await_tracker(dst, tracker, deadline)
            with self._out_lock:
                if self._in_flight and self._in_flight[0] is item:
                    self._in_flight.popleft()

    def _await_tracker(self, dst: int, tracker: zmq.MessageTracker, deadline: float) -> None:
        while True:
            left = deadline - time.monotonic()
            try:
                tracker.wait(max(0.0, min(left, _FLUSH_LOOK)))
            except zmq.NotDone:
                # The tracker of a frame for a dead peer may never come: look for news of the peer.
                self._watch(dst)
                self.wait_until(lambda: True, 0.0)
                self._advance(self.mailbox.version, 0.0)
            else:
                return
            loss = self.mailbox.lost.get(dst)
            if loss is not None and not (loss.orderly and _comes(tracker)):
                raise loss.copy()
            if self.mailbox.failure is not None:
                raise self.mailbox.failure
            if left <= 0:
                raise TransportTimeout(dst)

    # ---- receiving

    def _watch(self, src: int) -> None:
        wanted = self.peers if src == ANY_SOURCE else (src,)
        missing = [r for r in wanted if r not in self._connected]
        if missing:
            with self._out_lock:
                for peer in missing:
                    self._connect(peer)

    def _pump(self, deadline: float) -> None:
        """Wait for one message, or for a connection to break."""
        until = min(deadline, time.monotonic() + _SUSPECT_LOOK) if self._suspects else deadline
        patience = math.ceil(seconds_left(until) * 1000)
        ready = zmq.zmq_poll(self._polled, patience)
        if not ready:
            self._judge()
        elif ready[0][0] is not self._monitor:
            self._receive(ready[0][0])
        else:  # only when the inboxes are empty: a goodbye comes first
            self._note_break()

    def _receive(self, inbox: Any) -> None:
        """Take one message out of an inbox."""
        network = self._network if inbox is not self._inbox else None
        try:
            frame = inbox.recv(_NOW, copy=network is None)
        except zmq.Again:  # what is there is not a message, but whose messages will come
            return
        head = frame if network is None else frame.bytes
        try:
            header, body = unpack(head)
        except WireError:
            header, body = Header(STRANGE), b""
        chunk = None
        if header.kind in (DATA, MORE, STRANGE):
            while inbox.getsockopt(zmq.RCVMORE):
                chunk = inbox.recv(_NOW, copy=False).buffer
        if network is not None and not network.is_from(frame, header.src):
            return
        if header.job != self._job or not 0 <= header.src < self.size:
            self._ignore()
            return
        try:
            self._deliver(header, body, chunk)
        except WireError as error:  # what comes after it cannot be understood either
            self.distrust(header.src, error)

    def _ignore(self) -> None:
        """Count a message that is none, or of another group; the first is worth a line."""
        self.ignored += 1
        if self.ignored == 1:
            what = "rank %d ignored a message that does not belong to its job, and counts others"
            _log.warning(what, self.rank)

    def _deliver(self, header: Header, body: bytes, chunk: memoryview | None) -> None:
        kind, src, tag, nbytes, _ = header
        if kind == INLINE:
            cut = len(body) - nbytes
            if cut < 0:
                raise WireError(f"{nbytes} bytes were announced, {len(body)} came")
            self.mailbox.begin(src, tag, body[:cut], nbytes, body[cut:])
        elif kind == DATA:
            if chunk is None:
                raise WireError("a message without its data")
            self.mailbox.begin(src, tag, body, nbytes, chunk)
        elif kind == MORE:
            if chunk is None:
                raise WireError("a chunk without data")
            self.mailbox.write(src, chunk)
        elif kind == NEWS:
            self.mailbox.add_news(src, body)
        elif kind == GOODBYE:
            self._suspects.pop(src, None)
            self.mailbox.lose(src, PeerLost(src, orderly=True))
        elif kind == PARTED:
            how = "the connection between them broke, and it takes this rank for lost"
            self.mailbox.lose(src, PeerLost(src, how=how))
        elif kind == WAKE:
            self.mailbox.touch()
        else:
            raise WireError(f"a message of unknown kind {kind}")

    def _note_break(self) -> None:
        event = parse_monitor_message(self._monitor.recv_multipart(_NOW))
        peer = self._rank_at[event["endpoint"].decode()]
        if peer not in self.mailbox.lost:
            self._suspects.setdefault(peer, time.monotonic())

    def _judge(self) -> None:
        """Declare dead the suspects that have not said goodbye in time."""
        now = time.monotonic()
        for peer, since in list(self._suspects.items()):
            if now >= since + self._grace(peer):
                self._suspects.pop(peer, None)
                self.mailbox.lose(peer, PeerLost(peer))
                if peer in self._far:
                    self._part(peer)

    def _grace(self, rank: int) -> float:
        """How long a goodbye may take to be read after the connection broke."""
        peer = self._peers[rank]
        if peer.host != host_id():
            return FAR_GRACE
        if peer.pid == self._owner:
            return GRACE
        state = state_of(peer.pid)
        return 0.0 if state in STOPPED else _GRACE_ENDED if state == ENDED else GRACE

    def _wake(self) -> None:
        if self._pumping:
            self._emit(self.rank, pack(Header(WAKE, self.rank, job=self._job)))

    # ---- the end

    def close(self, timeout: float = 1.0) -> None:
        if not self._leave():
            return
        deadline = time.monotonic() + timeout
        said = {peer: self._say_goodbye(peer) for peer in self.peers}
        while self._unwritten(said) and time.monotonic() < deadline:
            self._pump(time.monotonic() + _CLOSE_LOOK)
        self._destroy(_LAST_WRITE)
        for peer, loss in self.mailbox.lost.items():
            if not loss.orderly and self._peers[peer].host == host_id():
                security.remove_leftover(self._peers[peer].address)

    def _unwritten(self, said: dict[int, zmq.MessageTracker | None]) -> bool:
        """Whether a goodbye is on its way to a peer that is still there."""
        gone = self.mailbox.lost.keys() | self._suspects.keys()
        return any(t is not None and not t.done and peer not in gone for peer, t in said.items())

    def _say_goodbye(self, peer: int) -> zmq.MessageTracker | None:
        """The tracker of a goodbye, done when it is written; None if nobody is there."""
        frame = zmq.Frame(
            pack(Header(GOODBYE, self.rank, job=self._job)),
            track=True,
            copy=False,
            copy_threshold=0,
        )
        # Unreachable or lost: gone already, nobody is left to be told.
        with contextlib.suppress(Unreachable, PeerLost):
            self._emit(peer, frame)
            tracker: zmq.MessageTracker | None = frame.tracker
            return tracker
        return None

    def _destroy(self, linger: float) -> None:
        self._out_context.destroy(linger=round(linger * 1000))
        if self._network is not None:
            self._network.close()
        self._in_context.destroy(linger=0)
        if self._listener is not None:
            self._listener.remove()


class TcpTransport(ZmqTransport):
    """As `ZmqTransport`, over TCP among all ranks, even those of one host: to measure and test."""

    name = "tcp"

    def __init__(self, store: Store, rank: int, size: int, timeout: float) -> None:
        super().__init__(store, rank, size, timeout, where="tcp")


def _comes(tracker: zmq.MessageTracker) -> bool:
    """Whether the frame of a peer that has left in good order is let go soon.

    It may have got all that it waited for, and have left, before pyzmq's thread told the tracker.
    """
    with contextlib.suppress(zmq.NotDone):
        tracker.wait(_PARTING)
        return True
    return False


def _job_of(addresses: list[str]) -> int:
    """A number that only ranks of one group share: their addresses are fresh and random."""
    digest = hashlib.sha256("\n".join(addresses).encode()).digest()
    return int.from_bytes(digest[:8], "little")
