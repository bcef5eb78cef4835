"""What must be equal on all ranks when a model is wrapped, and must not happen afterwards.

Owns: the comparison at construction, `Inventory` (parameters that came later) and `Watch` (forward
passes around the wrapper). Rule: an error names the parameter and the rank, and says what to do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from dtrain.autograd.grad_mode import is_grad_enabled
from dtrain.autograd.value import has_part
from dtrain.comm.record import call_site
from dtrain.distributed.objects import all_gather_object
from dtrain.distributed.world import ProcessGroup
from dtrain.nn.modules.module import Module


def describe(name: str, parameter: Any) -> list[Any]:
    """What must be equal on all ranks for a parameter."""
    return [name, str(parameter.dtype), list(parameter.shape)]


def check_same_parameters(named: Sequence[tuple[str, Any]], group: ProcessGroup) -> None:
    """RuntimeError on every rank, naming the first parameter that differs from rank 0's."""
    own = [describe(name, parameter) for name, parameter in named]
    everyone: list[Any] = [None] * group.size()
    all_gather_object(everyone, own, group)
    for rank, theirs in enumerate(everyone[1:], 1):
        if theirs != everyone[0]:
            raise RuntimeError(_difference(everyone[0], theirs, group.ranks[rank]))


def check_arguments(module: Any, delayed: Sequence[Any], every: Any) -> None:
    """Errors for what cannot be wrapped, or is not what its argument is meant to be."""
    if not isinstance(module, Module):
        raise TypeError(f"DistributedDataParallel wraps an nn.Module, got {type(module).__name__}")
    if not isinstance(every, int) or every < 0:
        raise ValueError(f"divergence_check_every is a number of passes, or 0, got {every!r}")
    own = {id(parameter) for parameter in module.parameters()}
    for entry in delayed:
        if not isinstance(entry, (list, tuple)) or len(entry) != 2 or id(entry[1]) not in own:
            named = entry[0] if isinstance(entry, (list, tuple)) and entry else entry
            raise ValueError(
                "delay_all_reduce_named_params has (name, parameter) pairs of the model that is "
                f"wrapped, and {named!r} is none"
            )


def check_parts(named: Sequence[tuple[str, Any]], group: ProcessGroup) -> None:
    """RuntimeError for a parameter that is cut over ranks which the group would average over, or
    that has no values.
    """
    for name, parameter in named:
        if parameter.is_meta:
            raise RuntimeError(
                f"parameter '{name}' is on the meta device: DistributedDataParallel needs values. "
                'Give it some before, by module.to_empty(device="cpu") and reset_parameters()'
            )
        if not has_part(parameter):
            continue
        mesh = parameter.device_mesh
        shared = set(mesh.ranks.reshape(-1).tolist()) & set(group.ranks)
        if len(shared) > 1:
            raise RuntimeError(
                f"parameter '{name}' is a DTensor over {mesh}, whose ranks {sorted(shared)} are in "
                "the group of DistributedDataParallel: their parts would be averaged. Give it the "
                'other axis of a 2-D mesh: device_mesh=mesh["dp"], with the model cut over '
                'mesh["tp"]'
            )


def _difference(first: list[Any], other: list[Any], rank: int) -> str:
    def show(entries: list[Any], i: int) -> str:
        if i >= len(entries):
            return "no such parameter"
        name, dtype, shape = entries[i]
        return f"'{name}' ({dtype}{shape})"

    place = next(
        i for i in range(max(len(first), len(other))) if first[i : i + 1] != other[i : i + 1]
    )
    return (
        f"DDP expects same model across all ranks, but Rank 0 has {len(first)} params, while rank "
        f"{rank} has inconsistent {len(other)} params. The first difference is parameter {place}: "
        f"rank 0 has {show(first, place)}, rank {rank} has {show(other, place)}."
    )


class Inventory:
    """The parameters of `module` when it was wrapped; `check` raises if others have come since.

    A check counts the parameters of the modules that were there: 0.1 us for each of them.
    """

    def __init__(self, module: Module, taken: Sequence[Any], ignored: Sequence[str]) -> None:
        self._module = module
        self._taken = {id(parameter) for parameter in taken}
        self._ignored = set(ignored)
        self._frozen = [p for p in module.parameters() if not p.requires_grad]
        self._modules = list(module.modules())
        self._count = self._counted()

    def _counted(self) -> int:
        return sum(len(m._parameters) + len(m._modules) for m in self._modules)

    def check(self, rank: int) -> None:
        """RuntimeError, naming the parameter, when one came after wrapping or was unfrozen."""
        if self._counted() == self._count and not any(p.requires_grad for p in self._frozen):
            return
        for name, parameter in self._module.named_parameters():
            new = id(parameter) not in self._taken and name not in self._ignored
            if new and parameter.requires_grad:
                raise RuntimeError(
                    f"rank {rank}: parameter '{name}' was added, or began to require a gradient, "
                    "after the model was wrapped in DistributedDataParallel: its gradient would "
                    "not be reduced, and the ranks would drift apart. Change the model first and "
                    "wrap it then, or wrap it again."
                )
        self._count = self._counted()


class Watch:
    """A forward pre-hook of the wrapped module: remembers where it was called around its wrapper.

    Calls while no gradient is recorded are nobody's business. In a copy of the module (deepcopy,
    pickle) it watches nothing that matters: a copy has a watch of its own.
    """

    def __init__(self) -> None:
        self._inside = False
        self._place: str | None = None

    def __call__(self, module: Module, inputs: Any) -> None:
        if not self._inside and is_grad_enabled():
            self._place = call_site()

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """The wrapper calls the module: what happened before is forgotten."""
        self._inside, self._place = True, None
        try:
            yield
        finally:
            self._inside = False

    def place(self) -> str | None:
        """Where ("file:line") the module was called directly, after the wrapper's last call."""
        return self._place
