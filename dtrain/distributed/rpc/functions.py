"""Decorators of functions that other workers call: `async_execution`.

Rules: 1. the mark is an attribute, as in torch, so that it survives static and class methods. 2. A
decorated function still runs in a thread of the pool; only what completes its future need not.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

from dtrain.comm.work import Future

F = TypeVar("F")

_MARK = "_wrapped_async_rpc_function"


def async_execution(fn: F) -> F:
    """`fn` returns a Future; the caller gets the future's value when it is complete.

    The thread is free meanwhile. Source: torch.distributed.rpc.functions.async_execution.
    """
    if not callable(fn) and not isinstance(fn, staticmethod | classmethod):
        raise TypeError(f"async_execution decorates functions, got {type(fn).__name__}")
    target = fn.__func__ if isinstance(fn, staticmethod | classmethod) else fn
    setattr(target, _MARK, True)
    return fn


def is_async(function: Any) -> bool:
    """Whether `function` is decorated with `async_execution`."""
    return bool(getattr(function, _MARK, False))


class Pending(NamedTuple):
    """What a function decorated with `async_execution` has returned: the answer comes later."""

    future: Future[Any]


def outcome(function: Any, result: Any) -> Any:
    """`result`, which `function` has returned: `Pending` if it is decorated.

    TypeError when a decorated function returned something else than a Future.
    """
    if not is_async(function):
        return result
    if not isinstance(result, Future):
        name = getattr(function, "__qualname__", function)
        raise TypeError(
            f"{name} is an async_execution function: it must return a Future, got "
            f"{type(result).__name__}"
        )
    return Pending(result)
