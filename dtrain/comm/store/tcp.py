"""A store served over TCP by one rank (or by the launcher) to all others.

Owns: `StoreServer`, one thread around a ROUTER socket and a `Table`; `TcpStore`, its client. Rules:
1. a command that has to wait is parked in the server until it can be answered or its time is over:
nobody polls, and every command is one round trip. 2. Requests and replies are msgpack. 3. The
server lives until it is closed. 4. Both ends prove that they know the job's secret before a byte is
read; the thread that serves also answers at the gate.
"""

from __future__ import annotations

import itertools
import math
import os
import socket
import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import zmq
from zmq.utils.monitor import parse_monitor_message

from dtrain.comm import security
from dtrain.comm.security.addresses import endpoint
from dtrain.comm.store.base import (
    DEFAULT_TIMEOUT,
    MUTATING,
    NotYet,
    Store,
    Table,
    Timeout,
    timed_out,
)
from dtrain.comm.store.last_words import LastWords
from dtrain.errors import (
    DistError,
    DistNetworkError,
    DistStoreError,
    ForkedProcessError,
    StoreTimeout,
    from_wire,
    to_wire,
)
from dtrain.wire import Header, dumps, loads, pack, unpack

__all__ = ["StoreServer", "TcpStore"]

_REQUEST, _RESULT, _ERROR = range(3)

# Room for what encryption adds to a frame.
_LONGEST_MESSAGE = security.MAX_STORE_FRAME - 4096
_LONGEST = 1e6  # seconds that a command may wait: a poll counts milliseconds in 31 bits

# A client gives the server this much longer than the command's own timeout to answer that it has
# passed.
_ANSWER_TIME = 2.0


@dataclass(slots=True)
class _Parked:
    """A command that waits in the server."""

    client: bytes
    number: int
    command: str
    args: list[Any]
    timeout: float
    deadline: float


class StoreServer:
    """Serves a store on `host`:`port` (0 takes a free port, see `address`, `port`) until `close`.

    `listen_fd` is a socket that listens already. Clients are those that know the job's secret.
    Raises `SecretError`, `DistNetworkError`.
    """

    def __init__(
        self, host: str = "127.0.0.1", port: int = 0, *, listen_fd: int | None = None
    ) -> None:
        keys = security.store_keys()
        self._context = security.context()
        self._socket = security.open_socket(
            self._context, zmq.ROUTER, max_frame=security.MAX_STORE_FRAME, receive_limit=1000
        )
        try:
            if listen_fd is not None:
                host, port = _bound_to(listen_fd)
            self._gate = security.Gate(self._context, keys.server)
            self._gate.admit({keys.client.public: "client"})
            self._gate.protect(self._socket)
            self._last_words = LastWords(self._socket)
            where = endpoint(host, port)
            self.address = security.listen(self._socket, where, listen_fd=listen_fd).address
        except BaseException:
            self._context.destroy(linger=0)
            raise
        self.port = int(self.address.rpartition(":")[2])
        self._table = Table()
        self._parked: list[_Parked] = []
        self._stop_read, self._stop_write = os.pipe()
        self._owner = os.getpid()
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="dtrain-store", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop serving; clients that wait see the connection break.

        Idempotent, waits for the thread.
        """
        if self._closed or os.getpid() != self._owner:
            return
        self._closed = True
        os.write(self._stop_write, b"x")
        self._thread.join()
        self._context.destroy(linger=100)
        os.close(self._stop_read)
        os.close(self._stop_write)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _serve(self) -> None:
        gate, events = self._gate.socket, self._last_words.monitor
        sockets: Any = [(s, zmq.POLLIN) for s in (self._socket, gate, events, self._stop_read)]
        while True:
            ready: list[Any] = [s for s, _ in zmq.zmq_poll(sockets, self._patience())]
            if self._stop_read in ready:
                return
            if gate in ready:
                self._gate.answer()
            if self._socket in ready and (request := self._take()):
                client, *frames = request
                connection = int(frames[-1].get(zmq.SRCFD))
                self._handle(client.bytes, b"".join(f.bytes for f in frames), connection)
            if events in ready:
                self._last_words.read()
            for key, value in self._last_words.due():
                self._table.do("queue_push", [key, value])
                self._retry_parked()
            self._expire()

    def _take(self) -> list[zmq.Frame]:
        """The next request, or nothing: a new connection's credentials alone wake us too."""
        try:
            return self._socket.recv_multipart(zmq.DONTWAIT, copy=False)
        except zmq.Again:
            return []

    def _patience(self) -> int:
        """Milliseconds until the first parked command has to be answered; -1: none is parked."""
        if not self._parked:
            return -1
        first = min(parked.deadline for parked in self._parked)
        return max(0, math.ceil((first - time.monotonic()) * 1000))

    def _handle(self, client: bytes, frame: bytes, connection: int) -> None:
        number = 0
        try:
            header, body = unpack(frame)
            number = header.tag
            command, args, timeout = loads(body)
            timeout = min(float(timeout), _LONGEST)
            if not timeout >= 0 or type(command) is not str:
                raise ValueError(f"{command!r} with a timeout of {timeout} s")
            if command == "gather":
                key, rank, size, value = args
                joined = self._table.do("join", [key, rank, size, value])
                self._retry_parked()
                command, args = "collect", [key, joined, rank]
            if command == "last_word":
                key, value = args
                self._last_words.keep(connection, str(key), bytes(value))
                self._reply(client, number, _RESULT, True)
                return
            parked = _Parked(client, number, command, args, timeout, time.monotonic() + timeout)
        except Exception as error:  # whatever a client sends, the server goes on and says what
            self._refuse(client, number, error)
            return
        if not self._try(parked):
            self._parked.append(parked)
        elif command in MUTATING:
            self._retry_parked()

    def _try(self, request: _Parked, *, last: bool = False) -> bool:
        """Answer `request` if that is possible now; if it is the `last` time, with its timeout."""
        try:
            try:
                result = self._table.do(request.command, request.args)
            except NotYet as waiting:
                if not last:
                    return False
                raise timed_out(waiting, request.timeout) from None
        except Exception as error:
            self._refuse(request.client, request.number, error)
        else:
            self._reply(request.client, request.number, _RESULT, result)
        return True

    def _retry_parked(self) -> None:
        self._parked = [parked for parked in self._parked if not self._try(parked)]

    def _expire(self) -> None:
        now = time.monotonic()
        for late in [parked for parked in self._parked if parked.deadline <= now]:
            self._parked.remove(late)
            self._try(late, last=True)

    def _refuse(self, client: bytes, number: int, error: Exception) -> None:
        self._reply(client, number, _ERROR, to_wire(_as_store_error(error)))

    def _reply(self, client: bytes, number: int, kind: int, value: Any) -> None:
        try:
            frame = _framed(Header(kind, tag=number), value)
        except Exception as error:  # too long, or nested more deeply than it may be sent
            frame = _framed(Header(_ERROR, tag=number), to_wire(_as_store_error(error)))
        try:
            self._socket.send_multipart([client, frame])
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:  # a client that has gone needs no answer
                raise


