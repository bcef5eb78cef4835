"""Values for modules that a wrapper is given on the meta device, before their parameters are cut.

Owns: which modules a wrapper gives values to, how (`param_init_fn`, or `reset_parameters`), and the
first rank's values for all. Rule: what has a wrapper of its own below has had its turn, so that a
rank never holds more than one wrapper's parameters whole. Source: torch.distributed.fsdp.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

from dtrain.autograd.grad_mode import no_grad
from dtrain.distributed.device_mesh import DeviceMesh
from dtrain.distributed.fsdp.state import state_of
from dtrain.nn.modules.module import Module
from dtrain.nn.parallel.distributed import copy_from

Init = Callable[[Module], None]


def give_values(
    module: Module, init: Init | None, ignored: Collection[Module], kept: Collection[int]
) -> None:
    """If parameters or buffers of `module` are on the meta device, call `init` on it and all below,
    parents first; without one `to_empty` and `reset_parameters` on those that have tensors.

    Not on modules in `ignored` or below them, nor on those that have units. `kept`: ids of tensors
    that stay as they are. ValueError when `init` cannot be called; RuntimeError for a module that
    has nothing to give its tensors values with.
    """
    own = list(own_modules(module, ignored))
    if not any(t.is_meta for each in own for t in _tensors(each) if id(t) not in kept):
        return
    if init is not None and not callable(init):
        raise ValueError(f"Expected {init} to be callable but got {type(init)}")
    for each in own:
        if init is not None:
            init(each)
        elif any(t.is_meta for t in _tensors(each)):
            _reset(each)


def _reset(module: Module) -> None:
    reset: Any = getattr(module, "reset_parameters", None)
    if reset is None:
        raise RuntimeError(
            "Unable to call `reset_parameters()` for module on meta device. Please ensure that "
            f"your module of type {type(module)} implements a `reset_parameters()` method, or give "
            "FullyShardedDataParallel a param_init_fn."
        )
    module.to_empty(device="cpu", recurse=False)
    with no_grad():
        reset()


def begin_with_the_first(
    module: Module, mesh: DeviceMesh, ignored: Collection[Module], kept: Collection[int]
) -> None:
    """Give all ranks of the mesh the first one's parameters and buffers, but for those below that
    have units, and were given them. RuntimeError where there are no values.
    """
    found = {
        id(t): t for each in own_modules(module, ignored) for t in _tensors(each)
        if id(t) not in kept and not hasattr(t, "_fsdp")
    }  # fmt: skip
    empty = [name for name, t in module.named_parameters() if id(t) in found and t.is_meta]
    if empty:
        raise RuntimeError(
            f"sync_module_states: {empty} have no values yet, on the meta device. param_init_fn "
            'must give memory to them, by module.to_empty(device="cpu", recurse=False)'
        )
    for axis in reversed(range(mesh.ndim)):  # within the shares, then from the first of them
        copy_from(0, list(found.values()), mesh.get_group(axis))


def own_modules(module: Module, ignored: Collection[Module]) -> Iterator[Module]:
    """The module and those below it that have no units, one level after the other."""
    waiting, seen = deque([module]), {id(module)}
    while waiting:
        each = waiting.popleft()
        yield each
        for child in each.children():
            if id(child) not in seen and state_of(child) is None and child not in ignored:
                seen.add(id(child))
                waiting.append(child)


def _tensors(module: Module) -> Iterable[Any]:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)
