"""Values recorded from PyTorch, read by tests that run without it; README.md lists the files.

`load(name)` gives a recording's arrays by key, `load_json(name)` a recording of plain values.
Recording is `python -m tests.record_torch`; the functions that record are in tests/record_*.py.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent


@functools.cache
def load(name: str) -> Mapping[str, np.ndarray]:
    """The arrays of recording `name`, read-only; bfloat16 values are recorded as float32."""
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as arrays:
        found = dict(arrays)
    for array in found.values():
        array.setflags(write=False)
    return MappingProxyType(found)


def load_json(name: str) -> Any:
    """The plain values of recording `name`, read afresh."""
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def under(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The arrays whose key starts with `prefix`/, by the rest of their key: one state_dict."""
    start = f"{prefix}/"
    found = {key.removeprefix(start): a for key, a in arrays.items() if key.startswith(start)}
    if not found:
        raise KeyError(f"no recorded key starts with {start!r}")
    return found
