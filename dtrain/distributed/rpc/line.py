"""Messages between workers: an envelope of plain data, and buffers of any size beside it.

Owns: `Line`, one worker's end, over a transport of the comm tower (which authenticates, cuts into
chunks and notices deaths), moved by a `Shift`. Rules: 1. `send` may be called by any thread and
waits for nobody. 2. `on_message(sender, envelope, buffers)` is called by the thread that moves
messages, once all buffers are there; `on_envelope(sender, envelope)` before, in the order of
sending. 3. Envelopes are numbered: one that comes twice is heard once; who misses one takes the
sender for lost and tells it so, as nothing that follows makes sense. `check` finds out whether the
last ones are missing.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dtrain.comm.transports.base import Transport
from dtrain.comm.transports.mailbox import Array, Receive
from dtrain.comm.transports.window import NOWHERE
from dtrain.distributed.rpc.outgoing import Outgoing
from dtrain.distributed.rpc.shift import Shift
from dtrain.errors import DistNetworkError, PeerLost, TransportTimeout
from dtrain.wire import WireError, loads

__all__ = ["Line"]

_log = logging.getLogger("dtrain.rpc")

# Below, an array that goes through the kernel costs less than one in memory that both share.
_HANDED = 32 * 1024

# What a message says in the place of its number: "so many have I sent, what about you?", the answer
# to that, "you are lost to me".
_ASK, _TELL, _LOST = -1, -2, -3

# An envelope ends with [tag, bytes, place in shared memory] of each buffer.
_Waiting = tuple[int, list[Any], list[Receive]]


class Line:
    """`start` to listen, `send`, `close`. `chores()` is called now and then."""

    def __init__(self, transport: Transport, name: str) -> None:
        self._transport = transport
        self._tags = itertools.count(1)
        self._out = Outgoing(transport.tell)
        self._heard: defaultdict[int, int] = defaultdict(int)
        self._waiting: list[_Waiting] = []
        self._looked = False
        self.shift = Shift(self._move, self._do_chores, self._fail, name)
        self.on_envelope: Callable[[int, list[Any]], None]
        self.on_message: Callable[[int, list[Any], list[Any]], None]
        self.chores: Callable[[], None]
        self.on_failure: Callable[[BaseException], None]
        self.shift.flush = self._out.flush
        transport.on_news = self._take

    def start(self) -> None:
        """Begin to listen; set the callbacks first."""
        self.shift.start()

    @property
    def lost(self) -> dict[int, PeerLost]:
        """The workers that are gone, and how."""
        return self._transport.mailbox.lost

    def send(
        self,
        to: int,
        envelope: Sequence[Any],
        buffers: Sequence[Array] = (),
        *,
        steady: bool,
        soon: bool = False,
    ) -> None:
        """Send to another worker. `steady`: buffers will not change before they have arrived.
        `soon`: it may wait for others, a millisecond or two.

        Raises `PeerLost` if it is known to be gone.
        """
        places, rest = [], []
        for buffer in buffers:
            place = self._transport.hand(to, buffer) if buffer.nbytes >= _HANDED else NOWHERE
            tag = next(self._tags) if place == NOWHERE else 0
            places.append([tag, buffer.nbytes, place])
            if place == NOWHERE:
                rest.append((tag, buffer if steady else buffer.copy()))
        self._out.put(to, [*envelope, places], soon=soon and not places)
        for tag, buffer in rest:
            self._transport.send(to, tag, buffer)

    def check(self, worker: int) -> None:
        """Find out whether messages are missing on either side."""
        self._out.say(worker, _ASK)

    def _take(self, sender: int, body: bytes) -> None:
        """Hear one message, or several that came together."""
        try:
            found = loads(body)
        except WireError as error:
            self._give_up(sender, error)
            return
        together = isinstance(found, list) and bool(found) and isinstance(found[0], list)
        for message in found if together else [found]:
            item = self._take_one(sender, message)
            if item is None:
                continue
            if all(receive.done for receive in item[2]):
                self._hand_on(item)
            else:
                self._waiting.append(item)

    def _take_one(self, sender: int, message: Any) -> _Waiting | None:
        """What is to be handed on when its buffers are there, if it is anything."""
        try:
            number, *envelope = message
            if number == _LOST:
                self._transport.mailbox.lose(sender, PeerLost(sender, how=str(envelope[1])))
                return None
            self._count(sender, envelope[0] if number < 0 else number - 1)
            if number == _ASK:
                self._out.say(sender, _TELL)
            if number < 0 or number <= self._heard[sender]:
                return None
            self._heard[sender] = number
            places = envelope.pop()
            self.on_envelope(sender, envelope)
            return sender, envelope, [self._post(sender, *place) for place in places]
        except PeerLost:  # it died after the envelope
            return None
        except (WireError, ValueError, TypeError) as error:
            self._give_up(sender, error)
            return None

    def _give_up(self, sender: int, error: Exception) -> None:
        _log.warning("worker %d is lost: what it sent is not what was expected: %s", sender, error)
        self._out.say(sender, _LOST, f"it gave this worker up, of which it has heard: {error}")
        loss = PeerLost(sender, how=f"what it sent is not what was expected: {error}")
        self._transport.mailbox.lose(sender, loss)

    def _count(self, sender: int, sent: int) -> None:
        """So many messages of `sender` must have been heard."""
        if sent > self._heard[sender]:
            raise WireError(f"{sent - self._heard[sender]} of {sent} messages have not arrived")

    def _post(self, sender: int, tag: int, nbytes: int, place: int) -> Receive:
        if place == NOWHERE:
            return self._transport.post(sender, tag, nbytes)
        receive = Receive(sender, tag, nbytes, None)
        receive.data = self._transport.take(sender, place, nbytes)
        receive.finish()
        return receive

    def _hand_on(self, waited: _Waiting) -> None:
        sender, envelope, posted = waited
        if not any(receive.error for receive in posted):
            self.on_message(sender, envelope, [receive.data for receive in posted])

    def _deliver(self) -> None:
        """Hand on what is complete."""
        for item in self._waiting[:]:
            if all(receive.done for receive in item[2]):
                self._waiting.remove(item)
                self._hand_on(item)

    def _move(self, until: Callable[[], bool], deadline: float) -> None:
        def done() -> bool:
            self._out.flush()
            if self._waiting:
                self._deliver()
            return until()

        moved = False
        while not moved:
            look = self._out.promise(deadline)
            moved = self._transport.wait_until(done, look) or look >= deadline

    def _do_chores(self) -> None:
        if not self._looked:  # connected to everybody, so that deaths are noticed
            self._looked = True
            self._transport.look()
        self.chores()
        with contextlib.suppress(TransportTimeout, PeerLost):
            self._transport.flush(time.monotonic())  # let go of what has been written

    def _fail(self, error: BaseException) -> None:
        """A mistake of ours: nothing more is heard here, and the others are not to wait for it."""
        _log.error("the I/O thread of rpc failed", exc_info=error)
        self.shift.stop()
        self._transport.abandon()
        self.on_failure(DistNetworkError(f"the I/O thread of rpc failed: {error!r}"))

    def close(self) -> None:
        """Say goodbye to everybody; what was sent still arrives."""
        self.shift.stop()
        self._out.flush()
        if not self._transport.closed:
            self._transport.mailbox.touch()
            self._transport._wake()
        self.shift.join(2.0)
        self._transport.close()


def as_buffer(body: bytes) -> Array:
    """Bytes as an array to send."""
    return np.frombuffer(body, np.uint8)
