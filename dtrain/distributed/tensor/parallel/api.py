"""`parallelize_module`: which sub-module is cut how, by name.

Source: torch.distributed.tensor.parallel.api.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch

from dtrain.distributed.device_mesh import DeviceMesh
from dtrain.distributed.tensor.parallel.style import ParallelStyle
from dtrain.nn.modules.module import Module


def parallelize_module(
    module: Module,
    device_mesh: DeviceMesh | None = None,
    parallelize_plan: ParallelStyle | Mapping[str, ParallelStyle] | None = None,
    *,
    src_data_rank: int | None = 0,
) -> Module:
    """Cut a module's layers over a mesh of one axis, in place; returns the module.

    `parallelize_plan`: a style for the module itself, or styles by the names of sub-modules, in
    which `*` stands for any part of one name ("layers.*.up"). Warns of a name that nothing has.
    Parameters get the values of rank `src_data_rank` of the mesh; None: each rank cuts its own. All
    ranks of the mesh call it; it blocks for one collective a parameter (none with None).
    """
    if device_mesh is None:
        raise RuntimeError("parallelize_module needs a device_mesh (see init_device_mesh)")
    if device_mesh.ndim != 1:
        raise ValueError(
            f"parallelize_module works along one axis, {device_mesh} has {device_mesh.ndim}: take "
            'a slice of it, such as mesh["tp"]'
        )
    if parallelize_plan is None:
        warnings.warn(
            "No parallelize_plan is provided and auto-parallel is not supported at the moment, "
            "so this parallelize_module call will do nothing.",
            stacklevel=2,
        )
        return module
    if isinstance(parallelize_plan, ParallelStyle):
        parallelize_plan.src_data_rank = src_data_rank
        return parallelize_plan._apply(module, device_mesh)
    for path, style in parallelize_plan.items():
        found = list(_matching(module, path.split(".") if path else []))
        if not found:
            warnings.warn(
                f"Parallelize plan key {path!r} could not be resolved: no submodule matching it",
                stacklevel=2,
            )
        for child in found:
            parallelize_module(child, device_mesh, style, src_data_rank=src_data_rank)
    return module


def _matching(module: Module, names: list[str]) -> Iterator[Module]:
    """The sub-modules at a path whose parts may hold wildcards."""
    if not names:
        yield module
        return
    for name, child in module.named_children():
        if fnmatch(name, names[0]):
            yield from _matching(child, names[1:])
