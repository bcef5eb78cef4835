"""A group over several hosts that ranks join and leave: `ZmqTransport` with a door that stays open.

Owns: `OpenZmqTransport`, encrypted TCP between every two of its ranks, those of one host too.
Rules: 1. who joins connects to all that are there; each of those connects back, and then says so.
2. Who has the secret of the run is let in (`member_keys`), nobody else can finish a handshake;
which rank a member is it says itself. 3. A rank proves to be whom the store says by the key on its
card. 4. Ranks are numbers that are used once: who comes back is somebody new.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping

import zmq

from dtrain import env
from dtrain.comm import security
from dtrain.comm.security.addresses import endpoint
from dtrain.comm.store.base import Store
from dtrain.comm.topology import host_id
from dtrain.comm.transports.base import Peer
from dtrain.comm.transports.network import own_address
from dtrain.comm.transports.unix_open import MOST
from dtrain.comm.transports.zmq import Unreachable, ZmqTransport
from dtrain.errors import DistNetworkError, PeerLost
from dtrain.wire import Header, WireError, dumps, loads, pack

__all__ = ["OpenZmqTransport"]

# Kinds of messages beyond those of `zmq`: here is my card; I have connected to you.
HELLO, WELCOME = 16, 17

# All ranks of the world that a store knows are of one job.
_JOB = 1

# What a rank that is there may take to let one in that joins: it may be stopped.
_PATIENCE = 10.0
_LOOK = 0.1


class _Door:
    """The inbox of one rank on the network, and the cards of the others: (address, key)."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], where: str) -> None:
        self.inbox = security.open_socket(context, zmq.DEALER, receive_limit=0)
        plain = env.data_plane() == "plaintext"
        self._member = None if plain else security.member_keys()
        keys = None if plain else security.fresh_keys()
        self._gate = None if keys is None else security.Gate(context, keys)
        if self._gate is not None:
            self._gate.protect(self.inbox)
        self.address = security.listen(self.inbox, where, plain=plain).address
        self.key = b"" if keys is None else keys.public
        self._cards: dict[int, tuple[str, bytes]] = {}
        if self._gate is not None and self._member is not None:
            self._gate.open({self._member.public: "member"})

    def note(self, rank: int, address: str, key: bytes) -> None:
        """Where `rank` is reached; `DistNetworkError` where one of us is in plain text."""
        if bool(key) != bool(self.key):
            raise DistNetworkError(
                f"of this rank and rank {rank} one has DTRAIN_DATA_PLANE=plaintext and the other"
                " has not: give all workers the same"
            )
        self._cards[rank] = address, key

    def connect(self, outbox: zmq.Socket[bytes], peer: int) -> None:
        """Connect `outbox` to the inbox of `peer`, which must prove to be it."""
        address, key = self._cards[peer]
        security.connect(outbox, address, self._member, key)

    def is_from(self, frame: zmq.Frame, src: int) -> bool:
        """True: whoever is let in is a member."""
        return True

    def close(self) -> None:
        """End what answers at the gate; before the context is destroyed."""
        if self._gate is not None:
            self._gate.close()


class OpenZmqTransport(ZmqTransport):
    """Rank `rank`, alone at first. `address` is for the eyes of those who may join.

    `store` shows by which address this host is reached, unless DTRAIN_LOCAL_ADDR does.
    `SecretError` without a usable secret.
    """

    name = "tcp"

    def __init__(self, store: Store, rank: int) -> None:
        self._welcomed: set[int] = set()
        super().__init__(store, rank, MOST, 0.0)
        self.peers = []

    def _open(self, store: Store, where: str, timeout: float) -> None:
        own = self._open_sockets().address
        self._peers = {self.rank: Peer(host_id(), os.getpid(), own)}
        self._far, self._rank_at, self._job = set(), {own: self.rank}, _JOB
        self._network = door = _Door(self._in_context, endpoint(own_address(store, far=True), 0))
        self._polled.insert(1, (door.inbox, int(zmq.POLLIN)))
        self._door = door
        self.address = dumps([host_id(), os.getpid(), door.address, door.key])

    def _know(self, rank: int, card: bytes) -> None:
        try:
            host, process, address, key = loads(card)
            self._door.note(rank, address, key)
        except (WireError, TypeError, ValueError) as error:
            raise WireError(f"no card of a rank: {error}") from None
        self._peers[rank] = Peer(host, process, address)
        self._rank_at[address] = rank
        self._far.add(rank)

    def reach(self, addresses: Mapping[int, bytes]) -> set[int]:
        """Connect to ranks, all at once, and return those who are still there; `addresses` in the
        order in which they joined. Blocks until these have let us in.

        TimeoutError when one does not within 10 s. For before messages are listened to.
        """
        # In the order of joining: an address is used again when its rank is gone.
        newest = {loads(card)[2]: rank for rank, card in addresses.items()}
        newest.pop(self._door.address, None)
        asked = set(newest.values())
        for rank in asked:
            self._know(rank, addresses[rank])
            self._say(rank, HELLO, self.address)
        deadline = time.monotonic() + _PATIENCE
        while missing := asked - self._welcomed - self.mailbox.lost.keys():
            if time.monotonic() >= deadline:
                raise TimeoutError(
                    f"ranks {sorted(missing)} have not let rank {self.rank} in within {_PATIENCE:g}"
                    " s: they are stopped, or their hosts cannot reach this one"
                )
            self._advance(self.mailbox.version, min(deadline, time.monotonic() + _LOOK))
        return asked - self.mailbox.lost.keys()

    def _deliver(self, header: Header, body: bytes, chunk: memoryview | None) -> None:
        rank = header.src
        if header.kind == HELLO:
            self._welcome(rank, body)
        elif rank not in self._peers:
            self._ignore()  # it has not said who it is
        elif header.kind == WELCOME:
            self._let_in(rank)
        else:
            super()._deliver(header, body, chunk)

    def _welcome(self, rank: int, card: bytes) -> None:
        if rank in self._peers:
            raise WireError("it says twice who it is")
        try:
            self._know(rank, card)
        except (WireError, DistNetworkError):
            self._ignore()
            return
        self._let_in(rank)
        self._say(rank, WELCOME)

    def _say(self, rank: int, kind: int, body: bytes = b"") -> None:
        with contextlib.suppress(PeerLost):  # then it is known
            try:
                self._emit(rank, pack(Header(kind, self.rank, job=self._job), body))
            except Unreachable:
                self._suspects.setdefault(rank, time.monotonic())

    def _let_in(self, rank: int) -> None:
        self.peers.append(rank)
        self._welcomed.add(rank)
        self.mailbox.touch()

    def _connect(self, peer: int) -> None:
        if peer not in self._peers:
            raise PeerLost(peer, how="it is not connected to this rank")
        super()._connect(peer)
