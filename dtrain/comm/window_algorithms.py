"""How each collective moves its bytes where the ranks share memory: a `Window`.

Owns: who writes and reads what between two phases. Called by `algorithms` when the channel has a
window; validates nothing. Rules: 1. the first phase of every call carries its fingerprint, so that
nothing is read of a rank that called something else. 2. Arrays that live in the window
(`ProcessGroup.empty`) are read, and written by reductions, where they are; a last phase then keeps
everybody from changing his before all are done. Other arrays go through the two halves of staging,
a piece at a time: one copy in, one pass out. 3. Sums go through `reduce.combine`, in rank order.

Which way is taken is decided alike on all ranks: by the size, which is part of the fingerprint, and
by the places that all ranks have told. No messages are sent. Phases per call, k pieces: barrier 1;
staged all_reduce k for two ranks, else 2k, and k + N - 1 of half the size from `CONVEYED` bytes;
the other staged ones k; each 1 more above `LOOKED_UP` bytes; in the window 2.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dtrain.comm.channel import Channel
from dtrain.comm.parts import Cuts, length, pieces, rows, slices, unpack, whence, where
from dtrain.comm.reduce import ReduceOp, combine, finish, fold, widened
from dtrain.comm.transports.mailbox import Array, as_bytes
from dtrain.comm.transports.window import HALF, NOWHERE
from dtrain.errors import WrongSize

__all__ = [
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

# Above this many bytes a phase more, to learn where arrays live, costs less than a copy.
LOOKED_UP = 64 * 1024

# From this many bytes a sum of more than two ranks goes over a conveyor: less to copy, half the
# phases, but a phase more for each rank until it runs.
CONVEYED = 4 << 20

# Bytes of one step of a sum: what is read and written by it stays in the caches of one core.
_STEP = 256 * 1024


def _places(channel: Channel, array: Array | None, nbytes: int) -> list[int]:
    """Where each rank's `array` lives, told in the first phase; nowhere when it is small.

    A rank without one (None) tells that it has none.
    """
    window = channel.window
    assert window is not None
    if nbytes <= LOOKED_UP:
        return [NOWHERE] * channel.size
    channel.meet(NOWHERE if array is None else window.place_of(array))
    return window.places()


def _in_place(channel: Channel, places: Sequence[int], like: Array) -> list[Array]:
    """The arrays of all ranks at `places`, flat, with as many elements as `like`."""
    window = channel.window
    assert window is not None
    return [window.at(rank, place, like) for rank, place in enumerate(places)]


def all_reduce(channel: Channel, buf: Array, op: ReduceOp) -> None:
    flat = buf.reshape(-1)
    if buf.nbytes <= LOOKED_UP:
        _combine_read_only(op, channel.share(flat, flat.shape, flat), flat)
        return
    places = _places(channel, flat, flat.nbytes)
    if NOWHERE not in places:
        _all_reduce_in_place(channel, _in_place(channel, places, flat), op)
        return
    if channel.size > 2 and flat.nbytes >= CONVEYED:
        _convey(channel, flat, op)
        return
    for piece in pieces(flat.size, flat.itemsize, HALF):
        part = flat[piece]
        if channel.size == 2:
            # Both add everything: one pass and one phase less than slices.
            combine(op, channel.share(part, part.shape, flat), part)
        else:
            _reduce_slices(channel, part, op)


def _reduce_slices(channel: Channel, part: Array, op: ReduceOp) -> None:
    """Each rank adds one slice, shows the sum, and copies those of the others."""
    cuts = slices(part.size, channel.size)
    mine = cuts[channel.rank]
    shown = channel.share(part, part.shape, part, but=mine)
    combine(op, [array[mine] for array in shown], part[mine])
    # Nobody else reads this rank's contribution to its own slice: the sum may stand there.
    channel.show_again(part, mine)
    for peer in channel.peers:
        part[cuts[peer]] = shown[peer][cuts[peer]]


def _convey(channel: Channel, flat: Array, op: ReduceOp) -> None:
    """A conveyor in rank order: one phase a step, and each rank reads what one other has written.

    In step k rank r adds its part of piece k - r to what rank r - 1 has of it; what the last rank
    then has is the sum, and all copy it in the step after.
    """
    window, last = channel.window, channel.size - 1
    assert window is not None
    kind = widened(flat.dtype)
    parts = [flat[piece] for piece in pieces(flat.size, kind.itemsize, HALF // 2)]
    for step in range(len(parts) + channel.size):
        seen = window.this_half()
        if step > last:
            part = parts[step - last - 1]
            part[...] = np.ndarray(part.shape, part.dtype, seen[last])
        if step == len(parts) + last:
            return  # and leave the half that others still read
        own = window.next_half()[channel.rank]
        if 0 <= step - channel.rank < len(parts):
            before = seen[channel.rank - 1] if channel.rank else None
            _pass_on(channel, parts[step - channel.rank], before, own, op)
        channel.phase()


def _pass_on(channel: Channel, part: Array, before: Array | None, own: Array, op: ReduceOp) -> None:
    """Add `part` to the sum in the memory `before`, into the memory `own`."""
    kind = widened(part.dtype)
    total = None if before is None else np.ndarray(part.shape, kind, before)
    room: Array = np.ndarray(part.shape, kind, own)
    fold(op, total, [part], room)
    if channel.rank == channel.size - 1:
        whole = finish(op, room, channel.size, part.dtype)
        if whole is not room:
            np.ndarray(part.shape, part.dtype, own)[...] = whole


def _all_reduce_in_place(channel: Channel, arrays: list[Array], op: ReduceOp) -> None:
    """Each rank adds one slice and writes the sum into everybody's array."""
    own = arrays[channel.rank]
    mine = slices(own.size, channel.size)[channel.rank]
    others = [arrays[peer] for peer in channel.peers]
    for piece in pieces(mine.stop - mine.start, own.itemsize, _STEP):
        here = slice(mine.start + piece.start, mine.start + piece.stop)
        combine(op, [array[here] for array in arrays], own[here])
        for array in others:
            array[here] = own[here]
    channel.phase()


