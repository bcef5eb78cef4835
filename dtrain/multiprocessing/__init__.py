"""torch.multiprocessing: Python's multiprocessing, and `spawn`, which starts ranks.

Everything of `multiprocessing` is here under the same name. Rule: a tensor that is sent through a
queue or a pipe is copied (PyTorch shares its memory); what ranks should share, they send each other
by `dtrain.distributed`, or take from `dtrain.distributed.empty`.
"""

from __future__ import annotations

import multiprocessing
from multiprocessing import *  # noqa: F403

from dtrain.multiprocessing.spawn import (
    ProcessContext as ProcessContext,
    ProcessException as ProcessException,
    ProcessExitedException as ProcessExitedException,
    ProcessRaisedException as ProcessRaisedException,
    spawn as spawn,
    start_processes as start_processes,
)

__all__ = [
    *multiprocessing.__all__,
    "ProcessContext",
    "ProcessExitedException",
    "ProcessRaisedException",
    "get_all_sharing_strategies",
    "get_sharing_strategy",
    "set_sharing_strategy",
    "spawn",
    "start_processes",
]

_STRATEGIES = frozenset(("file_descriptor", "file_system"))
_strategy = "file_descriptor"


def get_all_sharing_strategies() -> set[str]:
    """PyTorch's names. Source: torch.multiprocessing."""
    return set(_STRATEGIES)


def get_sharing_strategy() -> str:
    """The strategy that was set; "file_descriptor" at first. Source: torch.multiprocessing."""
    return _strategy


def set_sharing_strategy(new_strategy: str) -> None:
    """Taken and kept, without effect: tensors are copied. Source: torch.multiprocessing.

    Raises ValueError for a name that PyTorch does not know.
    """
    global _strategy
    if new_strategy not in _STRATEGIES:
        known = ", ".join(sorted(_STRATEGIES))
        raise ValueError(f"unknown sharing strategy {new_strategy!r} (known: {known})")
    _strategy = new_strategy
