"""Meshes: who is where, which groups there are and who makes them, slices, wrong arguments."""

from __future__ import annotations

import pytest

import dtrain as torch
import dtrain.distributed as dist
from dtrain.distributed.device_mesh import DeviceMesh, init_device_mesh
from dtrain.testing.distributed import run_distributed

N = 4


def me():
    return dist.get_rank()


def grid():
    """Ranks 0..3 as 2 x 2."""
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))


def members(group):
    every = [None] * group.size()
    dist.all_gather_object(every, me(), group)
    return every


def check_places():
    mesh = grid()
    assert mesh.mesh.tolist() == [[0, 1], [2, 3]]
    assert (mesh.shape, mesh.ndim, mesh.size(), mesh.size("dp"), mesh.size(1)) == (
        (2, 2),
        2,
        4,
        2,
        2,
    )
    assert mesh.get_rank() == me()
    assert mesh.get_coordinate() == (me() // 2, me() % 2)
    assert (mesh.get_local_rank("dp"), mesh.get_local_rank(-1)) == (me() // 2, me() % 2)
    assert repr(mesh) == "DeviceMesh((dp=2, tp=2), 'cpu')"
    assert mesh == grid()
    assert len({mesh, grid(), mesh["dp"]}) == 2
    assert dist.get_pg_count() == 1  # nothing was made


def check_groups():
    mesh = grid()
    dp, tp = mesh.get_all_groups()
    assert members(dp) == [me() % 2, me() % 2 + 2]
    assert members(tp) == [me() // 2 * 2, me() // 2 * 2 + 1]
    assert mesh.get_group("tp") is tp is mesh["tp"].get_group()
    x = torch.tensor([float(me())])
    dist.all_reduce(x, group=mesh["dp"].get_group())
    assert x.item() == 2 * (me() % 2) + 2
    line = init_device_mesh("cpu", (N,))
    assert line.get_group() is dist.group.WORLD
    turned = DeviceMesh("cpu", [3, 2, 1, 0])
    assert dist.get_process_group_ranks(turned.get_group()) == [3, 2, 1, 0]


def check_only_members_make_groups():
    """Ranks 2 and 3 never ask for a group: 0 and 1 get theirs all the same."""
    mesh = grid()
    if me() < 2:
        assert members(mesh.get_group("tp")) == [0, 1]
    part = DeviceMesh("cpu", [1, 2])
    if me() in (1, 2):
        assert members(part.get_group()) == [1, 2]
        assert part.get_local_rank() == me() - 1
    else:
        assert part.get_coordinate() is None
        with pytest.raises(RuntimeError, match="is not in DeviceMesh"):
            part.get_group()
    assert dist.get_pg_count() == {0: 2, 1: 3, 2: 2, 3: 1}[me()]


def check_slices():
    mesh = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("pp", "dp", "tp"))
    assert mesh["pp"].mesh.tolist() == [me() % 2, me() % 2 + 2]
    assert mesh["dp", "tp"].mesh.tolist() == [[me() // 2 * 2, me() // 2 * 2 + 1]]
    assert mesh["dp", "tp"]["tp"].get_group() is mesh.get_group("tp")
    assert mesh["pp", "dp", "tp"] is mesh
    flat = mesh["dp", "tp"]._flatten()
    assert (flat.mesh_dim_names, flat.ndim) == (("dp_tp",), 1)
    assert mesh["dp_tp"] == flat
    assert members(mesh["dp_tp"].get_group()) == flat.mesh.tolist()
    assert mesh._flatten("all").get_group() is dist.group.WORLD
    for names, sentence in (
        ("ep", "Invalid mesh_dim_name 'ep'"),
        (("tp", "pp"), "should be in ascending order"),
        (("tp", "tp"), "should be in ascending order"),
    ):
        with pytest.raises(KeyError, match=sentence):
            mesh[names]
    with pytest.raises(ValueError, match="dp_tp already names"):
        mesh["pp", "tp"]._flatten("dp_tp")
    with pytest.raises(ValueError, match="tp already exists"):
        mesh["pp", "tp"]._flatten("tp")
    line = init_device_mesh("cpu", (N,), mesh_dim_names=("w",))
    split = line._unflatten("w", (2, 2), ("dp", "tp"))
    assert split == grid()
    with pytest.raises(ValueError, match="do not make the 4 ranks"):
        line._unflatten("w", (3, 2), ("dp", "tp"))


def check_from_group():
    world = DeviceMesh.from_group(dist.group.WORLD, "cpu")
    assert (world.mesh.tolist(), world.get_group()) == ([0, 1, 2, 3], dist.group.WORLD)
    mesh = grid()
    groups = mesh.get_all_groups()
    again = DeviceMesh.from_group(groups, "cpu", mesh.mesh, mesh_dim_names=("dp", "tp"))
    assert again == mesh
    assert again.get_all_groups() == groups
    with pytest.raises(ValueError, match="Must pass mesh"):
        DeviceMesh.from_group(groups, "cpu")
    with pytest.raises(ValueError, match="ndim equal to number"):
        DeviceMesh.from_group(groups[:1], "cpu", mesh.mesh)
    with pytest.raises(ValueError, match="the group of dimension 0 has ranks"):
        DeviceMesh.from_group(groups[::-1], "cpu", mesh.mesh)


def check_refusals():
    with pytest.raises(RuntimeError, match="should not be bigger than default world size 4"):
        init_device_mesh("cpu", (2, 3))
    with pytest.raises(RuntimeError, match="must be unique"):
        init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "dp"))
    with pytest.raises(RuntimeError, match="should have same length"):
        init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp",))
    with pytest.raises(ValueError, match="do not name the 1 dimensions"):
        DeviceMesh("cpu", [0, 1], mesh_dim_names=("a", "b"))
    with pytest.raises(ValueError, match="distinct ranks"):
        DeviceMesh("cpu", [0, 0])
    with pytest.raises(ValueError, match="unknown dimensions"):
        init_device_mesh("cpu", (4,), mesh_dim_names=("dp",), backend_override={"tp": "local"})
    mesh = init_device_mesh("cpu", (2, 2))
    for call in (mesh.get_group, mesh.get_local_rank):
        with pytest.raises(RuntimeError, match="`mesh_dim` needs to be specified"):
            call()
    with pytest.raises(RuntimeError, match="Cannot slice"):
        mesh["dp"]
    with pytest.raises(RuntimeError, match="Cannot flatten"):
        mesh._flatten()
    with pytest.raises(IndexError):
        mesh.get_group(2)


def check_backends_and_abort():
    mesh = init_device_mesh(
        "cpu", (2, 2), mesh_dim_names=("dp", "tp"), backend_override={"tp": "local"}
    )
    assert [dist.get_backend(g) for g in mesh.get_all_groups()] == ["testing", "local"]
    mesh.abort()
    with pytest.raises(dist.DistError):
        dist.barrier(mesh.get_group("dp"))
    dist.barrier()


def check_more_backends():
    """By number, with options, for flattened and for split axes; what there was stays."""
    line = init_device_mesh("cpu", (4,), backend_override={0: ("local", None)})
    assert dist.get_backend(line.get_group()) == "local"
    mesh = grid()["dp", "tp"]
    flat = mesh._flatten("all", backend_override="local")
    assert dist.get_backend(flat.get_group()) == "local"
    split = init_device_mesh("cpu", (4,), mesh_dim_names=("w",))._unflatten(
        0, (2, 2), ("dp", "tp"), backend_override={1: "local"}
    )
    assert [dist.get_backend(g) for g in split.get_all_groups()] == ["testing", "local"]
    with pytest.raises(ValueError, match="one of them twice"):
        init_device_mesh(
            "cpu", (4,), mesh_dim_names=("w",), backend_override={"w": "local", 0: "local"}
        )
    with pytest.raises(TypeError, match="expected the name of a backend, got 3"):
        init_device_mesh("cpu", (4,), backend_override={0: 3})


def check_concatenate():
    mesh = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("pp", "dp", "tp"))
    both = DeviceMesh._concatenate([mesh["tp"], mesh["pp"]])
    assert (both.mesh_dim_names, both.mesh.tolist()) == (("tp", "pp"), [[0, 2], [1, 3]])
    assert both.get_group("pp") is mesh.get_group("pp")
    assert both._get_root_mesh() is mesh
    again = DeviceMesh._concatenate([mesh["pp"], mesh["dp", "tp"]._flatten()])
    assert again.mesh.tolist() == [[0, 1], [2, 3]]
    part = DeviceMesh("cpu", [[2, 0]], mesh_dim_names=("a", "b"))
    assert part._is_current_rank_part_of_mesh() == (me() in (0, 2))
    assert DeviceMesh._concatenate([part["b"], part["a"]]).mesh.tolist() == [[2], [0]]
    with pytest.raises(RuntimeError, match="overlapping meshes"):
        DeviceMesh._concatenate([mesh["tp"], mesh["dp", "tp"]])
    with pytest.raises(RuntimeError, match="derived from different"):
        DeviceMesh._concatenate([mesh["tp"], part["b"]])


@pytest.mark.parametrize(
    "check",
    [
        *(check_concatenate, check_more_backends),
        *(check_places, check_groups, check_only_members_make_groups, check_slices),
        *(check_from_group, check_refusals, check_backends_and_abort),
    ],
)
def test_mesh(check):
    run_distributed(N, check)


def test_the_faces_show_the_same():
    assert dist.DeviceMesh is DeviceMesh
    assert dist.init_device_mesh is init_device_mesh
    assert dist.device_mesh.DeviceMesh is DeviceMesh
