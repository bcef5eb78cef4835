"""`skip_init`: a module whose parameters have memory and no first values yet.

For those who are about to load or draw values of their own: drawing costs more than the rest of
making a module. Source: torch.nn.utils.init.
"""

from __future__ import annotations

import inspect
from typing import Any

from dtrain.nn.modules.module import Module


def skip_init(module_cls: type[Module], *args: Any, **kwargs: Any) -> Any:
    """`module_cls(*args, **kwargs)` with arbitrary values in its parameters and buffers.

    The class must take `device` and hand it to all that it makes: it is made on the meta device and
    moved to `device` (default the CPU) by `to_empty`. RuntimeError for a class that does not.
    Source: torch.nn.utils.skip_init.
    """
    if not (isinstance(module_cls, type) and issubclass(module_cls, Module)):
        raise RuntimeError(f"Expected a Module; got {module_cls}")
    if "device" not in inspect.signature(module_cls).parameters:
        raise RuntimeError("Module must support a 'device' arg to skip initialization")
    place = kwargs.pop("device", "cpu")
    return module_cls(*args, **kwargs, device="meta").to_empty(device=place)
