"""How a tensor is shown: torch's layout and rounding (4 digits, edges of long tensors)."""

from __future__ import annotations

from typing import Any

import numpy as np

from dtrain import dtypes


def tensor_repr(tensor: Any) -> str:
    """`tensor([...], dtype=..., requires_grad=True)` as torch writes it, with our dtype names."""
    array = tensor._data
    text = np.array2string(
        array, separator=", ", precision=4, threshold=1000, edgeitems=3, prefix="tensor("
    )
    suffix = []
    if tensor.dtype not in (dtypes.get_default_dtype(), dtypes.int64, dtypes.bool_):
        suffix.append(f"dtype={tensor.dtype!r}")
    if tensor.grad_fn is not None:
        suffix.append(f"grad_fn=<{tensor.grad_fn.name()}>")
    elif tensor.requires_grad:
        suffix.append("requires_grad=True")
    return f"tensor({', '.join([text, *suffix])})"
