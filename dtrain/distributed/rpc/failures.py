"""Exceptions on their way from the worker where they were raised to the one that called.

Rules: 1. the caller gets the same type with the same arguments, and the remote traceback as its
cause. 2. A type that may not be called by name here, and what is no `Exception` at all
(SystemExit), arrives as `RemoteError`, which names it. 3. An exception is made without its
`__init__`.
"""

from __future__ import annotations

import builtins
import traceback
from typing import Any

from dtrain.distributed.codec import encode
from dtrain.distributed.rpc.names import resolve
from dtrain.errors import DistError, from_wire, to_wire

__all__ = ["RemoteError", "RemoteTraceback", "RpcTimeout", "tell", "told"]


class RpcTimeout(DistError):
    """A call was not answered in time. Fields: `worker`, `timeout` in seconds."""

    worker: str
    timeout: float


class RemoteError(DistError):
    """What a remote function raised, where its type cannot be made here.

    Fields: `type`, `worker`.
    """

    type: str
    worker: str


class RemoteTraceback(Exception):
    """The cause of an exception that was raised on another worker: its text is the traceback."""

    def __str__(self) -> str:
        return f'\n"""\n{self.args[0]}"""'


def tell(error: BaseException, worker: str) -> list[Any]:
    """`error`, raised on `worker`, as plain data."""
    trace = "".join(traceback.format_exception(error))
    if isinstance(error, DistError):
        return ["ours", to_wire(error), trace, worker]
    kind = type(error)
    try:
        arguments = list(error.args)
        encode(arguments)
    except TypeError:
        arguments = [str(error)]
    return [[kind.__module__, kind.__qualname__], arguments, trace, worker]


def told(form: list[Any]) -> BaseException:
    """The exception of `tell`, to be raised here."""
    kind, arguments, trace, worker = form
    if kind == "ours":
        error: BaseException = from_wire(arguments)
    else:
        module, name = kind
        error = _rebuilt(module, name, arguments, worker)
    error.__cause__ = RemoteTraceback(trace)
    error.add_note(f"raised on worker {worker!r}")
    return error


def _rebuilt(module: str, name: str, arguments: list[Any], worker: str) -> BaseException:
    found: Any = None
    if module == "builtins":
        found = getattr(builtins, name, None)
    else:
        try:
            found = resolve(module, name)
        except (TypeError, ImportError):
            found = None
    if isinstance(found, type) and issubclass(found, Exception):
        error = found.__new__(found, *arguments)
        error.args = tuple(arguments)
        return error
    text = ", ".join(map(str, arguments))
    return RemoteError(
        f"worker {worker!r} raised {module}.{name}: {text}", type=f"{module}.{name}", worker=worker
    )
