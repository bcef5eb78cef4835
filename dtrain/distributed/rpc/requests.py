"""What a caller asks for: checks of function and arguments, before anything is sent.

Owns: `arguments`, and `in_words`, which says of an error of packing which argument of which
function it is about. Rule: what the caller can know to be wrong is an error in the caller.
"""

from __future__ import annotations

from typing import Any

from dtrain.distributed.rpc.rref import RELAY, called, invoke

__all__ = ["arguments", "in_words"]


def arguments(func: Any, args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """`args` as a tuple and `kwargs` as a dict; TypeError for what is neither, or not callable."""
    if not callable(func):
        raise TypeError(f"function should be callable, got {func!r} of type {type(func).__name__}")
    if args is not None and not isinstance(args, tuple | list):
        raise TypeError(
            f"args must be a tuple of the arguments of {called(func, ())}, got "
            f"{type(args).__name__}: one argument is written (x,)"
        )
    if kwargs is not None and not isinstance(kwargs, dict):
        raise TypeError(
            f"kwargs must be a dict of the arguments of {called(func, ())}, got "
            f"{type(kwargs).__name__}"
        )
    return tuple(args or ()), dict(kwargs or {})


def in_words(error: TypeError, func: Any, args: Any) -> TypeError:
    """`error` of packing [func, args, kwargs] under the name "call", with the place in words."""
    what = called(func, args)
    function, positional, named = _places(func, args, ["call[0]", "call[1]", "call[2]"])
    path, colon, sentence = str(error).partition(": ")
    if path == function or path.startswith(f"{function}["):
        owner = "" if path == function else ", which is bound to an object"
        return TypeError(f"the function to call{owner}: {sentence}")
    for prefix in (positional, named):
        if colon and path.startswith(f"{prefix}["):
            which, _, inside = path.removeprefix(f"{prefix}[").partition("]")
            place = f"argument {which} of {what}" + (f", at {inside}" if inside else "")
            return TypeError(f"{place}: {sentence}")
    return error


def _places(func: Any, args: Any, at: list[str]) -> list[str]:
    """The paths of function, args and kwargs in a call, of the one that is called in the end."""
    place = getattr(func, RELAY, None)
    if isinstance(place, int):
        inner = [f"{at[1]}[{place + i}]" for i in range(3)]
        return _places(args[place], args[place + 1], inner)
    return [f"{at[1]}[{i}]" for i in (1, 2, 3)] if func is invoke else at
