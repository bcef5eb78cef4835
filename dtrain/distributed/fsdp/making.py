"""Which parameters become a unit: what both faces of the engine do with the modules they are given.

`fully_shard` and `FullyShardedDataParallel` differ in who gets the hooks and the verbs; what is
sharded, how parameters are found and grouped, is said here once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np

from dtrain.distributed.device_mesh import DeviceMesh
from dtrain.distributed.fsdp.policies import MixedPrecisionPolicy
from dtrain.distributed.fsdp.state import ModuleState
from dtrain.distributed.fsdp.unit import Precision, Slot, Unit
from dtrain.nn.modules.module import Module


def make_state(
    modules: Sequence[Module],
    mesh: DeviceMesh,
    precision: MixedPrecisionPolicy,
    reshard_after_forward: bool | None,
    ignored: Collection[int],
    *,
    offload: bool = False,
) -> ModuleState:
    """Shard all parameters below `modules` that belong to no unit yet, one unit for each dtype.

    `ignored`: the ids of parameters that stay as they are. The hooks of forward are those of
    `modules`. `offload`: what a rank keeps is in files. Waits for all ranks of the mesh.
    """
    found = _parameters(modules, ignored)
    units = [
        Unit([slots for _, slots in same], [p for p, _ in same], mesh, _dtypes(dtype, precision),
             given_back=reshard_after_forward is True, offload=offload)
        for dtype, same in _by_dtype(found).items()
    ]  # fmt: skip
    state = ModuleState(modules, units, reshard_after_forward, precision)
    for module in modules:
        module.__dict__["_fsdp_state"] = state
    return state


def _parameters(
    modules: Iterable[Module], ignored: Collection[int]
) -> list[tuple[Any, list[Slot]]]:
    """Parameters below `modules` that belong to no unit, each with all its places."""
    found: dict[int, tuple[Any, list[Slot]]] = {}
    for top in modules:
        for path, module in top.named_modules():
            for name, parameter in module._parameters.items():
                if parameter is None or id(parameter) in ignored:
                    continue
                if getattr(parameter, "_fsdp", None) is not None:
                    continue
                full = f"{path}.{name}" if path else name
                if parameter.ndim == 0:
                    raise ValueError(
                        f"fully_shard doesn't support scalar parameters. Change {full} to a 1D "
                        "tensor with numel equal to 1."
                    )
                slots = found.setdefault(id(parameter), (parameter, []))[1]
                slots.append(Slot(module, name, full))
    return list(found.values())


def _by_dtype(found: Iterable[Any]) -> dict[np.dtype[Any], list[Any]]:
    by: dict[np.dtype[Any], list[Any]] = {}
    for parameter, slots in found:
        by.setdefault(parameter._data.dtype, []).append((parameter, slots))
    return by


def _dtypes(own: np.dtype[Any], policy: MixedPrecisionPolicy) -> Precision:
    whole = own if policy.param_dtype is None or own.kind in "iub" else policy.param_dtype.numpy
    return Precision(whole, whole if policy.reduce_dtype is None else policy.reduce_dtype.numpy)
