"""The device object, and on which one tensors are made. There are two types: "cpu", where dtrain
computes, and "meta", where tensors have a shape and a dtype but no values (dtrain/meta.py).

Rule: a device names where an array is, nothing else; any index is the same memory, as in torch,
but `cpu` and `cpu:0` compare unequal, as in torch. The device on which factories make tensors is a
context variable: a rank that is a thread has its own.
"""

from __future__ import annotations

import re
from contextvars import ContextVar
from typing import Any

_DEVICE_STRING = re.compile(r"([a-zA-Z_]+)(?::(0|[1-9][0-9]*))?")
_ADVICE = "dtrain runs on the CPU: use device='cpu'."
_KINDS = ("cpu", "meta")


class device:
    """device("cpu"), device("cpu:1"), device("cpu", 1), device("meta") or device(another device).

    Attributes: `type` ("cpu" or "meta") and `index` (an int or None). As a context manager it says
    where factories that are given no device make tensors.
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
        _entered.set((*_entered.get(), self))
        return self

    def __exit__(self, *exception: object) -> None:
        _entered.set(_entered.get()[:-1])


def _parse(text: str, index: int | None) -> tuple[str, int | None]:
    if not text:
        raise RuntimeError(f"Device string must not be empty. {_ADVICE}")
    match = _DEVICE_STRING.fullmatch(text)
    if match is None:
        raise RuntimeError(f"Invalid device string: '{text}'. {_ADVICE}")
    kind, digits = match.groups()
    if kind not in _KINDS:
        raise RuntimeError(
            f"Expected one of cpu, meta device type at start of device string: {text}. {_ADVICE}"
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
META = device("meta")

_entered: ContextVar[tuple[device, ...]] = ContextVar("dtrain_devices_entered", default=())
_default: ContextVar[device] = ContextVar("dtrain_default_device", default=CPU)


def set_default_device(device: device | str | None) -> None:
    """Where factories make tensors in this thread, outside of `with device(...)`; None: the CPU.

    Source: torch.set_default_device.
    """
    _default.set(CPU if device is None else _as_device(device))


def get_default_device() -> device:
    """Where factories that are given no device make tensors. Source: torch.get_default_device."""
    entered = _entered.get()
    return entered[-1] if entered else _default.get()


def on_meta(given: Any) -> bool:
    """Whether what a factory makes, called with `device=given`, shall have no values.

    RuntimeError for what is no device.
    """
    if given is None:
        return get_default_device().type == "meta"
    return _as_device(given).type == "meta"


def on_cpu(given: Any, what: str) -> device:
    """`given` as a device, for what needs values. RuntimeError that names `what` elsewhere."""
    found = _as_device(given)
    if found.type != "cpu":
        raise RuntimeError(f"{what} on the {found} device: it needs values. {_ADVICE}")
    return found


def _as_device(given: Any) -> device:
    return given if given.__class__ is device else device(given)
