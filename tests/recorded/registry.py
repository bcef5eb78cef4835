"""The registry of recordings, and how one is written.

A function decorated with `@recording` gives its name to one file here: `<name>.npz` when it returns
{key: tensor or array}, `<name>.json` when it returns anything else that JSON can hold.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.recorded import FOLDER, load, load_json

RECORDINGS: dict[str, Callable[[], Any]] = {}


def recording(function: Callable[[], Any]) -> Callable[[], Any]:
    """Register `function`; its name is the file's. ValueError when another one has the name."""
    name = function.__name__
    if name in RECORDINGS:
        raise ValueError(f"two recordings are named {name!r}: rename one of the functions")
    RECORDINGS[name] = function
    return function


def write(name: str) -> str:
    """Record `name`; the file is left alone when it says the same already. Returns a report."""
    values = RECORDINGS[name]()
    if isinstance(values, dict) and all(_is_array(v) for v in values.values()):
        arrays = {key: _as_array(value) for key, value in values.items()}
        path = FOLDER / f"{name}.npz"
        if not (path.exists() and _same(arrays, load(name))):
            np.savez_compressed(path, allow_pickle=False, **arrays)
    else:
        path = FOLDER / f"{name}.json"
        if not (path.exists() and load_json(name) == values):
            path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    return f"{path.name}: {len(values)} entries, {path.stat().st_size} bytes"


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray) or hasattr(value, "detach")


def _as_array(value: Any) -> np.ndarray:
    if isinstance(value, np.ndarray):
        return value
    value = value.detach()
    return (value.float() if str(value.dtype) == "torch.bfloat16" else value).numpy()


def _same(new: dict[str, np.ndarray], old: Any) -> bool:
    return new.keys() == old.keys() and all(
        new[key].dtype == old[key].dtype and np.array_equal(new[key], old[key], equal_nan=False)
        for key in new
    )
