"""Ranks of one host: messages over a unix socket between every two of them, read by who waits.

Owns: the sockets and how they are made. Each rank listens on a nameless place (`security`), tells
the others its address and a token through the store, and gives to every rank before it one end of
a socket pair, and to all the descriptor of the memory that it lends (`lending`). No thread of a
library stands between the ranks. What the kernel's buffers cannot hold moves on while this rank
waits for something. A closed socket whose goodbye was not read is a death; so is the end of the
process, should a child of it still hold the socket.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets
import select
import socket
import struct
import threading
import time
import warnings
from collections import deque
from collections.abc import Sequence

from dtrain.comm import security
from dtrain.comm.store.base import Store
from dtrain.comm.transports import futex
from dtrain.comm.transports.base import Peer, rendezvous, seconds_left
from dtrain.comm.transports.lending import Borrower, Lender
from dtrain.comm.transports.mailbox import Array, as_bytes
from dtrain.comm.transports.pumped import PumpedTransport
from dtrain.comm.transports.window import NOWHERE
from dtrain.errors import DistError, DistNetworkError, PeerLost, TransportTimeout
from dtrain.wire import HEAD, Header, WireError, pack, unpack

__all__ = ["UnixTransport"]

# Kinds of messages. BEGIN: the length of the note (2 bytes), the note, the first bytes of data.
BEGIN, MORE, NEWS, GOODBYE = range(4)

# What one frame carries. The kernel's smallest default buffer (208 KiB) holds one whole.
CHUNK = 128 * 1024
_FRAME = CHUNK + HEAD.size + 2 + 1024

_NOTE = struct.Struct("<H")
_HELLO = struct.Struct("<16sH")  # token, rank

# What ranks that have all met may take to connect.
_MEETING = 10.0
# What one stranger may cost: a rank says who it is as soon as it is connected.
_PATIENCE = 1.0

# How long a socket that is broken may take to be read to its end.
_GRACE = 1.0

_FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL

Parts = Sequence[bytes | memoryview]


class _Link:
    """This rank's end of the connection to another one."""

    def __init__(self, end: socket.socket, memory: Borrower | None) -> None:
        self.socket, self.memory = end, memory
        self.lock = threading.Lock()  # one message at a time, and the backlog
        self.backlog: deque[Parts] = deque()  # what the kernel has no room for


