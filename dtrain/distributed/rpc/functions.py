"""Decorators of functions that other workers call: `async_execution`.

Rules: 1. the mark is an attribute, as in torch, so that it survives static and class methods. 2. A
decorated function still runs in a thread of the pool; only what completes its future need not.
"""

from __future__ import annotations

from typing import Any, TypeVar

F = TypeVar("F")

_MARK = "_wrapped_async_rpc_function"


def async_execution(fn: F) -> F:
    """`fn` returns a Future; the caller gets the future's value when it is complete.

    The thread is free meanwhile. Source: torch.distributed.rpc.functions.async_execution.
    """
    target = fn.__func__ if isinstance(fn, staticmethod | classmethod) else fn
    setattr(target, _MARK, True)
    return fn


def is_async(function: Any) -> bool:
    """Whether `function` is decorated with `async_execution`."""
    return bool(getattr(function, _MARK, False))
