"""A socket for the length of a block, with the context it is made in; one that a store knows."""

from __future__ import annotations

from contextlib import contextmanager

import zmq

from dtrain.comm import security
from dtrain.comm.store.tcp import StoreServer, TcpStore


@contextmanager
def a_socket(kind=zmq.DEALER):
    context = security.context()
    try:
        yield context, security.open_socket(context, kind)
    finally:
        context.destroy(linger=0)


@contextmanager
def at_a_store():
    """A store's server, a client of it, and a socket that has the store's keys and no address."""
    with (
        StoreServer() as server,
        TcpStore("127.0.0.1", server.port, timeout=10) as client,
        a_socket() as (_, member),
    ):
        yield server, client, member


def join(member, server):
    """Connect a socket to a store's server, as one who may."""
    pair = security.store_keys()
    security.connect(member, server.address, pair.client, pair.server.public)