class UnixTransport(PumpedTransport):
    """One rank's end of a group on one host (Linux). `DistNetworkError` where it spans hosts.

    Sending copies into the kernel, or, where that is full, keeps a reference until `flush`.
    """

    name = "unix"

    def __init__(self, store: Store, rank: int, size: int, timeout: float) -> None:
        super().__init__(rank, size)
        self._links: dict[int, _Link] = {}
        self._epoll = select.epoll()
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._bell, select.EPOLLIN)
        self._places: dict[int, int] = {}  # {descriptor of a socket: rank}
        self._ends: dict[int, int] = {}  # {descriptor that tells of a process's end: rank}
        self._lender = _make_lender() if futex.AVAILABLE else None
        self._buffer = bytearray(_FRAME)
        try:
            self._meet(store, timeout)
        except BaseException:
            self._destroy(linger=0.0)
            raise

    # ---- meeting

    def _meet(self, store: Store, timeout: float) -> None:
        token = secrets.token_bytes(16)
        with security.listen_nameless() as listener:
            address = (token + bytes(listener.getsockname())).hex()
            self._peers = rendezvous(store, self.rank, self.size, address, timeout)
            hosts = {peer.host for peer in self._peers}
            if len(hosts) > 1:
                raise DistNetworkError(
                    f"transport 'unix' joins ranks of one host, and they are on {sorted(hosts)}; "
                    "use 'zmq'"
                )
            deadline = time.monotonic() + _MEETING
            with contextlib.ExitStack() as stack:
                # A connection is there as soon as it waits in the listener's queue: nobody needs to
                # accept while everybody connects.
                asked = {
                    r: stack.enter_context(
                        self._ask(bytes.fromhex(self._peers[r].address), deadline)
                    )
                    for r in range(self.rank)
                }
                missing = set(range(self.rank + 1, self.size))
                while missing:
                    listener.settimeout(max(0.001, deadline - time.monotonic()))
                    connection, _ = listener.accept()
                    with connection, contextlib.suppress(TimeoutError, ConnectionError):
                        missing.discard(self._welcome(connection, token))
                for r, connection in asked.items():
                    self._join(r, connection)
        for r, peer in enumerate(self._peers):
            if peer.pid != os.getpid():
                self._watch_process(r, peer.pid)

    def _ask(self, address: bytes, deadline: float) -> socket.socket:
        """A connection to a rank before this one, which was given this one's end of a pair."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(max(0.001, deadline - time.monotonic()))
            connection.connect(address[16:])
            hello = _HELLO.pack(address[:16], self.rank)
            socket.send_fds(connection, [hello], self._lent_file())
        except BaseException:
            connection.close()
            raise
        return connection

    def _welcome(self, connection: socket.socket, token: bytes) -> int:
        """Give a rank that shows the token its end of a pair; its rank, -1 for anybody else."""
        connection.settimeout(_PATIENCE)
        if not security.same_user(connection):
            return -1
        hello, descriptors, _, _ = socket.recv_fds(connection, _HELLO.size, 1)
        shown, rank = _HELLO.unpack(hello.ljust(_HELLO.size, b"\0"))
        if not hmac.compare_digest(shown, token) or not self._expects(rank):
            _close(descriptors)
            return -1
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._add(rank, mine, descriptors)
            socket.send_fds(connection, [b"\0"], [theirs.fileno(), *self._lent_file()])
        return int(rank)

    def _expects(self, rank: int) -> bool:
        return self.rank < rank < self.size and rank not in self._links

    def _join(self, rank: int, connection: socket.socket) -> None:
        if not security.same_user(connection):
            raise PermissionError("a process of another user answers in the place of a rank")
        _, descriptors, _, _ = socket.recv_fds(connection, 1, 2)
        if not descriptors:
            raise ConnectionError(f"rank {rank} closed the connection instead of answering")
        self._add(rank, socket.socket(fileno=descriptors[0]), descriptors[1:])

    def _lent_file(self) -> list[int]:
        return [] if self._lender is None else [self._lender.descriptor]

    def _add(self, rank: int, end: socket.socket, files: list[int]) -> None:
        """Begin to listen to `rank`, whose memory is the file in `files`, if there is one."""
        try:
            self._links[rank] = _Link(end, Borrower(files[0]) if files else None)
        except OSError as error:
            end.close()
            raise DistNetworkError(
                f"cannot map the memory that rank {rank} lends ({error}): is the address space "
                "limited (ulimit -v)? Without such memory: transport 'zmq'"
            ) from error
        finally:
            _close(files)
        self._places[end.fileno()] = rank
        self._epoll.register(end, select.EPOLLIN)

    def _watch_process(self, rank: int, process: int) -> None:
        descriptor = os.pidfd_open(process)
        self._ends[descriptor] = rank
        self._epoll.register(descriptor, select.EPOLLIN)

    def peer(self, rank: int) -> Peer | None:
        return self._peers[rank]

    # ---- memory

    def hand(self, dst: int, array: Array) -> int:
        return NOWHERE if self._lender is None else self._lender.lend(array, dst)

    def take(self, src: int, place: int, nbytes: int) -> Array:
        memory = self._links[src].memory
        if memory is None:
            raise ValueError(f"rank {src} has no memory to lend")
        return memory.borrow(place, nbytes)

    # ---- sending

    def _send(self, dst: int, tag: int, buf: Array, note: bytes) -> None:
        data = as_bytes(buf).data
        first = CHUNK - len(note)
        header = pack(Header(BEGIN, self.rank, tag, buf.nbytes), _NOTE.pack(len(note)) + note)
        parts: list[Parts] = [(header, data[:first])]
        for start in range(first, buf.nbytes, CHUNK):
            header = pack(Header(MORE, self.rank, tag, buf.nbytes))
            parts.append((header, data[start : start + CHUNK]))
        self._emit(dst, parts)

    def _tell(self, dst: int, body: bytes) -> None:
        if len(body) > CHUNK:
            raise ValueError(f"a control message has at most {CHUNK} bytes, got {len(body)}")
        self._emit(dst, [(pack(Header(NEWS, self.rank), body),)])

    def _emit(self, dst: int, frames: Sequence[Parts]) -> None:
        if dst in self.mailbox.lost:
            raise self.mailbox.lost[dst].copy()
        if dst not in self._links:
            raise PeerLost(dst, how="it is not connected to this rank")
        link = self._links[dst]
        try:
            with link.lock:
                for i, parts in enumerate(frames):
                    if link.backlog or not self._write(link, parts):
                        if not link.backlog:
                            self._epoll.modify(link.socket, select.EPOLLIN | select.EPOLLOUT)
                        link.backlog.extend(frames[i:])
                        return
        except (BrokenPipeError, ConnectionError):
            raise self._loss_of(dst) from None

    def _write(self, link: _Link, parts: Parts) -> bool:
        """Whether the kernel took the frame (it takes all or nothing)."""
        try:
            link.socket.sendmsg(parts, (), _FLAGS)
        except BlockingIOError:
            return False
        return True

    def _write_backlog(self, rank: int) -> None:
        link = self._links[rank]
        with link.lock:
            try:
                while link.backlog and self._write(link, link.backlog[0]):
                    link.backlog.popleft()
            except (BrokenPipeError, ConnectionError):
                link.backlog.clear()
            if not link.backlog:
                self._epoll.modify(link.socket, select.EPOLLIN)
        if not link.backlog:
            self.mailbox.touch()

    def _loss_of(self, peer: int) -> DistError:
        """Read to the end what `peer`, who has closed its end, has sent: was there a goodbye?"""
        return self._await_loss(peer, _GRACE)

    def flush(self, deadline: float) -> None:
        while (dst := self._unwritten()) is not None:
            self.check_usable()
            if time.monotonic() >= deadline:
                raise TransportTimeout(dst)
            self._advance(self.mailbox.version, min(deadline, time.monotonic() + _PATIENCE))
            if dst in self.mailbox.lost:
                raise self.mailbox.lost[dst].copy()
        if self._lender is not None:
            self._lender.collect()

    def _unwritten(self) -> int | None:
        """A rank for which there is a backlog."""
        return next((r for r, link in self._links.items() if link.backlog), None)

    # ---- receiving

    def _watch(self, src: int) -> None:
        """Nothing to do: all are connected."""

    def _pump(self, deadline: float) -> None:
        for descriptor, event in self._epoll.poll(seconds_left(deadline)):
            self._heed(descriptor, event)

    def _heed(self, descriptor: int, event: int) -> None:
        rank = self._places.get(descriptor)
        if rank is not None:
            if event & select.EPOLLOUT:
                self._write_backlog(rank)
            if event & ~select.EPOLLOUT:
                self._receive(rank)
        elif descriptor == self._bell:
            os.eventfd_read(self._bell)
            self.mailbox.touch()
        elif descriptor in self._ends:
            self._outlive(descriptor)

    def _receive(self, rank: int) -> bool:
        """Take in one frame; whether there was one."""
        try:
            length = self._links[rank].socket.recv_into(self._buffer, 0, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except (
            ConnectionResetError
        ):  # closed with messages of ours unread; there may be some of its
            return True
        if length == 0:
            self._lose(rank)
            return False
        try:
            self._deliver(rank, memoryview(self._buffer)[:length])
        except WireError as error:  # what comes after it cannot be understood either
            self.distrust(rank, error)
            self._forget(rank)
        return True

    def _deliver(self, rank: int, frame: memoryview) -> None:
        (header, _), body = unpack(bytes(frame[: HEAD.size])), frame[HEAD.size :]
        kind, _, tag, nbytes, _ = header
        if kind == NEWS:
            self.mailbox.add_news(rank, bytes(body))
        elif kind == BEGIN:
            (length,) = _NOTE.unpack_from(body)
            note, data = bytes(body[2 : 2 + length]), body[2 + length :]
            self.mailbox.begin(rank, tag, note, nbytes, bytearray(data))
        elif kind == MORE:
            self.mailbox.write(rank, bytearray(body))
        elif kind == GOODBYE:
            self.mailbox.lose(rank, PeerLost(rank, orderly=True))
        else:
            raise WireError(f"a message of unknown kind {kind}")

    def _outlive(self, descriptor: int) -> None:
        """The process of a rank has ended: all that it sent is here."""
        rank = self._ends.pop(descriptor)
        os.close(descriptor)
        while rank in self._places.values() and self._receive(rank):
            pass
        self._lose(rank)
        if self._lender is not None:  # not before: who has only left may use what it borrowed
            self._lender.forget(rank)

    def _lose(self, rank: int) -> None:
        self.mailbox.lose(rank, PeerLost(rank))
        self._forget(rank)

    def _forget(self, rank: int) -> None:
        """Listen to `rank` no more."""
        link = self._links[rank]
        if self._places.pop(link.socket.fileno(), None) is not None:
            self._epoll.unregister(link.socket)
        with link.lock:
            link.backlog.clear()

    def _wake(self) -> None:
        os.eventfd_write(self._bell, 1)

    # ---- the end

    def close(self, timeout: float = 1.0) -> None:
        if not self._leave():
            return
        goodbye = (pack(Header(GOODBYE, self.rank)),)
        for rank in list(self._links):
            with contextlib.suppress(PeerLost):  # it needs none
                self._emit(rank, [goodbye])
        deadline = time.monotonic() + timeout
        while self._unwritten() is not None and time.monotonic() < deadline:
            self._pump(min(deadline, time.monotonic() + _GRACE / 10))
        self._destroy(linger=0.0)

    def _destroy(self, linger: float) -> None:
        for link in self._links.values():
            link.socket.close()
        self._epoll.close()
        _close([self._bell, *self._ends])
        self._ends.clear()
        if self._lender is not None:
            self._lender.close()


def _make_lender() -> Lender | None:
    try:
        return Lender()
    except OSError as error:
        warnings.warn(
            f"no memory to share with other ranks of this host ({error}): arrays are sent to them,"
            " which is slower",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def _close(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
