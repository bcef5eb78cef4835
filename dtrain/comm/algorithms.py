"""How each collective moves its bytes: direct exchanges between the ranks of one group.

Owns: who sends what to whom. Called by `collectives`, works on a `channel.Channel`, validates
nothing. Where all ranks share memory, `window_algorithms` takes over; where the ranks of each of
several hosts do, `island_algorithms` for what is there. Rules: 1. receives are posted before
anything is sent, so that data lands where it belongs. 2. Every pair that talks checks the
fingerprint on its first message (the channel does). A rank that would only send waits for an empty
acknowledgement, so that it learns of a mismatch inside the call.
3. Sums go through `reduce.combine`, in rank order. Message counts per rank, N ranks: all_reduce N-1
below `SMALL`, else 2(N-1); reduce_scatter, all_gather, all_to_all N-1; broadcast, scatter N-1 at
the root and 1 elsewhere; gather likewise; barrier ceil(log2 N).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import update_wrapper
from typing import Concatenate, ParamSpec

import numpy as np

from dtrain.comm import island_algorithms, window_algorithms
from dtrain.comm.channel import Channel
from dtrain.comm.parts import rows
from dtrain.comm.reduce import ReduceOp, combine
from dtrain.comm.transports.mailbox import Array

__all__ = [
    "SMALL",
    "all_gather",
    "all_reduce",
    "all_to_all",
    "barrier",
    "broadcast",
    "gather",
    "reduce",
    "reduce_scatter",
    "scatter",
]

# Below this many bytes one exchange of everything beats two exchanges of slices.
SMALL = 16 * 1024

_NOTHING = np.empty(0, np.uint8)


P = ParamSpec("P")
Algorithm = Callable[Concatenate[Channel, P], None]


def _or_through_memory(by_messages: Algorithm[P]) -> Algorithm[P]:
    """The algorithm of the same name in `window_algorithms` or `island_algorithms`, where the ranks
    share memory.
    """
    name = by_messages.__name__
    through_window: Algorithm[P] = getattr(window_algorithms, name)
    over_hosts: Algorithm[P] = getattr(island_algorithms, name, by_messages)

    def choose(channel: Channel, /, *args: P.args, **kwargs: P.kwargs) -> None:
        if channel.window is not None:
            through_window(channel, *args, **kwargs)
        elif channel.island is not None:
            over_hosts(channel, *args, **kwargs)
        else:
            by_messages(channel, *args, **kwargs)

    return update_wrapper(choose, by_messages)


def _exchange(channel: Channel, outgoing: Sequence[Array], incoming: Sequence[Array]) -> None:
    """Send `outgoing[r]` to every other rank r and fill `incoming[r]` from it."""
    receives = [channel.post(peer, incoming[peer]) for peer in channel.peers]
    for peer in channel.peers:
        channel.send(peer, outgoing[peer])
    for receive in receives:
        channel.wait(receive)


def _contributions(channel: Channel, own: Array) -> list[Array]:
    """Room for what every rank contributes; this rank's own is `own` itself."""
    room = np.empty((channel.size, own.size), own.dtype)
    return [own if r == channel.rank else room[r] for r in range(channel.size)]


def _acknowledge(channel: Channel, root: int) -> None:
    channel.send(root, _NOTHING)


def _await_acknowledgements(channel: Channel) -> None:
    for receive in [channel.post(peer, _NOTHING) for peer in channel.peers]:
        channel.wait(receive)


@_or_through_memory
def all_reduce(channel: Channel, buf: Array, op: ReduceOp) -> None:
    """Small: everybody sends everything and adds for himself.

    Large: exchange slices, add, exchange sums.
    """
    flat = buf.reshape(-1)
    if buf.nbytes < SMALL:
        contributions = _contributions(channel, flat)
        _exchange(channel, [flat] * channel.size, contributions)
        channel.flush()  # the sum overwrites what is on its way out
        combine(op, contributions, flat)
        return
    parts = rows(flat, channel.size)
    _reduce_parts(channel, parts, parts[channel.rank], op)
    # No flush: what rank r sends now proves that it has my part r, so its sum may land there.
    _exchange(channel, [parts[channel.rank]] * channel.size, parts)


