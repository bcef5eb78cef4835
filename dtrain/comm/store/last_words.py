"""What a store says for clients that are gone: the last word that each left with its connection.

Owns `LastWords`: which connections of a ROUTER socket are open, and what is to be said when one
breaks. A process that is killed leaves its connections to the kernel, which closes them at once:
nobody has to wait for its silence. Rules: 1. a connection is known by the server's descriptor of
it, which libzmq gives with each message and with each event. 2. Descriptors are used again, so all
events up to now are read before a word is kept. 3. Used by the server's thread alone.
"""

from __future__ import annotations

import zmq
from zmq.utils.monitor import parse_monitor_message

__all__ = ["LastWords"]


class LastWords:
    """The words kept for the connections of `socket`, which nobody else monitors.

    Make it before the socket is bound. `monitor` is readable when `read` has something to do.
    """

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self.monitor = socket.get_monitor_socket(zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED)
        self._open: set[int] = set()
        self._kept: dict[int, list[tuple[str, bytes]]] = {}
        self._due: list[tuple[str, bytes]] = []

    def keep(self, connection: int, key: str, value: bytes) -> None:
        """Say `value` to `key` when that connection breaks; at once, if it is broken already."""
        self.read()
        if connection in self._open:
            self._kept.setdefault(connection, []).append((key, value))
        else:
            self._due.append((key, value))

    def read(self) -> None:
        """Learn which connections were made and broke. Does not block."""
        while self.monitor.poll(0):
            event = parse_monitor_message(self.monitor.recv_multipart())
            if event["event"] == zmq.EVENT_ACCEPTED:
                self._open.add(event["value"])
            else:
                self._open.discard(event["value"])
                self._due += self._kept.pop(event["value"], [])

    def due(self) -> list[tuple[str, bytes]]:
        """The (key, value) of those who are gone, each once."""
        due, self._due = self._due, []
        return due
