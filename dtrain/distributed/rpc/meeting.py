"""How workers meet, before the first call: who they are, and what carries their messages.

Rules: 1. they meet in the store of the process group if there is one, else where `init_method`
says. 2. A world is open when nothing says its size: no argument, no process group, no WORLD_SIZE,
no query of the URL. Rank 0, by argument or by RANK, serves its store. 3. All workers decide alike
what carries their messages, by what all have told.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from urllib.parse import parse_qs, urlparse

from dtrain.comm.security.addresses import resolve
from dtrain.comm.store.base import Store
from dtrain.comm.store.prefix import PrefixStore
from dtrain.comm.topology import host_id
from dtrain.comm.transports.base import create
from dtrain.comm.transports.unix_open import MOST, OpenUnixTransport
from dtrain.comm.transports.zmq_open import OpenZmqTransport
from dtrain.distributed.backend import transport_for
from dtrain.distributed.rendezvous import rendezvous
from dtrain.distributed.rpc.agent import Agent
from dtrain.distributed.rpc.line import Line
from dtrain.distributed.rpc.members import Board, Members
from dtrain.distributed.rpc.options import RpcBackendOptions
from dtrain.distributed.world import current_world
from dtrain.wire import dumps, loads

__all__ = ["meet"]

# How long it may take.
_MEETING = 300.0


def meet(name: str, rank: int, size: int | None, options: RpcBackendOptions, code: bool) -> Agent:
    """The agent of this worker, when all are there (in an open world: when it is known)."""
    if size is None and _is_open(options.init_method):
        store, owned = _meeting_place(options.init_method, rank), True
        make = partial(_join, store, name, rank, options, code)
    else:
        store, rank, size, owned = _meet(options, rank, size)
        make = partial(_agent, store, name, rank, size, options, code)
    try:
        agent = make()
    except BaseException:
        if owned:
            store.close()
        raise
    agent.store = store if owned else None
    return agent


def _is_open(url: str) -> bool:
    """Whether nothing says how many workers there are."""
    parts = urlparse(url)
    told = (
        "WORLD_SIZE" in os.environ
        if parts.scheme == "env"
        else "world_size" in parse_qs(parts.query)
    )
    return current_world().default is None and not told


def _meeting_place(url: str, rank: int) -> Store:
    """The store at `url`. Serves it if `rank` is 0 and it is on the network."""
    if rank < 0 and urlparse(url).scheme == "env":
        rank = int(os.environ.get("RANK") or -1)
    store, _, _ = next(iter(rendezvous(url, rank if rank >= 0 else MOST - 1, MOST, _MEETING)))
    return store


def _meet(options: RpcBackendOptions, rank: int, size: int | None) -> tuple[Store, int, int, bool]:
    """Store, rank, world size, and whether the store is ours to close."""
    world = current_world()
    if world.default is not None and world.store is not None:
        found = world.default.rank(), world.default.size()
        if rank not in (-1, found[0]) or size not in (None, found[1]):
            raise ValueError(
                f"rank={rank}, world_size={size}, but this is rank {found[0]} of {found[1]} of the "
                "process group"
            )
        return world.store, *found, False
    meeting = rendezvous(options.init_method, rank, -1 if size is None else size, _MEETING)
    return *next(iter(meeting)), True


def _agent(
    store: Store, name: str, rank: int, size: int, options: RpcBackendOptions, code: bool
) -> Agent:
    mine = [name, code, host_id(), options.transport]
    told = store.gather("rpc/names", rank, size, dumps(mine), _MEETING)
    names, accepts, hosts, wishes = map(list, zip(*map(loads, told), strict=True))
    for worker in names:
        if names.count(worker) > 1:
            ranks = [r for r, other in enumerate(names) if other == worker]
            raise ValueError(f"RPC worker name {worker!r} is not unique: ranks {ranks} have it")
    kind = _transport(store, hosts, wishes)
    members = Members(dict(enumerate(zip(names, accepts, strict=True))))
    line = Line(create(kind, PrefixStore("rpc", store), rank, size, _MEETING), f"rpc io {name}")
    return Agent(line, rank, members, options.num_worker_threads, options.rpc_timeout)


def _join(store: Store, name: str, rank: int, options: RpcBackendOptions, code: bool) -> Agent:
    """Join an open world: connect to all who are there, then take the name."""
    board = Board(store)
    carrier = board.carrier(options.transport, _carrier(store))
    rank = board.claim(rank)
    transport: OpenUnixTransport | OpenZmqTransport
    if carrier == "unix":
        transport = OpenUnixTransport(rank)
    else:
        transport = OpenZmqTransport(store, rank)
    line = Line(transport, f"rpc io {name}")
    try:
        transport.reach(board.enter(rank, name, code, transport.address, carrier))
        board.take_name(name, rank, transport.peers.__contains__)
    except BaseException:
        line.close()
        raise
    members = Members({rank: (name, code)}, board)
    return Agent(line, rank, members, options.num_worker_threads, options.rpc_timeout)


def _carrier(store: Store) -> str:
    """What carries the messages of an open world, unless somebody says so: TCP where its store is
    on a network that other hosts may share.
    """
    host = store.network_host()
    local = host is None or resolve(host).is_loopback
    return "unix" if local and sys.platform == "linux" else "tcp"


def _transport(store: Store, hosts: list[str], wishes: list[str | None]) -> str:
    """What carries the messages; all workers decide alike, by what all have told."""
    if len(set(wishes)) > 1:
        raise ValueError(f"_transports must be the same on all workers, got {wishes}")
    if wishes[0] is not None:
        return wishes[0]
    if transport_for(None, store) == "local":
        return "local"
    return "unix" if len(set(hosts)) == 1 and sys.platform == "linux" else "zmq"
