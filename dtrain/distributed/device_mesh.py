"""Ranks arranged in a grid with named axes: `DeviceMesh`, `init_device_mesh`.

A mesh is arithmetic on an array of global ranks; it talks to nobody. The group along an axis is
made when it is first asked for, and only by its members: all of them must ask, in the same order as
for other groups they share. Groups belong to the mesh that a slice was cut from, so that equal
slices share them. Source: torch.distributed.device_mesh.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from dtrain.autograd.node import make
from dtrain.distributed.groups import get_rank, init_process_group, is_initialized, new_group
from dtrain.distributed.world import ProcessGroup, resolve

Names = tuple[str, ...] | None
Backends = dict[int | str, Any]  # {axis, or its name: backend, or (backend, options)}


class _Family:
    """What a mesh and all its slices share."""

    def __init__(self, root: DeviceMesh, backends: dict[str, str]) -> None:
        self.root = root
        self.backends = backends  # {axis: backend}, where it is not the default one
        self.groups: dict[tuple[int, ...], ProcessGroup] = {}  # {members: group}
        self.flattened: dict[str, tuple[str, ...]] = {}  # {name: axes}


class DeviceMesh:
    """The grid `mesh` of distinct global ranks, alike on all of them.

    `device_type` is kept and changes nothing. `mesh_dim_names` names the axes. `backend_override`
    maps an axis, or its name, to the backend of its groups; options in it are ignored.
    Source: torch.distributed.device_mesh.
    """

    def __init__(
        self,
        device_type: str,
        mesh: Any,
        *,
        mesh_dim_names: Sequence[str] | None = None,
        backend_override: Backends | None = None,
        _family: _Family | None = None,
    ) -> None:
        self.device_type = device_type
        self.ranks = np.array(getattr(mesh, "_data", mesh), np.int32)
        self.mesh_dim_names: Names = None if mesh_dim_names is None else tuple(mesh_dim_names)
        if self.mesh_dim_names is not None and len(self.mesh_dim_names) != self.ranks.ndim:
            raise ValueError(
                f"mesh_dim_names {self.mesh_dim_names} do not name the {self.ranks.ndim} dimensions"
                " of the mesh"
            )
        self._check_ranks()
        self._rank = get_rank()
        self._lines: dict[int, tuple[int, ...]] = {}  # {axis: the caller's line along it}
        self._family = _family or _Family(self, self._backends(backend_override or {}))

    def _backends(self, override: Backends) -> dict[str, str]:
        """The backends by the names of the axes."""
        named = {self._name(a) if isinstance(a, int) else a: b for a, b in override.items()}
        unknown = set(named) - set(map(self._name, range(self.ndim)))
        if unknown or len(named) < len(override):
            raise ValueError(
                "backend_override names unknown dimensions, or one of them twice: "
                f"{list(override)}, the mesh has {list(map(self._name, range(self.ndim)))}"
            )
        return {name: _backend(given) for name, given in named.items()}

    def _name(self, axis: int) -> str:
        return self.mesh_dim_names[axis] if self.mesh_dim_names else f"dim_{axis}"

    def _check_ranks(self) -> None:
        world = resolve(None).size()
        if self.ranks.size > world:
            raise RuntimeError(
                f"Mesh should not be bigger than default world size {world}, but found "
                f"{self.ranks.size} ranks!"
            )
        flat = self.ranks.reshape(-1)
        if len(set(flat.tolist())) != flat.size or not ((flat >= 0) & (flat < world)).all():
            raise ValueError(
                f"expected distinct ranks of range({world}), got {self.ranks.tolist()}"
            )

    # ---- where is who

    @property
    def mesh(self) -> Any:
        """The ranks as an int32 tensor."""
        return make(self.ranks.copy())

    @property
    def ndim(self) -> int:
        """How many axes there are."""
        return self.ranks.ndim

    @property
    def shape(self) -> tuple[int, ...]:
        """How many ranks each axis has."""
        return self.ranks.shape

    def size(self, mesh_dim: int | str | None = None) -> int:
        """How many ranks there are, along one axis if given."""
        return self.ranks.size if mesh_dim is None else self.shape[self._axis(mesh_dim)]

    def get_rank(self) -> int:
        """The caller's global rank."""
        return self._rank

    def get_coordinate(self) -> tuple[int, ...] | None:
        """Where the caller is in the mesh, one number for each axis; None when it is not in it."""
        return self._coordinate

    @cached_property
    def _coordinate(self) -> tuple[int, ...] | None:
        found = np.argwhere(self.ranks == self._rank)
        return tuple(int(i) for i in found[0]) if len(found) else None

    def _is_current_rank_part_of_mesh(self) -> bool:
        """Whether the caller is in the mesh."""
        return self.get_coordinate() is not None

    def get_local_rank(self, mesh_dim: int | str | None = None) -> int:
        """The caller's place along an axis; the axis may be left out when there is only one."""
        return self._own_place()[self._one_axis(mesh_dim)]

    def _own_place(self) -> tuple[int, ...]:
        place = self.get_coordinate()
        if place is None:
            raise RuntimeError(f"rank {self._rank} is not in {self!r}")
        return place

    def _axis(self, mesh_dim: int | str) -> int:
        if isinstance(mesh_dim, int):
            return range(self.ndim)[mesh_dim]
        if mesh_dim not in (self.mesh_dim_names or ()):
            raise KeyError(
                f"Invalid mesh_dim_name {mesh_dim!r} specified. Valid mesh_dim_names are "
                f"{self.mesh_dim_names}."
            )
        assert self.mesh_dim_names is not None
        return self.mesh_dim_names.index(mesh_dim)

    def _one_axis(self, mesh_dim: int | str | None) -> int:
        if mesh_dim is not None:
            return self._axis(mesh_dim)
        if self.ndim > 1:
            raise RuntimeError(
                f"Found the DeviceMesh have {self.ndim} dimensions. Optional kwarg `mesh_dim` "
                "needs to be specified when device_mesh.ndim > 1."
            )
        return 0

    # ---- groups

    def get_group(self, mesh_dim: int | str | None = None) -> ProcessGroup:
        """The group of the ranks that differ from the caller along one axis alone.

        Made at the first call, which blocks until its other members have called it too. The axis
        may be left out when there is only one. RuntimeError when the caller is not in the mesh.
        """
        axis = self._one_axis(mesh_dim)
        if axis not in self._lines:
            self._lines[axis] = self._line(axis)
        members, groups = self._lines[axis], self._family.groups
        if members not in groups:
            groups[members] = self._make_group(members, axis)
        return groups[members]

    def _line(self, axis: int) -> tuple[int, ...]:
        """The ranks that differ from the caller along one axis alone."""
        line: list[Any] = list(self._own_place())
        line[axis] = slice(None)
        return tuple(int(rank) for rank in self.ranks[tuple(line)])

    def _make_group(self, members: tuple[int, ...], axis: int) -> ProcessGroup:
        name = self._name(axis)
        backend = self._family.backends.get(name)
        default = resolve(None)
        if members == default.ranks and backend is None:
            return default
        group: ProcessGroup = new_group(
            members, backend=backend, group_desc=f"mesh_{name}", sort_ranks=False
        )
        return group

    def get_all_groups(self) -> list[ProcessGroup]:
        """The caller's group along every axis, in the order of the axes."""
        return [self.get_group(axis) for axis in range(self.ndim)]

    def abort(self) -> None:
        """Make the groups that have been made fail, on all their ranks."""
        for group in self._family.groups.values():
            group.abort("the device mesh was aborted")

    # ---- other meshes of the same ranks

    def __getitem__(self, mesh_dim_names: str | tuple[str, ...]) -> DeviceMesh:
        """The slice along the named axes that the caller is in (the first one if it is in none).

        KeyError for unknown names and for names that are not in the order of the axes.
        """
        names = (mesh_dim_names,) if isinstance(mesh_dim_names, str) else tuple(mesh_dim_names)
        if self.mesh_dim_names is None:
            raise RuntimeError("Cannot slice a DeviceMesh without mesh_dim_names!")
        if len(names) == 1 and names[0] in self._family.flattened:
            whole = self._family.root[self._family.flattened[names[0]]]
            return whole._derived(whole.ranks.reshape(-1), names)
        axes = [self._axis(name) for name in names]
        if axes != sorted(set(axes)):
            raise KeyError(
                f"Invalid mesh_dim_names {names} specified. Found mesh dim indices to slice: "
                f"{axes}. Mesh dim indices should be in ascending order."
            )
        place = self.get_coordinate() or (0,) * self.ndim
        index = tuple(slice(None) if a in axes else place[a] for a in range(self.ndim))
        return self if len(axes) == self.ndim else self._derived(self.ranks[index], names)

    def _derived(self, ranks: np.ndarray, names: Sequence[str] | None) -> DeviceMesh:
        return DeviceMesh(self.device_type, ranks, mesh_dim_names=names, _family=self._family)

    def _get_root_mesh(self) -> DeviceMesh:
        """The mesh that this one was cut from, or itself."""
        return self._family.root

    def _flatten(
        self, mesh_dim_name: str | None = None, backend_override: Any = None
    ) -> DeviceMesh:
        """The same ranks along one axis, named as told or "dp_cp" after axes "dp" and "cp".

        The mesh this one was cut from gives it by that name from then on. `backend_override`: the
        backend of its group.
        """
        if self.mesh_dim_names is None:
            raise RuntimeError("Cannot flatten a DeviceMesh without mesh_dim_names!")
        name, family = mesh_dim_name or "_".join(self.mesh_dim_names), self._family
        if name in (family.root.mesh_dim_names or ()) and self.ndim > 1:
            raise ValueError(f"{name} already exists for submesh of the {family.root!r}")
        if backend_override is not None:
            family.backends[name] = _backend(backend_override)
        if self.ndim == 1:
            return self._derived(self.ranks, [name])
        if family.flattened.setdefault(name, self.mesh_dim_names) != self.mesh_dim_names:
            raise ValueError(f"{name} already names {family.flattened[name]} of {family.root!r}")
        return self._derived(self.ranks.reshape(-1), [name])

    def _unflatten(
        self,
        dim: int | str,
        mesh_sizes: Sequence[int],
        mesh_dim_names: Sequence[str],
        backend_override: Backends | None = None,
    ) -> DeviceMesh:
        """A mesh with axis `dim` replaced by several of the given sizes and names.

        `backend_override`: backends of the new axes, by name or by number among them.
        """
        axis, sizes = self._axis(dim), tuple(mesh_sizes)
        if math.prod(sizes) != self.shape[axis] or len(sizes) != len(mesh_dim_names):
            raise ValueError(
                f"sizes {sizes} with names {tuple(mesh_dim_names)} do not make the "
                f"{self.shape[axis]} ranks of dimension {dim!r}"
            )
        names = list(map(self._name, range(self.ndim)))
        names[axis : axis + 1] = mesh_dim_names
        shape = (*self.shape[:axis], *sizes, *self.shape[axis + 1 :])
        backends: Backends = {n: b for n, b in self._family.backends.items() if n in names}
        for key, backend in (backend_override or {}).items():
            backends[mesh_dim_names[key] if isinstance(key, int) else key] = backend
        return DeviceMesh(
            self.device_type, self.ranks.reshape(shape), mesh_dim_names=names,
            backend_override=backends,
        )  # fmt: skip

    @staticmethod
    def _concatenate(device_mesh_list: Sequence[DeviceMesh]) -> DeviceMesh:
        """A mesh whose axes are those of several slices of one mesh, in the order of the list.

        RuntimeError unless they were cut from the same ranks and have no direction in common.
        """
        first = device_mesh_list[0]
        order = first._family.root.ranks.reshape(-1)
        if any(
            mesh._family.root.ranks.reshape(-1).tolist() != order.tolist()
            for mesh in device_mesh_list
        ):
            raise RuntimeError(
                "Cannot concatenate DeviceMeshes derived from different device meshs"
            )
        # A slice is a lattice in the order of its root: where two of them lead is the sum of where
        # each leads, seen from a rank that both have.
        place = {int(rank): i for i, rank in enumerate(order)}
        common = first._rank if first._is_current_rank_part_of_mesh() else int(first.ranks.flat[0])
        base = place[common]
        ends = np.zeros((), int)
        for mesh in device_mesh_list:
            steps = np.vectorize(place.__getitem__)(mesh.ranks) - base
            ends = np.add.outer(ends, steps)
        ends += base
        if len(np.unique(ends)) != ends.size or ends.min() < 0 or ends.max() >= order.size:
            raise RuntimeError(f"Cannot concatenate overlapping meshes: {list(device_mesh_list)}")
        names = [mesh._name(axis) for mesh in device_mesh_list for axis in range(mesh.ndim)]
        return first._derived(order[ends], names)

    @staticmethod
    def from_group(
        group: ProcessGroup | Sequence[ProcessGroup],
        device_type: str,
        mesh: Any = None,
        *,
        mesh_dim_names: Sequence[str] | None = None,
    ) -> DeviceMesh:
        """The mesh of a group's ranks; or the grid `mesh` with a list of groups, one for each axis.

        These are the groups that the mesh then uses. ValueError where a group is not the caller's
        line along its axis.
        """
        groups = [group] if isinstance(group, ProcessGroup) else list(group)
        if mesh is None:
            if len(groups) != 1:
                raise ValueError("Must pass mesh if passing multiple ProcessGroups")
            mesh = groups[0].ranks
        made = DeviceMesh(device_type, mesh, mesh_dim_names=mesh_dim_names)
        if made.ndim != len(groups):
            raise ValueError(
                f"Expects mesh with ndim equal to number of ProcessGroups but got {made.ndim} and "
                f"{len(groups)}"
            )
        place = made._own_place()
        for axis, given in enumerate(groups):
            line = tuple(int(r) for r in np.moveaxis(made.ranks, axis, -1)[_without(place, axis)])
            if line != given.ranks:
                raise ValueError(
                    f"the group of dimension {axis} has ranks {list(given.ranks)}, the mesh "
                    f"{list(line)}"
                )
            made._family.groups[line] = given
        return made

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DeviceMesh):
            return NotImplemented
        return self is other or self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[Any, ...]:
        return (self.device_type, self.mesh_dim_names, self.shape, self.ranks.tobytes())

    def __repr__(self) -> str:
        names = self.mesh_dim_names
        shape = self.shape if names is None else ", ".join(map("{}={}".format, names, self.shape))
        return f"DeviceMesh({shape if names is None else f'({shape})'}, '{self.device_type}')"