def reduce(channel: Channel, buf: Array, root: int, op: ReduceOp) -> None:
    """The root adds: the others show theirs."""
    flat = buf.reshape(-1)
    places = _places(channel, flat, flat.nbytes)
    here = channel.rank == root
    if all(place != NOWHERE for rank, place in enumerate(places) if rank != root):
        arrays = _in_place(channel, places, flat)
        if here:
            arrays[root] = flat
            for piece in pieces(flat.size, flat.itemsize, _STEP):
                _combine_read_only(op, [array[piece] for array in arrays], flat[piece])
        channel.phase()
        return
    for piece in pieces(flat.size, flat.itemsize, HALF):
        part = flat[piece]
        shown = channel.share(part, part.shape, flat)
        if here:
            combine(op, shown, part)


def _combine_read_only(op: ReduceOp, arrays: Sequence[Array], out: Array) -> None:
    """As `combine`, for arrays that others read too: it must not use them as scratch."""
    if len(arrays) > 2 and any(np.may_share_memory(array, out) for array in arrays[2:]):
        total = np.empty_like(out)
        combine(op, arrays, total)
        np.copyto(out, total)
    else:
        combine(op, arrays, out)


def reduce_scatter(channel: Channel, inp: Array, out: Array, op: ReduceOp) -> None:
    flat = out.reshape(-1)
    places = _places(channel, inp, inp.nbytes)
    if NOWHERE not in places:
        mine = slices(inp.size, channel.size)[channel.rank]
        arrays = [array[mine] for array in _in_place(channel, places, inp)]
        for piece in pieces(flat.size, flat.itemsize, _STEP):
            _combine_read_only(op, [array[piece] for array in arrays], flat[piece])
        channel.phase()
        return
    parts = inp.reshape(channel.size, flat.size)
    for piece in pieces(flat.size, flat.itemsize, HALF // channel.size):
        columns = parts[:, piece]
        shown = channel.share(columns, columns.shape, flat)
        combine(op, [array[channel.rank] for array in shown], flat[piece])


def reduce_shards(
    channel: Channel, inp: Array, out: Array, cuts: Sequence[Cuts], op: ReduceOp
) -> None:
    """Each rank adds what is its own, right into `out`."""
    mine, places = cuts[channel.rank], _places(channel, inp, inp.nbytes)
    if NOWHERE not in places:
        arrays = _in_place(channel, places, inp)
        for piece in pieces(inp.size, inp.itemsize, _STEP):
            _add_own([array[piece] for array in arrays], mine, piece, out, op)
        channel.phase()
        return
    for piece in pieces(inp.size, inp.itemsize, HALF):
        part = inp[piece]
        _add_own(channel.share(part, part.shape, inp), mine, piece, out, op)


def _add_own(arrays: Sequence[Array], mine: Cuts, window: slice, out: Array, op: ReduceOp) -> None:
    for there, here in where(mine, window):
        _combine_read_only(op, [array[there] for array in arrays], out[here])


def gather_shards(
    channel: Channel, inp: Array, out: Array, cuts: Sequence[Cuts], shared: bool
) -> None:
    if shared:
        unpack(inp, out, cuts[channel.rank])
        channel.meet()
        return
    window = channel.window
    assert window is not None
    for piece in pieces(max(map(length, cuts)), inp.itemsize, HALF):
        own = inp[piece]
        shown = window.next_half_as((piece.stop - piece.start,), inp.dtype)
        shown[channel.rank][: own.size] = own
        channel.step()
        for array, theirs in zip(shown, cuts, strict=True):
            for there, here in whence(theirs, piece):
                out[here] = array[there]


def all_gather(channel: Channel, inp: Array, out: Array) -> None:
    flat, parts = inp.reshape(-1), rows(out, channel.size)
    places = _places(channel, flat, flat.nbytes)
    if NOWHERE not in places:
        _copy_each(parts, _in_place(channel, places, flat))
        channel.phase()
        return
    for piece in pieces(flat.size, flat.itemsize, HALF):
        shown = channel.share(flat[piece], flat[piece].shape, flat)
        _copy_each([part[piece] for part in parts], shown)


def _copy_each(outs: Sequence[Array], arrays: Sequence[Array]) -> None:
    for out, array in zip(outs, arrays, strict=True):
        np.copyto(out, array)


def gather(channel: Channel, inp: Array, out: Array | None, root: int) -> None:
    flat = inp.reshape(-1)
    parts = [] if out is None else rows(out, channel.size)
    places = _places(channel, flat, flat.nbytes)
    if NOWHERE not in places:
        if parts:
            _copy_each(parts, _in_place(channel, places, flat))
        channel.phase()
        return
    for piece in pieces(flat.size, flat.itemsize, HALF):
        shown = channel.share(flat[piece], flat[piece].shape, flat)
        if parts:
            _copy_each([part[piece] for part in parts], shown)


def broadcast(channel: Channel, buf: Array, root: int) -> None:
    flat = buf.reshape(-1)
    here = channel.rank == root
    places = _places(channel, flat, flat.nbytes)
    if NOWHERE not in places:
        _spread(channel, _in_place(channel, places, flat), root)
        return
    for piece in pieces(flat.size, flat.itemsize, HALF):
        part = flat[piece]
        shown = channel.share(part if here else None, part.shape, flat)
        if not here:
            np.copyto(part, shown[root])


def _spread(channel: Channel, arrays: Sequence[Array], root: int) -> None:
    """Each rank, the root too, copies one slice of the root's array into those of all others."""
    source = arrays[root]
    mine = slices(source.size, channel.size)[channel.rank]
    for piece in pieces(mine.stop - mine.start, source.itemsize, _STEP):
        here = slice(mine.start + piece.start, mine.start + piece.stop)
        for rank, array in enumerate(arrays):
            if rank != root:
                array[here] = source[here]
    channel.phase()


def scatter(channel: Channel, inp: Array | None, out: Array, root: int) -> None:
    flat = out.reshape(-1)
    window = channel.window
    assert window is not None
    place = _places(channel, inp, flat.nbytes)[root]
    if place != NOWHERE:
        start = place + channel.rank * flat.nbytes
        np.copyto(flat, window.at(root, start, flat))
        channel.phase()
        return
    parts = None if inp is None else inp.reshape(channel.size, flat.size)
    for piece in pieces(flat.size, flat.itemsize, HALF // channel.size):
        part = flat[piece]
        columns = None if parts is None else parts[:, piece]
        shown = channel.share(columns, (channel.size, part.size), flat)
        np.copyto(part, shown[root][channel.rank])


def all_to_all(channel: Channel, outgoing: Sequence[Array], incoming: Sequence[Array]) -> None:
    """First everybody shows how many bytes he sends to whom, then the bytes: each pair of ranks has
    a lane in the sender's staging.
    """
    sizes = np.array([array.nbytes for array in outgoing], np.int64)
    table = np.stack(channel.share(sizes, sizes.shape, sizes))
    for source, array in enumerate(incoming):
        if table[source, channel.rank] != array.nbytes:
            raise WrongSize(source, int(table[source, channel.rank]), array.nbytes)
    lane = HALF // channel.size // 64 * 64
    sources = [as_bytes(array) for array in outgoing]
    targets = [as_bytes(array) for array in incoming]
    for start in range(0, int(table.max()), lane):
        _exchange_lanes(channel, sources, targets, slice(start, start + lane))
    np.copyto(incoming[channel.rank], outgoing[channel.rank])


def _exchange_lanes(
    channel: Channel, sources: Sequence[Array], targets: Sequence[Array], piece: slice
) -> None:
    lane = piece.stop - piece.start
    assert channel.window is not None
    halves = channel.window.next_half()
    for peer in channel.peers:
        data = sources[peer][piece]
        halves[channel.rank][peer * lane : peer * lane + data.nbytes] = data
    channel.phase()
    for peer in channel.peers:
        room = targets[peer][piece]
        begin = channel.rank * lane
        room[:] = halves[peer][begin : begin + room.nbytes]


def barrier(channel: Channel) -> None:
    channel.meet()
