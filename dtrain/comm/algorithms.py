"""How each collective moves its bytes: direct exchanges between the ranks of one group.

Owns: who sends what to whom. Called by `collectives`, works on a `channel.Channel`, validates
nothing. Where all ranks share memory, `window_algorithms` takes over; where the ranks of each of
several hosts do, `island_algorithms` for what is there. Rules: 1. receives are posted before
anything is sent, so that data lands where it belongs. 2. Every pair that talks checks the
fingerprint on its first message (the channel does). A rank that would only send waits for an empty
acknowledgement, so that it learns of a mismatch inside the call.
3. Sums go through `reduce.combine`, in rank order.

What one rank sends, N ranks, B bytes in the array that names the call (reduce_scatter, gather: the
part of a rank), S bytes in a rank's slice, P = max(1, ceil(S / PIECE)):

    small all_reduce, all_gather, all_to_all     N-1 messages, (N-1) B bytes
    large all_reduce (slices of equal length)    2 (N-1) P messages, 2 (N-1) S bytes
    reduce_scatter                               (N-1) P messages, (N-1) B bytes (S = B)
    reduce_shards                                to each other rank its part, P messages
    gather_shards                                N-1 messages, (N-1) S bytes, its own part to each
    large reduce                                 (N-1) P messages, (N-1) S bytes, and 1 of S bytes
    broadcast, scatter                           root N-1 messages, (N-1) B bytes; others 1 empty
    gather, small reduce                         others 1 message, B bytes; root N-1 empty ones
    barrier                                      ceil(log2 N) empty messages
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import update_wrapper
from itertools import zip_longest
from typing import Concatenate, ParamSpec

import numpy as np

from dtrain.comm import island_algorithms, window_algorithms
from dtrain.comm.channel import Channel
from dtrain.comm.parts import Cuts, length, packed, pieces, rows, unpack
from dtrain.comm.reduce import ReduceOp, combine
from dtrain.comm.transports.mailbox import Array, Receive
from dtrain.wire import CHUNK

__all__ = [
    "SMALL",
    "all_gather",
    "all_reduce",
    "all_to_all",
    "barrier",
    "broadcast",
    "gather",
    "gather_shards",
    "reduce",
    "reduce_scatter",
    "reduce_shards",
    "scatter",
]

# Below this many bytes to all others together, one exchange of everything beats two of slices.
SMALL = 128 * 1024

# Large reductions move in messages of at most so many bytes, one frame each, so that adding
# overlaps sending. Half of it costs a tenth more processor time; four times as much overlaps less.
PIECE = CHUNK

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


def _post_from_all(channel: Channel, like: Array) -> list[Receive]:
    """Start to receive an array like `like` from every other rank, in memory that comes with it."""
    return [channel.post(peer, like.nbytes) for peer in channel.peers]


def _contributions(channel: Channel, own: Array, receives: Sequence[Receive]) -> list[Array]:
    """What every rank contributes, in rank order; `receives` are those of `_post_from_all`."""
    found = []
    for receive in receives:
        channel.wait(receive)
        assert receive.data is not None
        found.append(receive.data.view(own.dtype))
    found.insert(channel.rank, own)
    return found


def _acknowledge(channel: Channel, root: int) -> None:
    channel.send(root, _NOTHING)


def _await_acknowledgements(channel: Channel) -> None:
    for receive in [channel.post(peer, _NOTHING) for peer in channel.peers]:
        channel.wait(receive)


def _is_small(channel: Channel, buf: Array) -> bool:
    """Whether one exchange of everything beats two exchanges of slices.

    Between two ranks both move the same bytes, and one exchange is faster while it is one piece.
    """
    if channel.size == 2:
        return buf.nbytes <= PIECE
    return buf.nbytes * len(channel.peers) < SMALL


@_or_through_memory
def all_reduce(channel: Channel, buf: Array, op: ReduceOp) -> None:
    """Small: everybody sends everything and adds for himself.

    Large: exchange slices, add, exchange sums; each piece goes on its way back when it is added.
    """
    flat = buf.reshape(-1)
    if _is_small(channel, buf):
        receives = _post_from_all(channel, flat)
        for peer in channel.peers:
            channel.send(peer, flat)
        contributions = _contributions(channel, flat, receives)
        channel.flush()  # the sum overwrites what is on its way out
        combine(op, contributions, flat)
        return
    parts = [_pieces(part) for part in rows(flat, channel.size)]
    own = parts[channel.rank]
    sums = _reduce_parts(channel, parts, own, op)
    returning = [channel.post(peer, piece) for peer in channel.peers for piece in parts[peer]]
    # No flush: what rank r sends back proves that it has my piece, so its sum may land there.
    for piece in sums:
        for peer in channel.peers:
            channel.send(peer, piece)
    for receive in returning:
        channel.wait(receive)


def _pieces(part: Array) -> list[Array]:
    """`part` (flat) in views of at most `PIECE` bytes; at least one."""
    return [part[piece] for piece in pieces(part.size, part.itemsize, PIECE)]


def _reduce_parts(
    channel: Channel, parts: Sequence[Sequence[Array]], outs: Sequence[Array], op: ReduceOp
) -> Iterator[Array]:
    """Reduce part r of all ranks on rank r, into `outs`, piece by piece.

    All receives are posted before this returns; each piece of `outs` comes out when it is complete.
    """
    own = parts[channel.rank]
    arriving = deque(_post_from_all(channel, piece) for piece in own)

    def run() -> Iterator[Array]:
        for abreast in zip_longest(*(parts[peer] for peer in channel.peers)):
            for peer, piece in zip(channel.peers, abreast, strict=True):
                if piece is not None:
                    channel.send(peer, piece)
        for piece, out in zip(own, outs, strict=True):
            combine(op, _contributions(channel, piece, arriving.popleft()), out)
            yield out

    return run()


@_or_through_memory
def reduce_scatter(channel: Channel, inp: Array, out: Array, op: ReduceOp) -> None:
    parts = [_pieces(part) for part in rows(inp, channel.size)]
    for _ in _reduce_parts(channel, parts, _pieces(out.reshape(-1)), op):
        pass  # complete


@_or_through_memory
def reduce_shards(
    channel: Channel, inp: Array, out: Array, cuts: Sequence[Cuts], op: ReduceOp
) -> None:
    """As `reduce_scatter`, of parts that are packed first."""
    parts = [_pieces(packed(inp, theirs)) for theirs in cuts]
    ends = np.cumsum([piece.size for piece in parts[channel.rank]])[:-1]
    for _ in _reduce_parts(channel, parts, np.split(out, ends), op):
        pass  # complete


@_or_through_memory
def gather_shards(
    channel: Channel, inp: Array, out: Array, cuts: Sequence[Cuts], shared: bool
) -> None:
    """Everybody sends his part to all others. In an array that all share there is nothing to send,
    and who has come to the barrier has written.
    """
    if shared:
        unpack(inp, out, cuts[channel.rank])
        barrier(channel)
        return
    receives = [channel.post(peer, length(cuts[peer]) * inp.itemsize) for peer in channel.peers]
    for peer in channel.peers:
        channel.send(peer, inp)
    unpack(inp, out, cuts[channel.rank])
    for peer, receive in zip(channel.peers, receives, strict=True):
        channel.wait(receive)
        assert receive.data is not None
        unpack(receive.data.view(inp.dtype), out, cuts[peer])


@_or_through_memory
def reduce(channel: Channel, buf: Array, root: int, op: ReduceOp) -> None:
    """Small: everybody sends to the root.

    Large: each rank adds one slice, the root collects them.
    """
    flat = buf.reshape(-1)
    if _is_small(channel, buf):
        _reduce_at_root(channel, flat, root, op)
        return
    parts = rows(flat, channel.size)
    own = parts[channel.rank]
    out = own if channel.rank == root else np.empty_like(own)
    for _ in _reduce_parts(channel, [_pieces(part) for part in parts], _pieces(out), op):
        pass  # complete
    _to_root(channel, out, parts, root)


def _reduce_at_root(channel: Channel, flat: Array, root: int, op: ReduceOp) -> None:
    contributions = [
        flat if r == channel.rank else np.empty_like(flat) for r in range(channel.size)
    ]
    _to_root(channel, flat, contributions, root)
    if channel.rank == root:
        combine(op, contributions, flat)


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
