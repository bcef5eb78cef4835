"""How a tensor lies along one axis of a mesh: `Shard`, `Replicate`, `Partial`.

Plain immutable values, compared by what they say; arithmetic on them is in `_dtensor_spec`.
`_StridedShard` marks an axis whose cut was made after (inside) the cuts that later axes make in the
same dimension, as FSDP cuts what tensor parallelism has cut already.
Source: torch.distributed.tensor.placement_types.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

REDUCTIONS = ("sum", "avg", "min", "max", "product")


class Placement:
    """What the placements have in common: questions about their kind."""

    def is_shard(self, dim: int | None = None) -> bool:
        """Whether it cuts the tensor, along `dim` if that is given."""
        return False

    def is_replicate(self) -> bool:
        """Whether every rank of the axis has all of it."""
        return False

    def is_partial(self, reduce_op: str | None = None) -> bool:
        """Whether the ranks' values must still be combined, by `reduce_op` if that is given."""
        return False


@dataclass(frozen=True)
class Shard(Placement):
    """Cut along `dim` as `torch.chunk` cuts: parts of ceil(size / n), the last smaller or empty."""

    dim: int

    def is_shard(self, dim: int | None = None) -> bool:
        return dim is None or self.dim == dim

    def __str__(self) -> str:
        return f"S({self.dim})"


@dataclass(frozen=True)
class _StridedShard(Shard):
    """`Shard` made after the `split_factor` parts that later axes of the mesh make of `dim`."""

    split_factor: int = field(kw_only=True)

    def __repr__(self) -> str:
        return f"_StridedShard(dim={self.dim}, sf={self.split_factor})"

    def __str__(self) -> str:
        return f"_S({self.dim}, {self.split_factor})"


@dataclass(frozen=True)
class Replicate(Placement):
    """All of it on every rank of the axis, equal."""

    def is_replicate(self) -> bool:
        return True

    def __str__(self) -> str:
        return "R"


@dataclass(frozen=True)
class Partial(Placement):
    """Every rank has a contribution; the tensor is their `reduce_op`.

    `reduce_op`: "sum", "avg", "min", "max" or "product"; ValueError for another.
    """

    reduce_op: str = "sum"

    def __post_init__(self) -> None:
        if self.reduce_op not in REDUCTIONS:
            raise ValueError(f"unknown reduce_op {self.reduce_op!r}, expected one of {REDUCTIONS}")

    def is_partial(self, reduce_op: str | None = None) -> bool:
        return reduce_op is None or self.reduce_op == reduce_op

    def __repr__(self) -> str:
        return f"Partial({self.reduce_op})"

    def __str__(self) -> str:
        return f"P({self.reduce_op})"


Placements = tuple[Placement, ...]


def normalized(placements: Any, axes: int, ndim: int) -> Placements:
    """A placement for each of `axes` mesh axes (None: all `Replicate`), dimensions from the front.

    TypeError for what is no placement, ValueError for a wrong number of them, IndexError for a
    dimension that a tensor of `ndim` dimensions does not have.
    """
    given = (Replicate(),) * axes if placements is None else tuple(placements)
    if len(given) != axes:
        raise ValueError(
            f"`placements` must have the same length as `device_mesh.ndim`! Found placements "
            f"length: {len(given)}, and device_mesh.ndim: {axes}."
        )
    return tuple(_counted(placement, ndim) for placement in given)


def _counted(placement: Any, ndim: int) -> Placement:
    if not isinstance(placement, Placement):
        raise TypeError(f"expected Shard, Replicate or Partial, got {placement!r}")
    if not isinstance(placement, Shard):
        return placement
    if not -ndim <= placement.dim < ndim:
        raise IndexError(f"{placement!r} does not fit a tensor of {ndim} dimensions")
    if placement.dim >= 0:
        return placement
    dim = placement.dim + ndim
    if isinstance(placement, _StridedShard):
        return _StridedShard(dim, split_factor=placement.split_factor)
    return Shard(dim)
