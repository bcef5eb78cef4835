"""What is saved on n ranks is what m ranks load: values, kinds, cuts; what is refused, in words.

The oracle is the whole state, made anew from a seed on every rank.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

import dtrain as torch
import dtrain.distributed as dist
import dtrain.distributed.checkpoint as dcp
from dtrain import dtypes
from dtrain.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from dtrain.testing.distributed import run_distributed

SHAPES = [(5, 7), (4,), (1, 3), (0, 4), (3, 0), (6, 2, 3), (17,)]
PLACES = [Replicate(), Shard(0), Shard(1), Shard(2), None]  # None: a plain tensor


def whole(index, shape):
    return np.random.default_rng(index).standard_normal(shape).astype(np.float32)


def state(cuts, blank=False):
    """{"model": {"p0": ...}, "step": 7, ...} with the tensors cut as `cuts` says."""
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    tensors = {}
    for index, (shape, cut) in enumerate(zip(SHAPES, cuts, strict=True)):
        full = torch.tensor(whole(index, shape) * (0 if blank else 1))
        if cut is not None:
            full = distribute_tensor(full, mesh, [cut])
        tensors[f"p{index}"] = full
    values = (0, {}) if blank else (7, {"lr": 0.1, "betas": (0.9, 0.95), "ids": [1, 2]})
    return {"model": tensors, "step": values[0], "group": values[1] or dict.fromkeys(values[1])}


def check_whole(loaded):
    for index, shape in enumerate(SHAPES):
        found = loaded["model"][f"p{index}"]
        found = found.full_tensor() if isinstance(found, DTensor) else found
        assert np.array_equal(found.numpy(), whole(index, shape)), index


def save_cut(folder, cuts):
    dcp.save(state(cuts), checkpoint_id=folder)


def load_cut(folder, cuts):
    blank = state(cuts, blank=True)
    blank["group"] = {"lr": 0.0, "betas": None, "ids": None}
    dcp.load(blank, checkpoint_id=folder)
    check_whole(blank)
    assert blank["step"] == 7
    assert blank["group"] == {"lr": 0.1, "betas": (0.9, 0.95), "ids": [1, 2]}


@st.composite
def cuttings(draw):
    return [draw(st.sampled_from([p for p in PLACES if p is None or _fits(p, s)])) for s in SHAPES]


def _fits(place, shape):
    return place.is_replicate() or place.dim < len(shape)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(1, 4), st.integers(1, 4), cuttings(), cuttings())
def test_any_number_of_ranks_to_any_other(tmp_path_factory, before, after, cuts, others):
    folder = tmp_path_factory.mktemp("reshard") / "step-1"
    run_distributed(before, save_cut, folder, cuts)
    run_distributed(after, load_cut, folder, others)


def check_two_dimensional(folder):
    grid = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    full = torch.tensor(whole(0, (5, 7)))
    for number, cut in enumerate(
        [(Shard(0), Shard(1)), (Shard(0), Shard(0)), (Replicate(), Shard(1))]
    ):
        dcp.save({"w": distribute_tensor(full, grid, cut)}, checkpoint_id=folder / f"{number}")
        other = distribute_tensor(full * 0, grid, (Shard(1), Shard(0)))
        dcp.load({"w": other}, checkpoint_id=folder / f"{number}")
        assert np.array_equal(other.full_tensor().numpy(), whole(0, (5, 7)))
    manifest = json.loads((folder / "2" / "manifest.json").read_text())
    assert len(manifest["tensors"]["w"]["chunks"]) == 2  # a replica is written once
    with pytest.raises(dcp.CheckpointException, match="w has contributions that are not combined"):
        dcp.save({"w": DTensor.from_local(full, grid, [Partial(), Replicate()])},
                 checkpoint_id=folder / "partial")  # fmt: skip


def test_meshes_of_two_dimensions(tmp_path):
    run_distributed(4, check_two_dimensional, tmp_path)


def save_replicas(folder):
    """Two large tensors, and small ones that differ between ranks, as batch norm's do."""
    own = float(dist.get_rank())
    large = {f"w{i}": torch.ones(1 << 18) for i in range(4)}
    dcp.save({**large, "mean": torch.full((3,), own)}, checkpoint_id=folder)


