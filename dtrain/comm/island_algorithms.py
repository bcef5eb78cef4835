"""How collectives move their bytes where a group spans hosts and the ranks of a host share memory.

Owns: the exchanges over hosts; large sums go through `chain`. Called by `algorithms` when the
channel has an island; validates nothing. Rules: 1. what all ranks of a host need crosses to it once
and is shared there. 2. In each call every rank meets those of its host, and hears from every other
host, itself or through them: a mismatch is found on each. 3. Sums go through `reduce`, in rank
order. What is not here goes by messages between the ranks, as if they shared nothing.

Messages and bytes per rank and call, H hosts, b bytes contributed by a rank, in k pieces (those
that a rank shows together fit into `HALF`; one piece below 100 KiB or so):
all_gather, and sums while N b is below `SMALL`: k (H-1) messages, (H-1) b bytes. broadcast: the
root sends k messages, b bytes, to the first rank of the next host, which sends as many to that of
the one after it; each is acknowledged with 0 bytes. Below `SMALL` the root sends to all hosts
itself. barrier: ceil(log2 H) messages from each host's first rank. Larger sums: see `chain`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from dtrain.comm import chain
from dtrain.comm.channel import Channel
from dtrain.comm.parts import Cuts, length, packed, pieces, rows, whence
from dtrain.comm.reduce import ReduceOp, combine
from dtrain.comm.transports.island import Island
from dtrain.comm.transports.mailbox import Array
from dtrain.comm.transports.window import HALF

__all__ = [
    "SMALL",
    "all_gather",
    "all_reduce",
    "barrier",
    "broadcast",
    "gather_shards",
    "reduce_scatter",
    "reduce_shards",
]

# While all contributions together have fewer bytes, everybody gets all of them and adds for
# himself: one way over the network is shorter than there and back.
SMALL = 64 * 1024

_NOTHING = np.empty(0, np.uint8)


def _island(channel: Channel) -> Island:
    assert channel.island is not None
    return channel.island


def _gathered(channel: Channel, own: Array) -> Iterator[tuple[slice, list[Array]]]:
    """Pieces of the flat arrays of all ranks, in rank order; to be read before the next piece.

    A contribution is received into the memory of its carrier, where all of the host read it.
    """
    island = _island(channel)
    lane = HALF // island.depth // 64 * 64
    cuts = list(pieces(own.size, own.itemsize, lane))
    for k, cut in enumerate(cuts):
        shown = _next_lanes(island, own[cut], lane)
        receives = [channel.post(rank, shown[rank]) for rank in island.carried]
        if k == 0:
            for peer in island.targets:
                for each in cuts:
                    channel.send(peer, own[each])
        np.copyto(shown[channel.rank], own[cut])
        for receive in receives:
            channel.wait(receive)
        channel.step()
        yield cut, shown
    channel.all_have_come()


def _next_lanes(island: Island, like: Array, lane: int) -> list[Array]:
    """Room for what each rank contributes, in the next half of who shows it on this host."""
    halves = island.window.next_half()
    return [
        halves[place][slot * lane : slot * lane + like.nbytes].view(like.dtype)
        for place, slot in island.shown_at
    ]


def all_gather(channel: Channel, inp: Array, out: Array) -> None:
    parts = rows(out, channel.size)
    for cut, shown in _gathered(channel, inp.reshape(-1)):
        for part, array in zip(parts, shown, strict=True):
            np.copyto(part[cut], array)


def all_reduce(channel: Channel, buf: Array, op: ReduceOp) -> None:
    flat = buf.reshape(-1)
    if flat.nbytes * channel.size < SMALL:
        _add_all(channel, flat, flat, op)
    else:
        chain.reduce_rows(channel, flat.reshape(1, -1), flat, op, shared=True)


def _add_all(channel: Channel, own: Array, out: Array, op: ReduceOp) -> None:
    for cut, shown in _gathered(channel, own):
        combine(op, shown, out[cut])


def reduce_scatter(channel: Channel, inp: Array, out: Array, op: ReduceOp) -> None:
    flat = inp.reshape(-1)
    if flat.nbytes * channel.size < SMALL:
        total = np.empty_like(flat)
        _add_all(channel, flat, total, op)
        np.copyto(out.reshape(-1), rows(total, channel.size)[channel.rank])
    else:
        parts = inp.reshape(channel.size, -1)
        chain.reduce_rows(channel, parts, out.reshape(-1), op, shared=False)


def reduce_shards(
    channel: Channel, inp: Array, out: Array, cuts: Sequence[Cuts], op: ReduceOp
) -> None:
    """As `reduce_scatter` of parts that are made equally long, with zeros."""
    parts = np.zeros((channel.size, max(map(length, cuts))), out.dtype)
    for part, theirs in zip(parts, cuts, strict=True):
        part[: length(theirs)] = packed(inp, theirs)
    total = np.empty(parts.shape[1], out.dtype)
    reduce_scatter(channel, parts, total, op)
    np.copyto(out, total[: out.size])


def gather_shards(
    channel: Channel, inp: Array, out: Array, cuts: Sequence[Cuts], shared: bool
) -> None:
    """Each piece crosses to a host once. In an array that the ranks of a host share each writes
    what it has brought there, its own and what it carries; else each writes all.
    """
    island = _island(channel)
    mine = {channel.rank, *island.carried}
    longest = np.empty(max(map(length, cuts)), inp.dtype)
    longest[: inp.size], longest[inp.size :] = inp, 0
    for piece, shown in _gathered(channel, longest):
        for rank, array in enumerate(shown):
            if not shared or rank in mine:
                for there, here in whence(cuts[rank], piece):
                    out[here] = array[there]
    if shared:
        channel.phase()


def broadcast(channel: Channel, buf: Array, root: int) -> None:
    """The root shows its array to its host and sends it on; the first rank of every other host
    does the same with what it receives.
    """
    island, flat = _island(channel), buf.reshape(-1)
    source = root if root in island.members else island.members[0]
    cuts = list(pieces(flat.size, flat.itemsize, HALF))
    before, after = (
        _relay(island, root, flat.nbytes < SMALL) if channel.rank == source else (None, [])
    )
    receives = [] if before is None else [channel.post(before, flat[cut]) for cut in cuts]
    answers = [channel.post(peer, _NOTHING) for peer in after]
    for k, cut in enumerate(cuts):
        if receives:
            channel.wait(receives[k])
        for peer in after:
            channel.send(peer, flat[cut])
        part = flat[cut]
        shown = channel.share(part if channel.rank == source else None, part.shape, flat)
        if channel.rank != source:
            np.copyto(part, shown[island.members.index(source)])
    if before is not None:
        channel.send(before, _NOTHING)
    for answer in answers:
        channel.wait(answer)


def _relay(island: Island, root: int, at_once: bool) -> tuple[int | None, list[int]]:
    """From whom the source of this host receives, and to whom it sends.

    All receive from the root `at_once`, or each host from the one before, in a ring that begins
    with the root's.
    """
    hosts, first = island.placement.hosts, island.placement.host_of[root]
    ring = [root, *(ranks[0] for ranks in hosts[first + 1 :] + hosts[:first])]
    place = (island.here - first) % len(hosts)
    if at_once:
        return (root, []) if place else (None, ring[1:])
    return (ring[place - 1] if place else None), ring[place + 1 : place + 2]


def barrier(channel: Channel) -> None:
    """All of a host meet; the first ranks of the hosts hear of each other (as in `algorithms`);
    then they let those of their host go.
    """
    island = _island(channel)
    channel.meet()
    if island.window.rank == 0:
        firsts = [ranks[0] for ranks in island.placement.hosts]
        count, step = len(firsts), 1
        while step < count:
            receive = channel.post(firsts[(island.here - step) % count], _NOTHING)
            channel.send(firsts[(island.here + step) % count], _NOTHING)
            channel.wait(receive)
            step *= 2
    channel.phase()
    channel.all_have_come()
