"""Plans and metadata as plain data, so that they travel between ranks without pickle.

`pack` replaces the dataclasses and enums of this package by tagged tuples, `unpack` makes them
again; a name that is not in the table is refused, so nothing a rank sends can run code.
"""

from __future__ import annotations

import dataclasses
from enum import Enum
from typing import Any

from dtrain.distributed.checkpoint import metadata, planner, storage

_TAG = "\0checkpoint"
_KNOWN: dict[str, Any] = {
    name: cls
    for module in (metadata, planner, storage)
    for name, cls in vars(module).items()
    if isinstance(cls, type) and (dataclasses.is_dataclass(cls) or issubclass(cls, Enum))
}


def pack(value: Any) -> Any:
    """`value` with tagged tuples for dataclasses and enums, at any depth."""
    name = type(value).__name__
    if _KNOWN.get(name) is type(value):
        if isinstance(value, Enum):
            return (_TAG, name, value.name)
        fields = {f.name: pack(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return (_TAG, name, fields)
    if type(value) is dict:
        return {pack(key): pack(entry) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(pack, value))
    return value


def unpack(value: Any) -> Any:
    """What `pack` was given; ValueError for a class that is not in the table."""
    if type(value) is tuple and value[:1] == (_TAG,):
        _, name, content = value
        if name not in _KNOWN:
            raise ValueError(f"a rank sent a {name!r}, which is no part of a plan")
        cls = _KNOWN[name]
        if issubclass(cls, Enum):
            return cls[content]
        return cls(**{key: unpack(entry) for key, entry in content.items()})
    if type(value) is dict:
        return {unpack(key): unpack(entry) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(unpack, value))
    return value
