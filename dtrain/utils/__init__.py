"""Utilities at torch.utils' names and paths.

Sub-packages load at their first use: a program that brings its own batches loads no loader.
"""

from __future__ import annotations

import importlib
from typing import Any

_LAZY = frozenset(("checkpoint", "collect_env", "data"))


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return importlib.import_module(f"dtrain.utils.{name}")
    raise AttributeError(f"module 'dtrain.utils' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