def test_what_all_ranks_have_is_written_once_and_by_all(tmp_path):
    run_distributed(2, save_replicas, tmp_path / "a")
    held = json.loads((tmp_path / "a" / "manifest.json").read_text())
    sizes = [file["size"] for file in held["files"].values()]
    assert len(sizes) == 2
    assert max(sizes) < 1.01 * min(sizes)
    blank = {"mean": torch.ones(3)}
    dcp.load(blank, checkpoint_id=tmp_path / "a", no_dist=True)
    assert blank["mean"].tolist() == [0, 0, 0]  # rank 0's


KINDS = [d for d in dtypes.BY_NAME.values() if d.name != "complex32"]


@pytest.mark.parametrize("kind", KINDS, ids=lambda d: d.name)
def test_dtypes(tmp_path, kind):
    saved = torch.tensor([[0, 1, 2], [3, 4, 100]]).to(kind)
    blank = torch.zeros(2, 3, dtype=kind)
    dcp.save({"x": saved, "scalar": saved[1, 2], "t": saved.t()}, checkpoint_id=tmp_path / "a")
    other, turned = blank.clone()[0, 0], torch.zeros(2, 3, dtype=kind).t()
    dcp.load({"x": blank, "scalar": other, "t": turned}, checkpoint_id=tmp_path / "a")
    assert torch.equal(blank, saved)
    assert torch.equal(other, saved[1, 2])
    assert torch.equal(turned, saved.t())


VALUES = {
    "none": None, "bool": True, "int": 2**70, "float": 0.1 + 0.2,
    "special": [float("inf"), float("nan")],
    "text": "\x00 \u2603", "bytes": b"\x00\xff", "tuple": (1, (2, [3])), "list": [1, "a", None],
    "empty": {}, "no items": [], "keys": ({1: "a", (2, 3): "b", None: "c"},),
    "mark": ({"!tuple": 1},),
    "dtype": torch.bfloat16, "deep": ([{"a": [1, {"b": (2,)}]}],),
}  # fmt: skip


def test_values_keep_their_types(tmp_path):
    nested = {"all": [VALUES], "at": {5: torch.ones(2)}}
    dcp.save(nested, checkpoint_id=tmp_path / "a")
    blank = {"all": [dict.fromkeys(VALUES)], "at": {5: torch.zeros(2)}}
    dcp.load(blank, checkpoint_id=tmp_path / "a")
    assert repr(blank) == repr(nested)


