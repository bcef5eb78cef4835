"""Collectives through which gradients flow, and modules on other workers.

`functional` has the collectives, which are shown here as well, as in torch; `RemoteModule` (of
api/remote_module.py) is loaded when it is first asked for. Source: torch.distributed.nn.
"""

from __future__ import annotations

import importlib
from typing import Any

from dtrain.distributed.nn import functional as functional
from dtrain.distributed.nn.functional import (
    _all_gather_base as _all_gather_base,
    all_gather as all_gather,
    all_reduce as all_reduce,
    all_to_all as all_to_all,
    all_to_all_single as all_to_all_single,
    broadcast as broadcast,
    gather as gather,
    reduce as reduce,
    reduce_scatter as reduce_scatter,
    scatter as scatter,
)


def __getattr__(name: str) -> Any:
    if name == "RemoteModule":
        return importlib.import_module("dtrain.distributed.nn.api.remote_module").RemoteModule
    raise AttributeError(f"module 'dtrain.distributed.nn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), "RemoteModule"})
