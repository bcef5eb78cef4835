"""Norms of tensors that are cut over meshes: what ranks have to tell each other for a total norm.

One all-reduce of 8 bytes a tensor for each axis of a mesh that cuts any of them, whatever their
sizes; replicated ones cost nothing. Partial ones are refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from dtrain.comm import collectives as calls
from dtrain.comm.reduce import ReduceOp


def whole_norms(tensors: Sequence[Any], norms: Sequence[float], order: float) -> Any:
    """The norms of the tensors, given those of this rank's parts; plain tensors keep theirs.

    All ranks of the meshes call it with the same tensors. Blocks for the all-reduces, at most the
    groups' timeouts.
    """
    found = np.array(norms, np.float64)
    by_mesh: dict[Any, list[int]] = {}
    for i, tensor in enumerate(tensors):
        spec = getattr(tensor, "_spec", None)
        if spec is None:
            continue
        if spec.is_partial:
            raise RuntimeError(f"the norm of contributions, {spec}: redistribute them first")
        by_mesh.setdefault(spec.mesh, []).append(i)
    for mesh, members in by_mesh.items():
        for axis in range(mesh.ndim):
            cut = [i for i in members if tensors[i]._spec.placements[axis].is_shard()]
            if cut and mesh.shape[axis] > 1:
                found[cut] = _combined(found[cut], order, mesh.get_group(axis))
    return found


def _combined(norms: Any, order: float, group: Any) -> Any:
    """The norms of vectors of which each rank of the group has a part with these norms."""
    if math.isinf(order):
        group.issue(calls.AllReduce(norms, ReduceOp.MAX if order > 0 else ReduceOp.MIN))
        return norms
    if order == 0:
        group.issue(calls.AllReduce(norms, ReduceOp.SUM))
        return norms
    powers = norms**order
    group.issue(calls.AllReduce(powers, ReduceOp.SUM))
    return powers ** (1 / order)
