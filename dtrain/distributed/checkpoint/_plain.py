"""Plans and metadata as bytes, so that they travel between ranks without pickle.

`encode` writes the dataclasses and enums of this package by name and position, `decode` makes them
again; a name that is not in the table is refused, so nothing a rank sends can run code. Other
values are those of `distributed.codec`. The serializer's own loop sees what it knows; only the rest
is looked at here: a plan of a thousand pieces costs the core that trains as little as it can.
"""

from __future__ import annotations

import dataclasses
from enum import Enum
from typing import Any

import msgpack

from dtrain.distributed import codec
from dtrain.distributed.checkpoint import metadata, planner, storage
from dtrain.tensor import Size

_KNOWN: dict[str, Any] = {
    name: cls
    for module in (metadata, planner, storage)
    for name, cls in vars(module).items()
    if isinstance(cls, type) and (dataclasses.is_dataclass(cls) or issubclass(cls, Enum))
}
_FIELDS = {
    cls: tuple(field.name for field in dataclasses.fields(cls))
    for cls in _KNOWN.values()
    if dataclasses.is_dataclass(cls)
}
_TAG = "\0checkpoint"  # the only key of a map that stands for something else: [what, content...]
_TUPLE, _SIZE, _OTHER = range(3)  # what, unless it is a name
_SEQUENCES: dict[int, Any] = {_TUPLE: tuple, _SIZE: Size}
_MALFORMED = (ValueError, TypeError, LookupError, OverflowError, msgpack.UnpackException)


def encode(value: Any) -> bytes:
    """The bytes of `value`; TypeError for what is neither part of a plan nor plain data."""
    packed: bytes = msgpack.packb(value, default=_told, strict_types=True, use_bin_type=True)
    return packed


def _told(value: Any) -> dict[str, list[Any]]:
    """What the serializer does not know, in what it does."""
    cls = type(value)
    fields = _FIELDS.get(cls)
    if fields is not None:
        return {_TAG: [cls.__name__, *[getattr(value, name) for name in fields]]}
    if cls is tuple or cls is Size:
        return {_TAG: [_TUPLE if cls is tuple else _SIZE, *value]}
    if _KNOWN.get(cls.__name__) is cls:
        return {_TAG: [cls.__name__, value.name]}
    return {_TAG: [_OTHER, codec.encode(value)]}


def decode(data: bytes) -> Any:
    """The value of `encode`'s bytes; ValueError for anything malformed, and for a class that is not
    in the table.
    """
    try:
        return msgpack.unpackb(data, raw=False, strict_map_key=False, object_hook=_made)
    except _MALFORMED as error:
        raise ValueError(f"malformed plan from another rank: {error}") from None


def _made(read: dict[Any, Any]) -> Any:
    """A map that was read, or what it stands for."""
    if len(read) != 1 or _TAG not in read:
        return read
    what, *content = read[_TAG]
    if what == _OTHER:
        return codec.decode(content[0])
    if what in _SEQUENCES:
        return _SEQUENCES[what](content)
    if what not in _KNOWN:
        raise ValueError(f"a rank sent a {what!r}, which is no part of a plan")
    cls = _KNOWN[what]
    return cls[content[0]] if issubclass(cls, Enum) else cls(*content)