def _backend(given: Any) -> str:
    """The name in what `backend_override` says about an axis."""
    name = given[0] if isinstance(given, tuple) else given
    if not isinstance(name, str):
        raise TypeError(f"backend_override: expected the name of a backend, got {given!r}")
    return name


def _without(place: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return (*place[:axis], *place[axis + 1 :])


def init_device_mesh(
    device_type: str,
    mesh_shape: Sequence[int],
    *,
    mesh_dim_names: Sequence[str] | None = None,
    backend_override: Backends | None = None,
) -> DeviceMesh:
    """A mesh of this shape of the first ranks, the last axis running fastest.

    Joins the default process group from the environment if that has not been done.
    """
    shape = tuple(mesh_shape)
    if mesh_dim_names is not None:
        if len(set(mesh_dim_names)) != len(mesh_dim_names):
            raise RuntimeError(
                "Each mesh_dim_name must be unique. Found repeated mesh_dim_name in "
                f"mesh_dim_names {tuple(mesh_dim_names)}"
            )
        if len(shape) != len(mesh_dim_names):
            raise RuntimeError(
                "mesh_shape and mesh_dim_names should have same length! Found "
                f"len(mesh_dim_names): {len(mesh_dim_names)} and len(mesh_shape):{len(shape)}."
            )
    if not is_initialized():
        init_process_group()
    ranks = np.arange(math.prod(shape)).reshape(shape)
    return DeviceMesh(
        device_type, ranks, mesh_dim_names=mesh_dim_names, backend_override=backend_override
    )
