"""What an AttributeError says: torch's sentence, and the nearest of the names there are.

The sentence is put together when it is read: `hasattr` and `getattr(x, name, default)`, which
throw the error away, must stay cheap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any


class _Sentence:
    def __init__(self, text: str, name: str, names: Callable[[], Iterable[str]]) -> None:
        self.text, self.name, self.names = text, name, names

    def __str__(self) -> str:
        import difflib

        near = difflib.get_close_matches(self.name, list(self.names()), n=1, cutoff=0.8)
        return f"{self.text}. Did you mean: '{near[0]}'?" if near else self.text

    __repr__ = __str__

    def __reduce__(self) -> tuple[Any, ...]:
        return str, (str(self),)


def missing_attribute(text: str, name: str, names: Callable[[], Iterable[str]]) -> AttributeError:
    """An AttributeError that names the nearest of `names()`."""
    # With obj=None Python adds no suggestion of its own to the traceback.
    return AttributeError(_Sentence(text, name, names), name=name, obj=None)


def missing_name(module: str, name: str, names: Callable[[], Iterable[str]]) -> AttributeError:
    """The error of a module that lacks a name PyTorch may have."""
    text = f"module {module!r} has no attribute {name!r}: dtrain does not have it (yet)"
    return missing_attribute(text, name, names)