def _reduce_parts(channel: Channel, parts: Sequence[Array], out: Array, op: ReduceOp) -> None:
    """Reduce part r of all ranks on rank r, into `out`."""
    contributions = _contributions(channel, parts[channel.rank])
    _exchange(channel, parts, contributions)
    combine(op, contributions, out)


@_or_through_memory
def reduce_scatter(channel: Channel, inp: Array, out: Array, op: ReduceOp) -> None:
    _reduce_parts(channel, rows(inp, channel.size), out.reshape(-1), op)


@_or_through_memory
def reduce(channel: Channel, buf: Array, root: int, op: ReduceOp) -> None:
    """Small: everybody sends to the root.

    Large: each rank adds one slice, the root collects them.
    """
    flat = buf.reshape(-1)
    if buf.nbytes < SMALL:
        contributions = _contributions(channel, flat)
        _to_root(channel, flat, contributions, root)
        if channel.rank == root:
            combine(op, contributions, flat)
        return
    parts = rows(flat, channel.size)
    own = parts[channel.rank]
    out = own if channel.rank == root else np.empty_like(own)
    _reduce_parts(channel, parts, out, op)
    _to_root(channel, out, parts, root)


def _to_root(channel: Channel, own: Array, incoming: Sequence[Array], root: int) -> None:
    if channel.rank == root:
        for receive in [channel.post(peer, incoming[peer]) for peer in channel.peers]:
            channel.wait(receive)
        for peer in channel.peers:
            channel.send(peer, _NOTHING)
    else:
        channel.send(root, own)
        channel.wait(channel.post(root, _NOTHING))


@_or_through_memory
def gather(channel: Channel, inp: Array, out: Array | None, root: int) -> None:
    incoming: Sequence[Array] = []
    if out is not None:
        incoming = rows(out, channel.size)
        np.copyto(incoming[channel.rank], inp.reshape(-1))
    _to_root(channel, inp, incoming, root)


@_or_through_memory
def broadcast(channel: Channel, buf: Array, root: int) -> None:
    if channel.rank == root:
        for peer in channel.peers:
            channel.send(peer, buf)
        _await_acknowledgements(channel)
    else:
        channel.wait(channel.post(root, buf))
        _acknowledge(channel, root)


@_or_through_memory
def scatter(channel: Channel, inp: Array | None, out: Array, root: int) -> None:
    if inp is not None:
        outgoing = rows(inp, channel.size)
        for peer in channel.peers:
            channel.send(peer, outgoing[peer])
        np.copyto(out.reshape(-1), outgoing[root])
        _await_acknowledgements(channel)
    else:
        channel.wait(channel.post(root, out))
        _acknowledge(channel, root)


@_or_through_memory
def all_gather(channel: Channel, inp: Array, out: Array) -> None:
    incoming = rows(out, channel.size)
    flat = inp.reshape(-1)
    _exchange(channel, [flat] * channel.size, incoming)
    np.copyto(incoming[channel.rank], flat)


@_or_through_memory
def all_to_all(channel: Channel, outgoing: Sequence[Array], incoming: Sequence[Array]) -> None:
    _exchange(channel, outgoing, incoming)
    np.copyto(incoming[channel.rank], outgoing[channel.rank])


@_or_through_memory
def barrier(channel: Channel) -> None:
    """Dissemination (Hensgen, Finkel, Manber 1988): in round k hear from the rank 2^k before."""
    step = 1
    while step < channel.size:
        receive = channel.post((channel.rank - step) % channel.size, _NOTHING)
        channel.send((channel.rank + step) % channel.size, _NOTHING)
        channel.wait(receive)
        step *= 2
