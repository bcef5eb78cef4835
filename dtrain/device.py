"""The device object. dtrain computes on the CPU, so there is one type, "cpu".

Rule: a device names where an array is, nothing else; any index is the same memory, as in torch,
but `cpu` and `cpu:0` compare unequal, as in torch.
"""

from __future__ import annotations

import re
from typing import Any

_DEVICE_STRING = re.compile(r"([a-zA-Z_]+)(?::(0|[1-9][0-9]*))?")
_ADVICE = "dtrain runs on the CPU: use device='cpu'."


class device:
    """device("cpu"), device("cpu:1"), device("cpu", 1) or device(another device).

    Attributes: `type` ("cpu") and `index` (an int or None). As a context manager it changes
    nothing: every tensor is made on the CPU already.
    Errors: RuntimeError for any other type, for an accelerator's number and for a malformed
    string; TypeError for any other argument.
    """

    __slots__ = ("index", "type")

    type: str
    index: int | None

    def __init__(self, type: str | int | device, index: int | None = None) -> None:
        if isinstance(type, device) and index is None:
            self.type, self.index = type.type, type.index
        elif isinstance(type, str):
            self.type, self.index = _parse(type, index)
        elif isinstance(type, int) and not isinstance(type, bool):
            raise RuntimeError(
                f"Cannot access accelerator device when none is available. Got device {type}. "
                + _ADVICE
            )
        else:
            raise TypeError(
                "device() received an invalid combination of arguments - got "
                f"({type.__class__.__name__}), but expected (dtrain.device device) or "
                f"(str type, int index = -1). {_ADVICE}"
            )

    def __repr__(self) -> str:
        index = "" if self.index is None else f", index={self.index}"
        return f"device(type='{self.type}'{index})"

    def __str__(self) -> str:
        return self.type if self.index is None else f"{self.type}:{self.index}"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, device):
            return NotImplemented
        return self.type == other.type and self.index == other.index

    def __hash__(self) -> int:
        return hash((self.type, self.index))

    def __reduce__(self) -> tuple[Any, ...]:
        return device, (str(self),)

    def __enter__(self) -> device:
        return self

    def __exit__(self, *exception: object) -> None:
        return None


def _parse(text: str, index: int | None) -> tuple[str, int | None]:
    if not text:
        raise RuntimeError(f"Device string must not be empty. {_ADVICE}")
    match = _DEVICE_STRING.fullmatch(text)
    if match is None:
        raise RuntimeError(f"Invalid device string: '{text}'. {_ADVICE}")
    kind, digits = match.groups()
    if kind != "cpu":
        raise RuntimeError(
            f"Expected one of cpu device type at start of device string: {text}. {_ADVICE}"
        )
    if digits is not None and index is not None:
        raise RuntimeError(
            "type (string) must not include an index because index was passed explicitly: "
            f"{text}. Use device('{kind}', {index}) or device('{text}')."
        )
    if index is not None and index < 0:
        raise RuntimeError(f"Device index must not be negative, got {index}. {_ADVICE}")
    return kind, index if digits is None else int(digits)


CPU = device("cpu")
