"""Records PyTorch's promotion, casting and limits of dtypes."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch

from tests.recorded.registry import recording

NAMES = (
    *("float32", "float64", "float16", "bfloat16"),
    *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool"),
    *("complex64", "complex128"),
)
SCALARS = {"bool": True, "int": 3, "float": 1.5, "complex": 1j}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _promoted(a: str, b: str) -> str | None:
    try:
        return _name(torch.promote_types(getattr(torch, a), getattr(torch, b)))
    except RuntimeError:
        return None


def _result(a: torch.Tensor, b: torch.Tensor | complex) -> str | None:
    try:
        return _name(torch.result_type(a, b))
    except RuntimeError:
        return None


def _tensor(name: str, ndim: int) -> torch.Tensor:
    return torch.zeros((2,) * ndim, dtype=getattr(torch, name))


def _limits(name: str) -> dict[str, Any]:
    dtype = getattr(torch, name)
    floating = dtype.is_floating_point or dtype.is_complex
    info = torch.finfo(dtype) if floating else torch.iinfo(dtype)
    fields = "bits max min dtype" + (" eps tiny smallest_normal resolution" if floating else "")
    return {"repr": repr(info), **{field: getattr(info, field) for field in fields.split()}}


@recording
def dtypes() -> dict[str, Any]:
    pairs = list(product(NAMES, NAMES))
    return {
        "promote_types": {f"{a} {b}": _promoted(a, b) for a, b in pairs},
        "can_cast": {
            f"{a} {b}": torch.can_cast(getattr(torch, a), getattr(torch, b)) for a, b in pairs
        },
        "result_type": {
            f"{a}[{i}] {b}[{j}]": _result(_tensor(a, i), _tensor(b, j))
            for a, b in pairs
            for i, j in product((0, 1), (0, 1))
        },
        "result_type_scalar": {
            f"{a}[{i}] {kind}": _result(_tensor(a, i), value)
            for a in NAMES
            for i in (0, 1)
            for kind, value in SCALARS.items()
        },
        "limits": {name: _limits(name) for name in NAMES if name != "bool"},
        "attributes": {
            name: {
                field: getattr(getattr(torch, name), field)
                for field in ("is_floating_point", "is_complex", "is_signed", "itemsize")
            }
            for name in NAMES
        },
    }
