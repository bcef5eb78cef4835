"""Where every element of a distributed tensor is: `DTensorSpec`, and the arithmetic of cuts.

Nothing here talks to anybody. Rules: axes cut in their order, the strided ones last; a cut is
`torch.chunk`'s, ceil(size / n) elements, the last parts smaller or empty.
Source: torch.distributed.tensor._dtensor_spec and _utils.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from dtrain.distributed.device_mesh import DeviceMesh
from dtrain.distributed.tensor.placement_types import Placement, Placements, Shard, _StridedShard

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets and sizes


@dataclass(frozen=True)
class DTensorSpec:
    """The mesh, one placement for each of its axes, and the shape of the whole tensor."""

    mesh: DeviceMesh
    placements: Placements
    shape: tuple[int, ...]

    @property
    def ndim(self) -> int:
        """How many dimensions the tensor has."""
        return len(self.shape)

    @property
    def device_mesh(self) -> DeviceMesh:
        """The mesh, under its other name."""
        return self.mesh

    @cached_property
    def place(self) -> tuple[int, ...]:
        """The caller's coordinates in the mesh; RuntimeError when it is not in it."""
        return self.mesh._own_place()

    @cached_property
    def box(self) -> Box:
        """The caller's part of the tensor: offsets and sizes."""
        return box_of(self.shape, self.mesh.shape, self.placements, self.place)

    @cached_property
    def is_replicated(self) -> bool:
        """Whether every rank has all of it."""
        return all(p.is_replicate() for p in self.placements)

    @property
    def is_partial(self) -> bool:
        """Whether contributions must still be combined."""
        return any(p.is_partial() for p in self.placements)

    def placed(self, placements: Sequence[Placement], shape: Any = None) -> DTensorSpec:
        """The same mesh with other placements, and another shape if given."""
        same = self.shape if shape is None else tuple(shape)
        return DTensorSpec(self.mesh, tuple(placements), same)

    def __str__(self) -> str:
        places = ", ".join(map(str, self.placements))
        return f"Spec({places} on {list(self.shape)})"


def chunk_of(size: int, parts: int, index: int) -> tuple[int, int]:
    """Where part `index` of `parts` begins, and how long it is."""
    step = -(-size // parts)
    start = min(index * step, size)
    return start, min(step, size - start)


def cutting_order(placements: Sequence[Placement]) -> list[int]:
    """The axes that cut, outermost cut first."""
    axes = [i for i, p in enumerate(placements) if isinstance(p, Shard)]
    return sorted(axes, key=lambda i: isinstance(placements[i], _StridedShard))


def box_of(
    shape: Sequence[int],
    mesh_shape: Sequence[int],
    placements: Sequence[Placement],
    place: Sequence[int],
) -> Box:
    """The part of a tensor of `shape` that the rank at `place` of a mesh has: offsets, sizes."""
    offsets, sizes = [0] * len(shape), list(shape)
    for axis in cutting_order(placements):
        dim = placements[axis].dim  # type: ignore[attr-defined]
        start, sizes[dim] = chunk_of(sizes[dim], mesh_shape[axis], place[axis])
        offsets[dim] = offsets[dim] + start if sizes[dim] else shape[dim]  # torch's, of nothing
    return tuple(offsets), tuple(sizes)


def local_box(spec: DTensorSpec) -> Box:
    """(offsets, sizes) of the caller's part in the whole tensor. Empty parts have a size of 0."""
    return spec.box


def compute_local_shape_and_global_offset(
    global_shape: Sequence[int], mesh: DeviceMesh, placements: Sequence[Placement]
) -> Box:
    """The caller's (sizes, offsets) of a tensor of `global_shape`. Source: torch's function."""
    offsets, sizes = box_of(global_shape, mesh.shape, placements, mesh._own_place())
    return sizes, offsets
