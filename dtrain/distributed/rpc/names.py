"""Functions and classes by their names: what another worker may call here.

Owns: `name_of` and `resolve`. May be called: functions and classes of the program's own modules
(whose files are neither the standard library's nor an installed package's), dtrain's tensor
functions, modules and optimizers, and whatever was `export`ed. Rules: 1. a name leads from a module
through classes only, to the object that itself has this name: never to what a module merely
imported. 2. A module is imported for a caller only where the program could import it as its own.
"""

from __future__ import annotations

import importlib.util
import sys
import sysconfig
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

# dtrain's own: on tensors and layers, not on files, sockets or processes.
_DTRAIN = (
    *("dtrain.ops", "dtrain.tensor", "dtrain.methods", "dtrain.nn.modules", "dtrain.optim"),
    *("dtrain.nn.functional", "dtrain.nn.init"),
    *("dtrain.distributed.autograd.calls", "dtrain.distributed.optim.optimizer"),
    "dtrain.distributed.nn.api.remote_module",
)
_MAIN = ("__main__", "__mp_main__")

_exported: dict[tuple[str, str], Any] = {}


def export(function: T) -> T:
    """Let other workers call `function` (or class) by its name, wherever it comes from.

    A decorator. Not in torch: functions of the program's own modules need it not.
    """
    _exported[_full_name(function)] = function
    return function


def _full_name(function: Any) -> tuple[str, str]:
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(name, str):
        raise TypeError(f"expected a function or class, got {type(function).__name__}")
    return ("__main__" if module in _MAIN else module), name


def name_of(function: Any) -> list[str]:
    """[module, qualified name] by which another worker finds `function`; TypeError if it cannot."""
    module, name = _full_name(function)
    if resolve(module, name) is not function:
        raise TypeError(f"{module}.{name} is not the object of this name: it was replaced")
    return [module, name]


def resolve(module: str, name: str) -> Any:
    """The function or class `module.name`; TypeError unless others may call it.

    May import a module of the program.
    """
    if (module, name) in _exported:
        return _exported[module, name]
    if "<" in name:
        raise TypeError(f"{module}.{name} has no name by which another worker would find it (a "
                        "lambda, or made inside a function)")  # fmt: skip
    if not _is_open(module):
        raise TypeError(
            f"{module}.{name} may not be called by other workers: it is not of the program's own "
            "modules. Wrap it in a function of the program, or allow it with rpc.export"
        )
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        if found is not sys.modules[module] and not isinstance(found, type):
            raise TypeError(f"{module}.{name} leads through something that is not a class")
        found = vars(found).get(part) or getattr(found, part, None)
        found = found.__func__ if isinstance(found, staticmethod) else found
    if isinstance(found, classmethod):
        owner = resolve(module, name.rpartition(".")[0])
        found = getattr(owner, name.rpartition(".")[2])
    if not callable(found) or _full_name(found) != (module, name):
        raise TypeError(f"{module} has no function or class {name!r} of its own on this worker")
    return found


@cache
def _installed() -> tuple[Path, ...]:
    """The folders of the standard library and of installed packages."""
    kinds = ("stdlib", "platstdlib", "purelib", "platlib")
    return tuple({Path(sysconfig.get_path(kind)).resolve() for kind in kinds})


@cache
def _is_open(module: str) -> bool:
    """Whether functions and classes of `module` may be called."""
    top = module.partition(".")[0]
    if top == "dtrain":
        return any(module == m or module.startswith(m + ".") for m in _DTRAIN)
    if module == "__main__":
        return True
    if top in sys.stdlib_module_names:
        return False
    try:
        spec = importlib.util.find_spec(top)  # the top alone: finding `a.b` imports `a`
    except (ImportError, ValueError):
        return False
    places = [] if spec is None else [spec.origin, *(spec.submodule_search_locations or ())]
    files = [Path(place).resolve() for place in places if place]
    return bool(files) and not any(
        file.is_relative_to(folder) for file in files for folder in _installed()
    )
