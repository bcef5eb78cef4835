"""How the ranks of one host give each other the descriptors of their memory.

Owns: `Offer`, one rank's side of the exchange. Each rank listens on a nameless place (an abstract
unix socket, made in `security`), tells the others its address and a token through the store, and
then both gives its descriptor to everybody who shows the token and takes everybody's. Processes of
other users are refused, by what the kernel says of them.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets
import socket
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from dtrain.comm import security

__all__ = ["Offer"]

_TOKEN_BYTES = 16

# What one stranger may cost: a rank sends its token as soon as it is connected.
_PATIENCE = 1.0


class Offer:
    """A descriptor that other ranks of this host may take. A context manager: leaving it stops
    listening.
    """

    def __init__(self) -> None:
        self._listener = security.listen_nameless()
        self._token = secrets.token_bytes(_TOKEN_BYTES)

    @property
    def address(self) -> bytes:
        """What a peer needs to know, to be told to the ranks of the group alone."""
        return self._token + bytes(self._listener.getsockname())

    def exchange(
        self, descriptor: int, addresses: Sequence[bytes], deadline: float
    ) -> list[tuple[int, int]]:
        """Give `descriptor` to as many ranks as there are `addresses`, and take theirs.

        Returns (descriptor, process id) of each, in order; the descriptors are the caller's to
        close. Blocks until all have come; OSError (TimeoutError) at `deadline`.
        """
        taken: list[tuple[int, int]] = []
        with contextlib.ExitStack() as stack:
            # A connection is there as soon as it waits in the listener's queue, so that nobody
            # needs to accept while everybody connects.
            connections = [stack.enter_context(_connect(a, deadline)) for a in addresses]
            for _ in addresses:
                self._serve(descriptor, deadline)
            try:
                for connection in connections:
                    taken.append(_take(connection, deadline))
            except BaseException:
                for received, _pid in taken:
                    os.close(received)
                raise
        return taken

    def _serve(self, descriptor: int, deadline: float) -> None:
        """Give the descriptor to the next one who shows the token."""
        while True:
            self._listener.settimeout(_left(deadline))
            connection, _ = self._listener.accept()
            with connection, contextlib.suppress(TimeoutError, ConnectionError):
                connection.settimeout(_PATIENCE)
                if not security.same_user(connection):
                    continue
                if hmac.compare_digest(connection.recv(_TOKEN_BYTES), self._token):
                    socket.send_fds(connection, [b"\0"], [descriptor])
                    return

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._listener.close()


def _left(deadline: float) -> float:
    return max(0.001, deadline - time.monotonic())


def _connect(address: bytes, deadline: float) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(_left(deadline))
        connection.connect(address[_TOKEN_BYTES:])
        connection.sendall(address[:_TOKEN_BYTES])
    except BaseException:
        connection.close()
        raise
    return connection


def _take(connection: socket.socket, deadline: float) -> tuple[int, int]:
    connection.settimeout(_left(deadline))
    if not security.same_user(connection):
        raise PermissionError("a process of another user offers shared memory")
    _, descriptors, _, _ = socket.recv_fds(connection, 1, 1)
    if not descriptors:
        raise ConnectionError("a rank closed the connection instead of sharing its memory")
    return descriptors[0], security.process_of(connection)