REFUSED = {
    "an.object": (
        {"an": {"object": object()}},
        "an.object: a builtins.object cannot be in a check",
    ),
    "a set": ({"a": [1, ({2},)]}, r"a\[1\]\[0\]: a builtins.set cannot"),
    "text": ({"t": "\ud83d"}, "t: a text that is not UTF-8"),
    "keys": ({"a": {(1, 2): 3}}, "keys of a state dict are str or int"),
    "twice": ({"a": {"b.c": 1, "b": {"c": 2}}}, "duplicated flatten key a.b.c"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_saved_is_named(tmp_path, case):
    given_state, sentence = case
    with pytest.raises(dcp.CheckpointException, match=sentence):
        dcp.save(given_state, checkpoint_id=tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def save_rank(folder):
    dcp.save({"x": torch.ones(2), "seed": dist.get_rank()}, checkpoint_id=folder)


def test_values_that_differ_between_ranks(tmp_path):
    with pytest.raises(dcp.CheckpointException, match="seed has different values on ranks 0 and 1"):
        run_distributed(2, save_rank, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


OTHERS = {
    "missing": ({"model": {"weights": torch.zeros(2, 3)}}, r"weights \(it has model.weight\)"),
    "shape": (
        {"model": {"weight": torch.zeros(3, 2)}},
        r"saved \[2, 3\] and current: \[3, 2\] for",
    ),
    "kind": ({"model": {"weight": 1}}, "model.weight is a value, in the checkpoint a tensor"),
    "dtype": (
        {"model": {"weight": torch.zeros(2, 3).long()}},
        "is int64, in the checkpoint float32",
    ),
}


@pytest.mark.parametrize("case", OTHERS.values(), ids=OTHERS)
def test_another_model(tmp_path, case):
    other, sentence = case
    dcp.save({"model": {"weight": torch.ones(2, 3)}, "step": 1}, checkpoint_id=tmp_path)
    with pytest.raises(dcp.CheckpointException, match=sentence):
        dcp.load({**other, "step": 5, "a": torch.zeros(0)} | other, checkpoint_id=tmp_path)
    partial = dcp.DefaultLoadPlanner(allow_partial_load=True)
    blank = {"model": {"new": torch.zeros(1), "weight": torch.zeros(2, 3)}}
    dcp.load(blank, checkpoint_id=tmp_path, planner=partial)
    assert blank["model"]["new"].item() == 0
    assert blank["model"]["weight"].sum().item() == 6


class Counter:
    """A Stateful object whose state is a tensor and a value."""

    def __init__(self, count):
        self.count, self.table = count, torch.full((3,), float(count))

    def state_dict(self):
        return {"count": self.count, "table": self.table}

    def load_state_dict(self, state_dict):
        self.count = state_dict["count"]


def test_stateful_objects(tmp_path):
    model = torch.nn.Linear(3, 2)
    dcp.save({"model": model, "counter": Counter(3)}, checkpoint_id=tmp_path / "a")
    other, counter = torch.nn.Linear(3, 2), Counter(0)
    product = other.weight.pow(2).sum()
    dcp.load({"model": other, "counter": counter}, checkpoint_id=tmp_path / "a")
    assert torch.equal(other.weight, model.weight)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    assert counter.count == 3
    assert counter.table.tolist() == [3, 3, 3]


def check_damage(folder):
    mesh = dist.init_device_mesh("cpu", (2,))
    for step in (1, 2, 3):
        full = torch.full((4, 4), float(step))
        dcp.save(
            {"w": distribute_tensor(full, mesh, [Shard(0)])}, checkpoint_id=folder / f"step-{step}"
        )
    dist.barrier()
    if dist.get_rank() == 0:
        flip(folder / "step-3" / "rank-1.safetensors")
        (folder / "step-2" / "manifest.json").unlink()
    dist.barrier()
    blank = distribute_tensor(torch.zeros(4, 4), mesh, [Shard(1)])
    reader = dcp.FileSystemReader(folder / "step-3", fallback=False)
    with pytest.raises(dcp.CheckpointException, match="is not the file that was saved") as caught:
        dcp.load({"w": blank}, storage_reader=reader)
    assert [*caught.value.failures] == [1]
    assert isinstance(caught.value.failures[1][0], dcp.DamagedCheckpoint)
    assert blank.to_local().sum().item() == 0
    dcp.load({"w": blank}, checkpoint_id=folder / "step-3")
    assert blank.full_tensor().unique().tolist() == [1]


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_damage_gives_way_to_the_one_before(tmp_path):
    with pytest.warns(UserWarning, match="step-1 instead, because newer ones are damaged"):
        run_distributed(2, check_damage, tmp_path)


def test_replacing_and_keeping(tmp_path):
    for step in range(5):
        writer = dcp.FileSystemWriter(tmp_path / f"step-{step}", keep=2)
        dcp.save({"n": step}, storage_writer=writer)
        dcp.save({"n": step, "again": True}, storage_writer=writer)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-3", "step-4"]
    assert dcp.latest(tmp_path) == tmp_path / "step-4"
    blank = {"n": 0, "again": False}
    dcp.load(blank, checkpoint_id=dcp.latest(tmp_path))
    assert blank == {"n": 4, "again": True}
    with pytest.raises(dcp.CheckpointException, match="already exists"):
        dcp.save({}, storage_writer=dcp.FileSystemWriter(tmp_path / "step-4", overwrite=False))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep me")
    with pytest.raises(dcp.CheckpointException, match="files that are no part of a checkpoint"):
        dcp.save({}, checkpoint_id=tmp_path / "notes")


def test_shards_are_safetensors(tmp_path):
    numpy_face = pytest.importorskip("safetensors.numpy")
    dcp.save({"w": torch.ones(2, 3), "n": torch.arange(5)}, checkpoint_id=tmp_path)
    found = numpy_face.load_file(tmp_path / "rank-0.safetensors")
    assert {k: v.tolist() for k, v in found.items()} == {"w": [[1.0] * 3] * 2, "n": [*range(5)]}
