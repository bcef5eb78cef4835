"""Calls in a distributed autograd context, both ends, and the messages of a backward pass.

Owns: `Recorder`, which makes the calls of a thread that is in a context, and what it calls on other
workers: `serve`, `keep`, `value_of`, `leave`, `propagate`. Those may be called by name from any
worker of the run, and do no more than keep a context's books and run what may be called anyway.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import CancelledError
from functools import partial
from typing import Any

from dtrain.autograd.grad_mode import grad_enabled
from dtrain.comm.work import Future
from dtrain.distributed.autograd.contexts import Context, contexts
from dtrain.distributed.autograd.edges import Key, receive_node, send_node
from dtrain.distributed.autograd.passes import Left, Run, Tell, run_backward
from dtrain.distributed.rpc import current
from dtrain.distributed.rpc.constants import UNSET_RPC_TIMEOUT
from dtrain.distributed.rpc.failures import RpcTimeout
from dtrain.distributed.rpc.functions import Pending, async_execution, outcome
from dtrain.distributed.rpc.requests import arguments
from dtrain.distributed.rpc.rref import RELAY, RRef
from dtrain.tensor import Tensor


class Recorder:
    """The calls of a thread that is in `context`, with an `Agent`'s methods.

    While gradients are switched off (`no_grad`), calls are not part of the context.
    """

    def __init__(self, context: Context, agent: Any) -> None:
        self.context, self._agent = context, agent

    def rpc_sync(self, to: Any, func: Any, args: Any, kwargs: Any, timeout: float) -> Any:
        if not grad_enabled.get():
            return self._agent.rpc_sync(to, func, args, kwargs, timeout)
        worker, key, parts = self._request(to, func, args, kwargs)
        return self._received(
            worker, key, self._sent(key, "rpc_async", worker, serve, parts, timeout)
        )

    def rpc_async(self, to: Any, func: Any, args: Any, kwargs: Any, timeout: float) -> Any:
        if not grad_enabled.get():
            return self._agent.rpc_async(to, func, args, kwargs, timeout)
        worker, key, parts = self._request(to, func, args, kwargs)
        made = self._sent(key, "rpc_async", worker, serve, parts, timeout)
        return made.then(partial(self._received, worker, key))

    def remote(self, to: Any, func: Any, args: Any, kwargs: Any, timeout: float) -> RRef:
        if not grad_enabled.get():
            plain: RRef = self._agent.remote(to, func, args, kwargs, timeout)
            return plain
        worker, key, parts = self._request(to, func, args, kwargs)
        handle: RRef = self._sent(key, "remote", worker, keep, parts, timeout)
        handle._made.add_done_callback(partial(self._noted, worker, key))
        return handle

    def fetch(self, handle: RRef, timeout: float) -> Any:
        if handle.is_owner() or not grad_enabled.get():
            return self._agent.fetch(handle, timeout)
        return self.rpc_sync(handle.name.owner, value_of, (handle,), {}, timeout)

    def _request(self, to: Any, func: Any, args: Any, kwargs: Any) -> tuple[int, Key, Any]:
        """Whom to call, the key of the message, and the arguments of what serves it there."""
        worker, context = self._agent.worker(to), self.context
        args, kwargs = arguments(func, args, kwargs)
        key = Key(self._agent.rank, context.new_number(), 0)
        node, places = send_node([args, kwargs])
        context.note_send(key, node)
        context.called.add(worker)
        return worker, key, (context.id, list(key), places, func, args, kwargs)

    def _sent(self, key: Key, way: str, worker: int, func: Any, parts: Any, timeout: float) -> Any:
        try:
            return getattr(self._agent, way)(worker, func, parts, {}, timeout)
        except BaseException:
            self.context.forget(key)
            raise

    def _received(self, worker: int, key: Key, done: Future[Any]) -> Any:
        """The value of an answer, with its tensors in the graph."""
        self._noted(worker, key, done)
        places, value = done.wait()
        if places:
            name = self._agent.names[worker]
            self.context.note_receive(receive_node(value, places, key.answer(), worker, name))
        return value

    def _noted(self, worker: int, key: Key, done: Future[Any]) -> None:
        """See to it that no pass waits for a call that was given up, on either side."""
        with contextlib.suppress(BaseException):
            done.wait()
        error = done.exception()
        if error is not None:
            self.context.forget(key)
        if isinstance(error, RpcTimeout | CancelledError):
            name = self._agent.names[worker]
            self.context.note_receive(receive_node([], [], key.answer(), worker, name))


@contextlib.contextmanager
def recording(context: Context | None) -> Iterator[None]:
    """Inside the block the calls of this thread are part of `context` (None: of none)."""
    made = None if context is None else Recorder(context, current.agent())
    token = current.recorder.set(made)
    try:
        yield
    finally:
        current.recorder.reset(token)


def _run_in(number: int, key: list[int], places: Any, func: Any, args: Any, kwargs: Any) -> Any:
    """The context of a call that has come (None: it was left), and the result of `func`."""
    context = contexts().enter(number)
    if context is not None and places:
        name = current.agent().names[key[0]]
        node = receive_node([args, kwargs], places, Key(*key), key[0], name)
        context.note_receive(node)
    with recording(context):
        return context, outcome(func, func(*args, **kwargs))


def _future_of(result: Any) -> Future[Any]:
    if isinstance(result, Pending):
        return result.future
    future: Future[Any] = Future()
    future.set_result(result)
    return future


@async_execution
def serve(number: int, key: list[int], places: Any, func: Any, args: Any, kwargs: Any) -> Any:
    """Run `func` in context `number`: [which tensors of the result carry gradients, result]."""
    context, result = _run_in(number, key, places, func, args, kwargs)

    def answer(done: Future[Any]) -> list[Any]:
        value = done.wait()
        if context is None:
            return [[], value]
        node, tracked = send_node(value)
        context.note_send(Key(*key).answer(), node)
        return [tracked, value]

    return _future_of(result).then(answer)


@async_execution
def keep(number: int, key: list[int], places: Any, func: Any, args: Any, kwargs: Any) -> Any:
    """As `serve`, but the result stays here, under the name of the reference."""
    return _future_of(_run_in(number, key, places, func, args, kwargs)[1])


for _function in (serve, keep):
    setattr(_function, RELAY, 3)


def value_of(handle: RRef) -> Any:
    """The value of a reference, on its owner."""
    return handle.local_value()


def leave(number: int) -> None:
    """Leave a context here, and wherever calls went from here. Waits for nobody."""
    left = contexts().leave(number)
    agent = current.agent()
    for worker in left.called if left is not None else ():
        if worker != agent.rank:
            agent.rpc_async(worker, leave, (number,), {}, UNSET_RPC_TIMEOUT)


def teller(number: int, run: tuple[int, int], retain: bool) -> Tell:
    """What tells others of a pass."""
    agent = current.agent()

    def tell(worker: int, key: Key | None, grads: Any) -> Future[Left]:
        name = None if key is None else list(key)
        parts = (number, list(run), retain, name, grads)
        future: Future[Left] = agent.rpc_async(worker, propagate, parts, {}, UNSET_RPC_TIMEOUT)
        return future

    return tell


@async_execution
def propagate(number: int, run: list[int], retain: bool, key: Any, grads: Any) -> Future[Left]:
    """Gradients of a message that this worker has sent, in a backward pass; no key: it began."""
    context, which = contexts().find(number), (run[0], run[1])
    with context.lock:
        if which not in context.runs:
            context.runs[which] = Run(context, which, retain, teller(number, which, retain))
        found = context.runs[which]
    if found is None:  # all is done here: whatever this message is, it was not waited for
        return _future_of({})
    return found.arrive(None if key is None else Key(*key), grads)


def backward_of(handle: RRef, number: int, retain_graph: bool) -> None:
    """`RRef.backward`, on the owner: in context `number`, or (-1) in this worker alone."""
    value = handle.local_value()
    if not isinstance(value, Tensor):
        raise RuntimeError(
            f"RRef should contain a tensor for .backward(): {handle} has a {type(value).__name__}"
        )
    if number == -1:
        value.backward(retain_graph=retain_graph)
    else:
        run_backward(contexts().find(number), [value], retain_graph, teller)
