"""Neural networks: modules, their parameters, functions and initialisation.

Everything public is in this module's dictionary, so that `getattr(nn, name)` and `dir(nn)` work;
`nn.parallel`, which needs the distributed runtime, loads at its first use. Source: torch.nn.
"""

from __future__ import annotations

import importlib
from typing import Any

from dtrain.missing import missing_name
from dtrain.nn import functional as functional, init as init, modules as modules, utils as utils
from dtrain.nn.modules import *  # noqa: F403  (the list of names is modules.__all__)
from dtrain.nn.parameter import Buffer as Buffer, Parameter as Parameter

_LAZY = ("parallel",)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return importlib.import_module(f"dtrain.nn.{name}")
    raise missing_name("dtrain.nn", name, __dir__)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
