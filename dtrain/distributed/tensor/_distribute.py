"""Tensors and modules onto a mesh: `distribute_tensor`, `distribute_module`.

A whole tensor is cut without a message where every rank has it (`src_data_rank=None`); by default
the values of one rank count, and it hands out the parts. Source: torch.distributed.tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from dtrain.autograd.node import make
from dtrain.autograd.value import need_whole
from dtrain.comm import collectives as calls
from dtrain.distributed.device_mesh import DeviceMesh
from dtrain.distributed.tensor._api import DTensor, wrap
from dtrain.distributed.tensor._dtensor_spec import DTensorSpec, chunk_of, cutting_order
from dtrain.distributed.tensor.placement_types import Placement, normalized
from dtrain.distributed.world import ProcessGroup
from dtrain.nn.modules.module import Module
from dtrain.nn.parameter import Parameter
from dtrain.tensor import Tensor


def distribute_tensor(
    tensor: Tensor,
    device_mesh: DeviceMesh | None = None,
    placements: Sequence[Placement] | None = None,
    *,
    src_data_rank: int | None = 0,
) -> DTensor:
    """A leaf DTensor with the values of `tensor`, cut as `placements` say (default: replicated).

    All ranks of the mesh call it with tensors of one shape. The values are those of rank
    `src_data_rank` along each axis, which sends everybody his part: blocks for one collective an
    axis, at most the groups' timeouts. With None each rank cuts its own tensor and nothing is
    sent. ValueError for `Partial`. A DTensor is returned as it is when it lies so already.
    """
    if device_mesh is None:
        raise RuntimeError("distribute_tensor needs a device_mesh (see init_device_mesh)")
    places = normalized(placements, device_mesh.ndim, tensor.ndim)
    if any(p.is_partial() for p in places):
        raise ValueError(f"distribute_tensor: Partial is no way to cut a tensor, got {places}")
    if not tensor.is_leaf:
        raise RuntimeError(
            "`distribute_tensor` should be used to distribute leaf tensors! but found non-leaf "
            "tensor!"
        )
    if isinstance(tensor, DTensor):
        return _already(tensor, device_mesh, places)
    need_whole("distribute_tensor", tensor)
    spec = DTensorSpec(device_mesh, places, tuple(tensor.shape))
    if src_data_rank is None:
        own = _cut(tensor._data, spec.box)
    else:
        own = _handed_out(tensor._data, spec, src_data_rank)
    result = wrap(make(own), spec)
    return result.requires_grad_(tensor.requires_grad)  # type: ignore[return-value]


def _already(tensor: DTensor, mesh: DeviceMesh, places: Any) -> DTensor:
    if tensor.device_mesh != mesh:
        raise ValueError(f"Cannot distribute a DTensor with device mesh {tensor.device_mesh} to a "
                         f"different device mesh {mesh}.")  # fmt: skip
    if tensor.placements != places:
        raise ValueError(f"Cannot distribute a DTensor with placements {tensor.placements} to a "
                         f"different placements {places}. do you want to call `redistribute` "
                         "instead?")  # fmt: skip
    return tensor


def _cut(whole: Any, box: Any) -> Any:
    """A copy of a box of an array."""
    return whole[tuple([slice(o, o + n) for o, n in zip(*box, strict=True)])].copy()


def _handed_out(whole: Any, spec: DTensorSpec, source: int) -> Any:
    """This rank's part of what the rank at place (source, source, ...) has.

    One axis after the other: the rank at `source` of the axis hands on what it has got itself.
    """
    mesh, held = spec.mesh, np.array(whole, order="C")
    cutting = cutting_order(spec.placements)
    if not 0 <= source < min(mesh.shape):
        raise ValueError(f"src_data_rank {source} is not a rank of every axis of {mesh}")
    for axis in (*cutting, *(a for a in range(mesh.ndim) if a not in cutting)):
        group = mesh.get_group(axis)
        if axis in cutting:
            dim: int = spec.placements[axis].dim  # type: ignore[attr-defined]
            held = _scattered(held, dim, group, source)
        elif group.size() > 1:
            group.issue(calls.Broadcast(held, source))
    return held


def _scattered(held: Any, dim: int, group: ProcessGroup, source: int) -> Any:
    """This rank's part, along `dim`, of what rank `source` of the group holds."""
    me, n = group.rank(), group.size()
    pieces = [chunk_of(held.shape[dim], n, rank) for rank in range(n)]
    lead = (slice(None),) * dim
    own = held[(*lead, slice(pieces[me][0], sum(pieces[me])))]
    out = np.empty(own.shape, held.dtype)
    given = [held[(*lead, slice(a, a + k))].reshape(-1) for a, k in pieces] if me == source else []
    flat = np.concatenate(given) if given else np.empty(0, held.dtype)
    sent = [part.size for part in given] or [0] * n
    received = [out.size if rank == source else 0 for rank in range(n)]
    group.issue(calls.AllToAll(flat, out.reshape(-1), sent, received))
    return out


def distribute_module(
    module: Module,
    device_mesh: DeviceMesh | None = None,
    partition_fn: Callable[[str, Module, DeviceMesh], None] | None = None,
    input_fn: Callable[[Module, Any, DeviceMesh], Any] | None = None,
    output_fn: Callable[[Module, Any, DeviceMesh], Any] | None = None,
) -> Module:
    """Make the parameters and buffers of a module DTensors, in place; returns the module.

    `partition_fn(name, module, mesh)` is called for every sub-module and may do so as it likes; the
    others become replicated, with the values of the first rank. `input_fn(module, inputs, mesh)`
    and `output_fn(module, outputs, mesh)` run around the module's forward and may change what goes
    in and comes out. Blocks for the messages of `distribute_tensor`.
    """
    if device_mesh is None:
        raise RuntimeError("distribute_module needs a device_mesh (see init_device_mesh)")
    mesh = device_mesh
    for name, child in module.named_modules():
        if partition_fn is not None:
            partition_fn(name, child, mesh)
        distribute_own(child, mesh)
    if input_fn is not None:
        module.register_forward_pre_hook(lambda mod, inputs: input_fn(mod, inputs, mesh))
    if output_fn is not None:
        module.register_forward_hook(lambda mod, inputs, out: output_fn(mod, out, mesh))
    return module


def distribute_own(
    module: Module,
    mesh: DeviceMesh,
    placements: Mapping[str, Sequence[Placement]] = MappingProxyType({}),
    src_data_rank: int | None = 0,
) -> None:
    """Make a module's own parameters and buffers DTensors where they are none: `placements` by
    name, the others replicated.
    """
    for name, tensor in {**module._parameters, **module._buffers}.items():
        if tensor is None or isinstance(tensor, DTensor):
            continue
        placed = distribute_tensor(
            tensor.detach(), mesh, placements.get(name), src_data_rank=src_data_rank
        )
        if name in module._parameters:
            leaf = Parameter(placed, requires_grad=tensor.requires_grad)
            module.register_parameter(name, leaf)
        else:
            module._buffers[name] = placed
