"""The gate in front of a listening TCP socket: which keys may enter, and whose they are.

Owns: the server's side of CURVE authentication (ZAP, RFC 27). libzmq asks a gate through a socket
inside the context before it lets a connection finish its handshake, and marks every message of that
connection with the name the gate gave it (`user_of`). Rules: 1. no gate, no entry: a socket behind
a gate that does not answer refuses everybody (ZAP_ENFORCE_DOMAIN with a domain that is not empty;
an empty one would let everybody in). 2. There is one gate per context. 3. Questions that come
before `open` wait; a stranger's question cannot even be put, since it takes the server's public
key, which only those who know the job's secret can have.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from typing import Any

import zmq
from zmq.utils import z85

from dtrain.comm.security.keys import Keys
from dtrain.comm.security.listening import GATE, listen
from dtrain.comm.security.sockets import DOMAIN, protect

__all__ = ["Gate"]

_VERSION = b"1.0"


class Gate:
    """Lets in the keys of a table. Ask `answer` when `socket` is readable, or `open` a thread.

    `refused` counts the keys that were turned away.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], keys: Keys) -> None:
        self.keys = keys
        self.refused = 0
        self.socket = context.socket(zmq.REP)
        self.socket.setsockopt(zmq.LINGER, 0)
        listen(self.socket, GATE)
        self._users: dict[bytes, bytes] = {}
        self._thread: threading.Thread | None = None
        self._stop = -1

    def protect(self, socket: zmq.Socket[bytes]) -> None:
        """Put `socket`, of the same context and not yet bound, behind this gate."""
        protect(socket, self.keys)

    def admit(self, users: Mapping[bytes, str]) -> None:
        """Let in these public keys (Z85), each under the name of its user."""
        self._users = {z85.decode(key): name.encode() for key, name in users.items()}

    def answer(self) -> None:
        """Answer one question; call it when `socket` is readable."""
        _, number, domain, _, _, mechanism, *credentials = self.socket.recv_multipart()
        user = self._users.get(b"".join(credentials))
        if mechanism == b"CURVE" and domain == DOMAIN and user is not None:
            answer = [b"200", b"OK", user, b""]
        else:
            self.refused += 1
            answer = [b"400", b"unknown key", b"", b""]
        self.socket.send_multipart([_VERSION, number, *answer])

    def open(self, users: Mapping[bytes, str]) -> None:
        """`admit`, and answer from now on in a thread of its own, until `close`."""
        self.admit(users)
        self._stop = os.eventfd(0)
        self._thread = threading.Thread(target=self._serve, name="dtrain-gate", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        polled: Any = [(self.socket, zmq.POLLIN), (self._stop, zmq.POLLIN)]
        while not any(ready == self._stop for ready, _ in zmq.zmq_poll(polled, -1)):
            self.answer()

    def close(self) -> None:
        """End the thread; call it before the context is destroyed. Idempotent."""
        if self._thread is not None:
            os.eventfd_write(self._stop, 1)
            self._thread.join()
            os.close(self._stop)
            self._thread = None
