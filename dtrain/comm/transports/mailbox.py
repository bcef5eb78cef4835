"""Where the messages of one rank meet the receives that wait for them.

Owns: matching by (source, tag), in order of arrival and of posting; what happens to receives when a
peer or the whole transport fails. Used by every transport, knows none of them. Rules: 1. everything
changes under `lock`; what somebody may wait for moves `version` on and notifies `changed`. 2. A
receive that is posted before its message comes is written straight into its destination. 3.
Messages that have arrived can be received even after their sender is gone.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from dtrain.errors import DistError, PeerLost, WrongSize
from dtrain.wire import WireError

__all__ = ["ANY_SOURCE", "Accept", "Array", "Incoming", "Mailbox", "Receive", "as_bytes"]

Array = npt.NDArray[Any]

ANY_SOURCE = -1

# accept(source, note, nbytes) raises when the message does not fit the receive
Accept = Callable[[int, bytes, int], None]


def as_bytes(array: Array) -> npt.NDArray[np.uint8]:
    """The memory of a C-contiguous array as flat bytes; no copy."""
    return array.reshape(-1).view(np.uint8)


_NOTHING = np.empty(0, np.uint8)


class Receive:
    """One posted receive. `done` may be read at any time; `source` and `error` once it is done.

    It fills `out`; where only a number of bytes is given instead, `data` is memory that came with
    the message (of a message in one chunk, which nobody else keeps, the chunk itself: no copy).
    """

    __slots__ = ("accept", "data", "done", "error", "nbytes", "source", "src", "tag")

    def __init__(self, src: int, tag: int, out: Array | int, accept: Accept | None) -> None:
        self.src, self.tag = src, tag
        self.nbytes = out if isinstance(out, int) else out.nbytes
        self.data = (
            _NOTHING if self.nbytes == 0 else None if isinstance(out, int) else as_bytes(out)
        )
        self.accept = accept
        self.source = src
        self.done = False
        self.error: BaseException | None = None

    def finish(self, error: BaseException | None = None) -> None:
        self.error = error
        self.done = True

    def admit(self, source: int, note: bytes, nbytes: int) -> None:
        """Refuse a message that does not fit, before one byte of it is written."""
        if self.accept is not None:
            self.accept(source, note, nbytes)
        if nbytes != self.nbytes:
            raise WrongSize(source, nbytes, self.nbytes)

    def write(self, start: int, chunk: Any, owned: bool) -> int:
        """Take in the `chunk` that begins at byte `start` of the message; returns where it ends."""
        data = np.frombuffer(chunk, np.uint8)
        if self.data is None:
            whole = owned and data.size == self.nbytes and data.flags.writeable
            self.data = data if whole else np.empty(self.nbytes, np.uint8)
        if self.data is not data:
            self.data[start : start + data.size] = data
        return start + data.size


class Incoming:
    """One message on its way in, perhaps in several chunks."""

    __slots__ = ("arrival", "chunks", "got", "nbytes", "note", "receive", "refused", "src")

    def __init__(self, src: int, note: bytes, nbytes: int, arrival: int) -> None:
        self.src, self.note, self.nbytes, self.arrival = src, note, nbytes, arrival
        self.got = 0
        self.chunks: list[Any] = []  # what came before a receive was posted
        self.receive: Receive | None = None
        self.refused = False

    def attach(self, receive: Receive) -> None:
        receive.source = self.src
        try:
            receive.admit(self.src, self.note, self.nbytes)
        except BaseException as error:
            self.refused = True
            receive.finish(error)
        else:
            self.receive = receive
            self.got, waiting = 0, self.chunks
            for chunk in waiting:
                self.got = receive.write(self.got, chunk, True)
        self.chunks = []
        self._settle()

    def write(self, chunk: Any, owned: bool) -> None:
        if self.receive is not None:
            self.got = self.receive.write(self.got, chunk, owned)
        else:
            self.got += len(chunk)
            if not self.refused:
                self.chunks.append(chunk if owned else bytearray(chunk))
        self._settle()

    def _settle(self) -> None:
        if self.got == self.nbytes and self.receive is not None:
            self.receive.finish()


class Mailbox:
    """The receiving end of one rank: posted receives, messages that came early, news, failures."""

    def __init__(self, size: int) -> None:
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self.version = 0
        self.size = size
        self.failure: BaseException | None = None  # the reason why nothing is received any more
        self.lost: dict[int, PeerLost] = {}
        self.dead: PeerLost | None = None  # the first of them that did not say goodbye
        self._posted: dict[int, list[Receive]] = {}  # {tag: receives in order of posting}
        self._early: dict[tuple[int, int], deque[Incoming]] = {}  # {(source, tag): no receive yet}
        self._arriving: dict[int, Incoming] = {}  # {source: message whose last chunk is not here}
        self._news: deque[tuple[int, bytes]] = deque()
        self._arrivals = 0

    def touch(self) -> None:
        """Wake every thread that waits for something to change."""
        with self.lock:
            self._moved()

    def _moved(self) -> None:
        self.version += 1
        self.changed.notify_all()

    def post(self, receive: Receive) -> None:
        """Match `receive` with a message that is here, or keep it for one to come."""
        with self.lock:
            incoming = self._take_early(receive.src, receive.tag)
            if incoming is not None:
                incoming.attach(receive)
            elif (error := self._why_not(receive.src)) is not None:
                receive.finish(error)
            else:
                self._posted.setdefault(receive.tag, []).append(receive)

    def _why_not(self, src: int) -> BaseException | None:
        if self.failure is not None or src != ANY_SOURCE:
            return self.failure or self.lost.get(src)
        # A receive from anybody is hopeless once somebody died, or once everybody else has left.
        died = next((loss for loss in self.lost.values() if not loss.orderly), None)
        alone = len(self.lost) >= self.size - 1
        return died or (next(iter(self.lost.values()), None) if alone else None)

    def _take_early(self, src: int, tag: int) -> Incoming | None:
        if not self._early:
            return None
        if src == ANY_SOURCE:
            firsts = [(q[0].arrival, s) for (s, t), q in self._early.items() if t == tag]
            if not firsts:
                return None
            src = min(firsts)[1]
        queue = self._early.get((src, tag))
        if queue is None:
            return None
        incoming = queue.popleft()
        if not queue:
            del self._early[src, tag]
        return incoming

    def begin(
        self, src: int, tag: int, note: bytes, nbytes: int, chunk: Any = None, *, owned: bool = True
    ) -> None:
        """A message of `nbytes` arrives from `src`, with its first `chunk`; the others follow by
        `write`.

        A chunk that has to wait for its receive is kept by reference if it is `owned`, else copied.
        """
        with self.lock:
            if src in self._arriving:
                raise WireError("a message began before the one before it was complete")
            self._arrivals += 1
            incoming = Incoming(src, note, nbytes, self._arrivals)
            receive = self._take_posted(src, tag)
            if receive is not None:
                incoming.attach(receive)
            else:
                self._early.setdefault((src, tag), deque()).append(incoming)
            if nbytes:
                self._arriving[src] = incoming
                self._write(incoming, chunk, owned)
            elif receive is not None:
                self._moved()

    def _take_posted(self, src: int, tag: int) -> Receive | None:
        posted = self._posted.get(tag, ())
        for i, receive in enumerate(posted):
            if receive.src in (src, ANY_SOURCE):
                del self._posted[tag][i]
                if not posted:
                    del self._posted[tag]
                return receive
        return None

    def write(self, src: int, chunk: Any) -> None:
        """The next bytes of the message arriving from `src`, to be kept by reference."""
        with self.lock:
            incoming = self._arriving.get(src)
            if incoming is not None:  # else: lost in the middle of its message
                self._write(incoming, chunk, True)

    def _write(self, incoming: Incoming, chunk: Any, owned: bool) -> None:
        if incoming.got + len(chunk) > incoming.nbytes:
            raise WireError(f"more came than the {incoming.nbytes} bytes that were announced")
        incoming.write(chunk, owned)
        if incoming.got >= incoming.nbytes:
            del self._arriving[incoming.src]
            self._moved()

    def add_news(self, src: int, body: bytes) -> None:
        """A message for the group rather than for a receive."""
        with self.lock:
            self._news.append((src, body))
            self._moved()

    def take_news(self) -> tuple[int, bytes] | None:
        """The oldest news that nobody has taken."""
        if not self._news:
            return None
        with self.lock:
            return self._news.popleft() if self._news else None

    def lose(self, src: int, loss: PeerLost) -> None:
        """`src` is gone: receives from it fail. The first loss of a peer is the one that counts."""
        with self.lock:
            if src in self.lost:
                return
            self.lost[src] = loss
            if self.dead is None and not loss.orderly:
                self.dead = loss
            arriving = self._arriving.pop(src, None)
            if arriving is not None and arriving.receive is not None:
                arriving.receive.finish(loss)
            self._fail_posted(lambda receive: self._why_not(receive.src))
            self._moved()

    def fail(self, error: BaseException) -> None:
        """Every receive, now and later, fails with `error`.

        Nothing is written to their arrays any more.
        """
        with self.lock:
            self.failure = error
            for incoming in self._arriving.values():
                if incoming.receive is not None:
                    incoming.receive.finish(error)
                    incoming.receive, incoming.refused = None, True
            self._fail_posted(lambda receive: error)
            self._moved()

    def _fail_posted(self, reason: Callable[[Receive], BaseException | None]) -> None:
        for tag, posted in list(self._posted.items()):
            kept = []
            for receive in posted:
                error = reason(receive)
                if error is None:
                    kept.append(receive)
                else:
                    receive.finish(error if not isinstance(error, DistError) else error.copy())
            self._posted[tag] = kept
            if not kept:
                del self._posted[tag]
