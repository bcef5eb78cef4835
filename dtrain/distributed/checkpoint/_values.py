"""Values that are no tensors as JSON, and back, the same to the last bit and type.

What JSON does not know is a dict with one key that begins with "!": tuples, bytes, dtypes, dicts
with other keys than str, inf and nan. Everything else raises TypeError with its path: no pickle.
"""

from __future__ import annotations

import base64
import json
import math
from typing import Any

from dtrain import dtypes
from dtrain.dtypes import dtype
from dtrain.tensor import Size

_PLAIN = (bool, int, float)


def to_json(value: Any, path: str) -> Any:
    """`value` as what `json.dumps` takes; TypeError names the part that cannot be."""
    kind = type(value)
    if kind is float and not math.isfinite(value):
        return {"!float": str(value)}
    if value is None or kind in _PLAIN:
        return value
    if kind is str:
        return _text(value, path)
    if kind is list:
        return [to_json(v, f"{path}[{i}]") for i, v in enumerate(value)]
    if kind in (tuple, Size):
        return {"!tuple": [to_json(v, f"{path}[{i}]") for i, v in enumerate(value)]}
    if isinstance(value, dict):
        if all(type(k) is str and not k.startswith("!") for k in value):
            return {k: to_json(v, f"{path}.{k}") for k, v in value.items()}
        pairs = value.items()
        return {"!dict": [[to_json(k, path), to_json(v, f"{path}.{k}")] for k, v in pairs]}
    if kind in (bytes, bytearray):
        return {"!bytes": base64.b64encode(value).decode()}
    if kind is dtype:
        return {"!dtype": value.name}
    raise TypeError(
        f"{path}: a {kind.__module__}.{kind.__qualname__} cannot be in a checkpoint, which holds "
        "tensors, arrays, and None, bool, int, float, str, bytes, list, tuple, dict and dtype. "
        "Save what it is made of (a NumPy scalar: .item())."
    )


def _text(value: str, path: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise TypeError(f"{path}: a text that is not UTF-8 ({error}): save it as bytes") from None
    return value


def from_json(value: Any) -> Any:
    """What `to_json` was given; ValueError for a tag that is not known."""
    if type(value) is list:
        return [from_json(v) for v in value]
    if type(value) is not dict:
        return value
    tag = next(iter(value), "")
    if not tag.startswith("!"):
        return {k: from_json(v) for k, v in value.items()}
    content = value[tag]
    if tag == "!tuple":
        return tuple(from_json(content))
    if tag == "!dict":
        return {from_json(k): from_json(v) for k, v in content}
    if tag == "!bytes":
        return base64.b64decode(content, validate=True)
    if tag == "!float":
        return float(content)
    if tag == "!dtype":
        return dtypes.BY_NAME[content]
    raise ValueError(f"a value with the unknown tag {tag!r}")


def dumped(value: Any, path: str) -> bytes:
    """The JSON text of one value."""
    return json.dumps(to_json(value, path)).encode()