def _bound_to(listen_fd: int) -> tuple[str, int]:
    """The address on which a socket listens; ValueError when it does not."""
    with socket.socket(fileno=os.dup(listen_fd)) as given:
        if not given.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise ValueError(f"file descriptor {listen_fd} is not a socket that listens")
        host, port = given.getsockname()[:2]
        return str(host), int(port)


def _framed(header: Header, value: Any) -> bytes:
    """A message; DistStoreError when it is longer than the other end takes."""
    frame = pack(header, dumps(value))
    if len(frame) > _LONGEST_MESSAGE:
        raise DistStoreError(
            f"a message of the store has at most {_LONGEST_MESSAGE:,} bytes, this one would have"
            f" {len(frame):,}: keep large values somewhere else"
        )
    return frame


def _as_store_error(error: Exception) -> DistStoreError:
    return error if isinstance(error, DistStoreError) else DistStoreError(f"bad request: {error}")


class TcpStore(Store):
    """A client of the store at `host`:`port`; with `is_master` it serves that store as well.

    A master may give port 0 and read the real one from `port`. A client may start before its
    master: calls wait for it up to their timeout. `close` of the master ends the store for
    everybody, so it closes last.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        is_master: bool = False,
        timeout: Timeout = DEFAULT_TIMEOUT,
        listen_fd: int | None = None,
    ) -> None:
        super().__init__(timeout)
        self._server = StoreServer(host, port, listen_fd=listen_fd) if is_master else None
        self.host, self.port = host, self._server.port if self._server else port
        self._address = endpoint(host, self.port)
        self._keys = security.store_keys()
        self._context = security.context()
        self._owner = os.getpid()
        self._numbers = itertools.count(1)
        self._idle: list[_Line] = []  # lines that no thread uses
        self._held: list[_Line] = []  # lines that are there to break when this process ends
        self._closed = False
        self._lock = threading.Lock()  # guards the three above

    def _call(self, command: str, args: list[Any], timeout: float) -> Any:
        line = self._take_line()
        try:
            result = line.ask(next(self._numbers), [command, args, timeout], timeout)
        except DistStoreError as error:
            # A line with an unanswered question cannot be used again; one with an answer can.
            self._return_line(line, reusable=line.answered)
            raise error from None
        except BaseException:
            self._return_line(line, reusable=False)
            raise
        self._return_line(line, reusable=True)
        return result

    def _gather(self, key: str, rank: int, size: int, value: bytes, timeout: float) -> list[bytes]:
        return list(self._call("gather", [key, rank, size, value], timeout))

    def _take_line(self) -> _Line:
        if os.getpid() != self._owner:
            raise ForkedProcessError(f"the store client of {self._address}", self._owner)
        with self._lock:
            if self._closed:
                raise DistStoreError(f"the store client of {self._address} is closed")
            if self._idle:
                return self._idle.pop()
            return _Line(self._context, self._address, self._keys)

    def _return_line(self, line: _Line, *, reusable: bool) -> None:
        with self._lock:
            if reusable and not self._closed:
                self._idle.append(line)
            else:
                line.close()

    def leave_last_word(self, key: str, value: bytes) -> None:
        """Have `value` put at the end of the queue `key` when this process ends, or is unreachable.

        The server does it as soon as a connection that is kept for that breaks: at once when the
        process ends, however it does, and at `close`; after `security.HEARTBEAT` when the network
        is lost. Waits for the server's answer up to the timeout, as the other calls.
        """
        line, kept = self._take_line(), False
        try:
            request = ["last_word", [key, value], self._patience]
            kept = bool(line.ask(next(self._numbers), request, self._patience))
        finally:
            if not kept:
                self._return_line(line, reusable=False)
        with self._lock:
            self._held.append(line)

    def clone(self) -> TcpStore:
        """One more client; the server stays with this one if it is the master."""
        return type(self)(self.host, self.port, timeout=self.timeout)

    def network_host(self) -> str | None:
        """The host that was given."""
        return self.host

    def close(self) -> None:
        """Close the connections and, on the master, the server.

        Call it when no thread waits in this store.
        """
        with self._lock:
            if self._closed or os.getpid() != self._owner:
                return
            self._closed = True
        self._context.destroy(linger=0)
        if self._server is not None:
            self._server.close()


class _Line:
    """One connection to the server, used by one thread at a time."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], address: str, keys: security.StoreKeys
    ) -> None:
        self.address = address
        self.answered = True
        self._socket = security.open_socket(
            context, zmq.DEALER, max_frame=security.MAX_STORE_FRAME, reconnect=True
        )
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED | security.REFUSED)
        try:
            security.connect(self._socket, address, keys.client, keys.server.public)
        except zmq.ZMQError as error:
            self.close()
            raise DistNetworkError(f"cannot connect to {address}: {error.strerror}") from error

    def ask(self, number: int, request: list[Any], timeout: float) -> Any:
        """Send one request and wait for its answer."""
        frame = _framed(Header(_REQUEST, tag=number), request)
        self.answered = False
        try:
            self._socket.send(frame, zmq.DONTWAIT)  # its queue is never full
        except zmq.Again:  # there is none any more: what is there does not speak as a store does
            raise self._unknown() from None
        patience = math.ceil((timeout + _ANSWER_TIME) * 1000)
        ready = dict(
            zmq.zmq_poll([(self._socket, zmq.POLLIN), (self._monitor, zmq.POLLIN)], patience)
        )
        if self._socket in ready:
            return self._read(number)
        if self._monitor in ready:
            raise self._broken()
        why = f"no answer from the store at {self.address} to {request[0]!r} for"
        first = request[1][0] if request[1] else []
        raise StoreTimeout(timeout, first if isinstance(first, list) else [first], why=why)

    def _broken(self) -> DistStoreError:
        event = parse_monitor_message(self._monitor.recv_multipart())["event"]
        if event & security.REFUSED:
            return self._unknown()
        return DistStoreError(f"the store at {self.address} has closed the connection")

    def _unknown(self) -> DistStoreError:
        return DistStoreError(
            f"who listens at {self.address} and this process do not know each other: it is not"
            " a store of this job, or one of the two has another secret, run id, attempt or"
            " version of dtrain. Ranks on several hosts need the same secret: dtrun keygen >"
            " FILE, then dtrun --secret-file FILE on each (DTRAIN_SECRET_FILE without dtrun)"
        )

    def _read(self, number: int) -> Any:
        header, body = unpack(self._socket.recv())
        assert header.tag == number
        self.answered = True
        value = loads(body)
        if header.kind == _ERROR:
            error: DistError = from_wire(value)
            raise error
        return value

    def close(self) -> None:
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close(0)
