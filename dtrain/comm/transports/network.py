"""Meeting peers over a network: one TCP inbox per rank, its keys, their addresses and keys.

Owns: `Network`, made by all ranks of a group together with one gather. Rules: 1. a rank's key is
drawn for this group, and told to the others through the store, which is authenticated; the gate of
the inbox admits the keys of this group's ranks and nobody else. 2. Who sent a message is whom its
connection's key belongs to, whatever the message says. 3. A job may ask for plain text
(DTRAIN_DATA_PLANE): then there are no keys, on private addresses only, and one line says so.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

import zmq

from dtrain import env
from dtrain.comm import security
from dtrain.comm.security.addresses import local_address
from dtrain.comm.store.base import Store
from dtrain.errors import DistNetworkError
from dtrain.wire import dumps, loads

__all__ = ["Network", "own_address"]

_log = logging.getLogger("dtrain.comm")


class _Peer(NamedTuple):
    """Where a rank is reached, and the key it proves itself with (empty: plain text)."""

    address: str
    key: bytes


def own_address(store: Store, *, far: bool) -> str:
    """The address at which peers reach this rank: DTRAIN_LOCAL_ADDR, else the one by which it
    reaches the store.

    Without a store on the network, 127.0.0.1 unless some peer is `far` (`DistNetworkError`).
    """
    told, host = env.local_addr(), store.network_host()
    if told is not None or host is not None:
        return told or local_address(str(host))
    if far:
        raise DistNetworkError(
            "the ranks are on several hosts and their store is not on a network, which would show"
            " by which address this host is reached: set DTRAIN_LOCAL_ADDR on each host"
        )
    return "127.0.0.1"


class Network:
    """The network side of one rank, in `context`; `inbox` is to be read, `close` ends it.

    Waits up to `timeout` seconds for all ranks. `refused` counts messages whose sender was not whom
    they named.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        store: Store,
        rank: int,
        size: int,
        timeout: float,
        where: str,
    ) -> None:
        self.rank = rank
        self.refused = 0
        # No limit: a queue that is full stops the heartbeats, and a rank that is busy for longer
        # than they may fail would be taken for dead.
        self.inbox = security.open_socket(context, zmq.DEALER, receive_limit=0)
        self._keys = None if env.data_plane() == "plaintext" else security.fresh_keys()
        self._gate = None if self._keys is None else security.Gate(context, self._keys)
        if self._gate is not None:
            self._gate.protect(self.inbox)
        address = security.listen(self.inbox, where, plain=self._keys is None).address
        mine = dumps([address, b"" if self._keys is None else self._keys.public])
        told = store.gather("network", rank, size, mine, timeout)
        self._peers = [_Peer(*loads(value)) for value in told]
        self._check_agreement()
        if self._gate is not None:
            self._gate.open({peer.key: str(r) for r, peer in enumerate(self._peers)})

    def _check_agreement(self) -> None:
        plain = [r for r, peer in enumerate(self._peers) if not peer.key]
        if plain and len(plain) < len(self._peers):
            raise DistNetworkError(
                f"ranks {plain} have DTRAIN_DATA_PLANE=plaintext and the others have not: give all"
                " nodes the same (dtrun --data-plane)"
            )
        if plain and self.rank == 0:
            _log.warning("the ranks exchange tensors in plain text, as --data-plane asks for")

    def address_of(self, peer: int) -> str:
        """Where `peer` is connected to."""
        return self._peers[peer].address

    def connect(self, outbox: zmq.Socket[bytes], peer: int) -> None:
        """Connect `outbox` to the inbox of `peer`, which must prove to be it."""
        security.connect(outbox, self._peers[peer].address, self._keys, self._peers[peer].key)

    def is_from(self, frame: zmq.Frame, src: int) -> bool:
        """Whether `frame` of the inbox comes from rank `src`; one that does not is counted."""
        if self._gate is None:
            return True
        user = security.user_of(frame)
        if user == str(src):
            return True
        self.refused += 1
        if self.refused == 1:
            what = "rank %d refused a message of rank %s that names rank %d as its sender"
            _log.warning(f"{what}; it counts further ones in silence", self.rank, user, src)
        return False

    def close(self) -> None:
        """End what answers at the gate; before the context is destroyed."""
        if self._gate is not None:
            self._gate.close()
