"""Results that come one by one: `stream` iterates over what a generator on another worker yields.

Owns: `Stream`, the caller's end, and `Producer`, the generator's. Rules: 1. the caller asks for
items by their numbers, `read_ahead` of them before it needs them, and the generator runs only for
items that were asked for: that is all that waits between the two. 2. `Stream` holds the producer by
a reference, so that a generator whose stream is closed, dropped or dead is closed by the counting
of references, after the item it is at. 3. Items arrive in order and none is lost, or the stream
ends with the error.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import CancelledError
from functools import partial
from typing import Any
from weakref import ref

from dtrain.comm.work import Future
from dtrain.distributed.rpc import current
from dtrain.distributed.rpc.calls import RpcFuture
from dtrain.distributed.rpc.constants import UNSET_RPC_TIMEOUT
from dtrain.distributed.rpc.failures import RpcTimeout
from dtrain.distributed.rpc.functions import async_execution
from dtrain.distributed.rpc.names import export
from dtrain.distributed.rpc.options import patience
from dtrain.distributed.rpc.requests import arguments
from dtrain.distributed.rpc.rref import RRef, called

__all__ = ["Stream", "stream"]

_log = logging.getLogger("dtrain.rpc")

Item = list[Any]  # [True, item] or, at the end, [False, None]


def stream(
    to: Any,
    func: Any,
    args: Any = None,
    kwargs: Any = None,
    timeout: float = UNSET_RPC_TIMEOUT,
    *,
    read_ahead: int = 8,
) -> Stream:
    """Iterate over `func(*args, **kwargs)` on worker `to` as it yields. Not in torch.

    `func` is a generator function, or returns something iterable. At most `read_ahead` items are
    there before they are asked for. The next item blocks at most `timeout` seconds (0: for ever;
    default: that of `init_rpc`) and raises what the generator raised, `RpcTimeout` or `PeerLost`.
    `close` the stream, or drop it, and the generator is closed. Items carry no gradients.
    """
    if not isinstance(read_ahead, int) or read_ahead < 1:
        raise ValueError(f"read_ahead must be at least 1, got {read_ahead!r}")
    agent = current.agent()
    args, kwargs = arguments(func, args, kwargs)
    seconds = patience(timeout, agent.patience)
    handle = agent.remote(to, Producer, (func, args, kwargs), {}, 0)
    return Stream(handle, called(func, args), seconds, read_ahead)


class Stream(Iterator[Any]):
    """Items of a generator on another worker, made by `stream`. For one thread at a time."""

    def __init__(self, handle: RRef, what: str, timeout: float, read_ahead: int) -> None:
        self._handle: RRef | None = handle
        self._what, self._timeout, self._worker = what, timeout, handle.owner_name()
        self._asked: deque[RpcFuture] = deque()
        self._number = 0
        for _ in range(read_ahead):
            self._ask()

    def _ask(self) -> None:
        assert self._handle is not None
        agent = self._handle._agent
        number, self._number = self._number, self._number + 1
        parts = (self._handle, number)
        self._asked.append(agent.rpc_async(self._handle.name.owner, next_item, parts, {}, 0))

    def __next__(self) -> Any:
        if self._handle is None:
            raise StopIteration
        try:
            more, item = self._take()
        except BaseException:
            self.close()
            raise
        if not more:
            self.close()
            raise StopIteration
        self._ask()
        return item

    def _take(self) -> Item:
        future = self._asked.popleft()
        try:
            item: Item = future.wait(self._timeout if self._timeout > 0 else None)
        except TimeoutError:
            if future.done():
                raise
            self._asked.append(future)  # to be given up with the others
            raise RpcTimeout(
                f"the next item of {self._what} on worker {self._worker!r} has not come in "
                f"{self._timeout} s",
                worker=self._worker,
                timeout=self._timeout,
            ) from None
        return item

    def close(self) -> None:
        """Ask for nothing more, and let the generator be closed. Waits for nobody."""
        self._handle = None
        while self._asked:
            self._asked.pop().cancel()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@export
class Producer:
    """A generator that runs, in a thread of the pool, as far as items were asked for."""

    _relayed_rpc_argument = 0  # see RELAY

    def __init__(self, func: Any, args: Any, kwargs: Any) -> None:
        self._items: Iterator[Any] | None = iter(func(*args, **kwargs))
        self._lock = threading.Lock()
        self._asked: dict[int, Future[Item]] = {}
        self._number = 0
        self._running = False

    def ask(self, number: int) -> Future[Item]:
        """A future of item `number`."""
        future: Future[Item] = Future()
        with self._lock:
            self._asked[number] = future
            idle, self._running = not self._running, True
        if idle:
            current.agent().pool.submit(partial(_produce, ref(self)))
        return future

    def step(self) -> bool:
        """Make the next item, if somebody has asked for it; whether to go on."""
        with self._lock:
            if self._items is None and self._asked:  # some before may have been given up
                self._number = min(self._asked)
            future = self._asked.pop(self._number, None)
            if future is None:
                self._running = False
                return False
            self._number += 1
        item = self._next()
        if isinstance(item, BaseException):
            future.set_exception(item)
        else:
            future.set_result(item)
        return True

    def _next(self) -> Item | BaseException:
        """The next item. Errors are returned: their traceback must not keep what holds them."""
        try:
            if self._items is not None:
                return [True, next(self._items)]
        except StopIteration:
            self._items = None
        except BaseException as error:
            self._items = None
            return error
        return [False, None]

    def __del__(self) -> None:
        items: Any = getattr(self, "_items", None)  # no attribute: `func` itself has failed
        try:
            if hasattr(items, "close"):
                items.close()
        except Exception:
            _log.exception("a generator whose stream was closed raised at its end")
        for future in getattr(self, "_asked", {}).values():
            future.set_exception(CancelledError())


def _produce(producer: ref[Producer]) -> None:
    """Step while somebody holds the producer besides this thread."""
    while (found := producer()) is not None and found.step():
        del found


@export
@async_execution
def next_item(handle: RRef, number: int) -> Future[Item]:
    """What a stream calls on the generator's worker."""
    future: Future[Item] = handle.local_value().ask(number)
    return future
