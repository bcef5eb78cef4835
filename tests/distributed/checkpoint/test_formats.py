"""One file from a checkpoint and back: nothing is lost, nothing damaged is taken, in any format."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

import dtrain as torch
import dtrain.distributed as dist
import dtrain.distributed.checkpoint as dcp
from dtrain.distributed.checkpoint.__main__ import main
from dtrain.distributed.checkpoint.api import DamagedCheckpoint
from dtrain.distributed.checkpoint.format_utils import (
    dcp_to_safetensors,
    dcp_to_torch_save,
    safetensors_to_dcp,
    save_safetensors,
    torch_save_to_dcp,
)
from dtrain.distributed.tensor import Replicate, Shard, distribute_tensor
from dtrain.testing.distributed import run_distributed

KINDS = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.uint8]


def tensors():
    """Of several dtypes and shapes, with none and one element."""
    found = {str(kind): (torch.arange(12) % 5).reshape(4, 3).to(kind) for kind in KINDS}
    return {**found, "one": torch.tensor(2.5), "none": torch.zeros(0, 3), "wide": torch.eye(7)}


def state(cut):
    layers = {name: cut(t) for name, t in tensors().items()}
    values = {"step": 7, "betas": (0.9, 0.95), "best": math.inf, 3: b"bytes"}
    return {"model": layers, "more": [torch.ones(2), {"deep": torch.zeros(1)}], "run": values}


def saved(folder):
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))

    def cut(tensor):
        return distribute_tensor(tensor, mesh, [Shard(0)]) if tensor.ndim else tensor

    dcp.save(state(cut), checkpoint_id=folder)


@pytest.fixture
def folder(tmp_path):
    run_distributed(3, saved, tmp_path / "step-1")
    return tmp_path / "step-1"


def assert_same(found, expected):
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, list):
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, torch.Tensor):
        assert found.dtype is expected.dtype
        np.testing.assert_array_equal(found.numpy(), expected.numpy())
    else:
        assert found == expected


def loaded(folder):
    """All of a checkpoint of flat names, by the names that its manifest has."""
    whole = folder.parent / "whole.pt"
    dcp_to_torch_save(folder, whole)
    return torch.load(whole)


def test_a_file_of_torch_save_is_the_nested_state(folder, tmp_path):
    dcp_to_torch_save(folder, tmp_path / "all.pt")
    assert_same(torch.load(tmp_path / "all.pt"), state(lambda t: t))
    torch_save_to_dcp(tmp_path / "all.pt", tmp_path / "again")
    assert_same(loaded(tmp_path / "again"), state(lambda t: t))


def test_a_safetensors_file_and_back_keeps_every_tensor_and_value(folder, tmp_path):
    dcp_to_safetensors(folder, tmp_path / "all.safetensors")
    safetensors_to_dcp(tmp_path / "all.safetensors", tmp_path / "again")
    found = loaded(tmp_path / "again")
    for name, tensor in tensors().items():
        assert_same(found[f"model.{name}"], tensor)
    assert_same(found["more.1.deep"], torch.zeros(1))
    assert found["run.betas"] == (0.9, 0.95)
    assert found["run.best"] == math.inf


def test_the_formats_own_reader_reads_the_file(folder, tmp_path):
    face = pytest.importorskip("safetensors.numpy")
    dcp_to_safetensors(folder, tmp_path / "all.safetensors")
    found = face.load_file(tmp_path / "all.safetensors")
    np.testing.assert_array_equal(found["model.wide"], np.eye(7, dtype=np.float32))
    assert found["model.none"].shape == (0, 3)


def test_a_file_of_the_formats_own_writer_becomes_a_checkpoint(tmp_path):
    face = pytest.importorskip("safetensors.numpy")
    arrays = {"a": np.arange(6.0).reshape(2, 3), "b": np.zeros((0, 2), np.int64)}
    face.save_file(arrays, tmp_path / "theirs.safetensors", metadata={"format": "np"})
    safetensors_to_dcp(tmp_path / "theirs.safetensors", tmp_path / "ours")
    for name, array in loaded(tmp_path / "ours").items():
        np.testing.assert_array_equal(array.numpy(), arrays[name])


HEADERS = [
    b"",
    b"\xff" * 8,
    (4).to_bytes(8, "little") + b"{}",
    (2).to_bytes(8, "little") + b"[]",
    (2).to_bytes(8, "little") + b"{}left over",
]


def with_entry(**changes):
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}
    text = json.dumps({"a": entry}).encode()
    return len(text).to_bytes(8, "little") + text + b"\0" * 8


HEADERS += [
    with_entry(dtype="F33"), with_entry(shape=[3]), with_entry(shape=[-2]),
    with_entry(shape=[2.0]), with_entry(data_offsets=[4, 12]), with_entry(data_offsets=[0]),
    with_entry(shape=[2**62, 4]), with_entry(shape=None),
]  # fmt: skip


@pytest.mark.parametrize("content", HEADERS)
def test_what_is_no_safetensors_file_is_refused_and_nothing_is_made(content, tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(content)
    with pytest.raises(DamagedCheckpoint, match="no undamaged safetensors file"):
        safetensors_to_dcp(tmp_path / "bad.safetensors", tmp_path / "made")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.safetensors"]


# --- the command line


def damage(folder):
    shard = next(folder.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)


def test_verify_says_ok_or_which_file_is_damaged(folder, capsys):
    assert main(["verify", str(folder)]) == 0
    assert "11 tensors" in capsys.readouterr().out
    damage(folder)
    assert main(["verify", str(folder)]) == 1
    assert "SHA-256" in capsys.readouterr().err
    assert main(["verify", str(folder.parent)]) == 1


def test_ls_lists_tensors_and_values(folder, capsys):
    assert main(["ls", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "model.wide  float32[7, 7]  3 chunks" in lines
    assert "run.step  7" in lines


def test_convert_goes_by_the_names(folder, tmp_path, capsys):
    for name in ("all.safetensors", "all.pt", "all.pth"):
        assert main(["convert", str(folder), str(tmp_path / name)]) == 0
        assert main(["convert", str(tmp_path / name), str(tmp_path / f"of-{name}-1")]) == 0
        assert main(["verify", str(tmp_path / f"of-{name}-1")]) == 0
    assert main(["convert", str(tmp_path / "all.pt"), str(tmp_path / "x.safetensors")]) == 1
    assert "one is a checkpoint's folder" in capsys.readouterr().err
    damage(folder)
    assert main(["convert", str(folder), str(tmp_path / "no.pt")]) == 1
    assert not (tmp_path / "no.pt").exists()


def save_one_file(path, cut):
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    table = torch.arange(35.0).view(5, 7)
    state = {
        "cut": distribute_tensor(table, mesh, [cut]),
        "plain": {"step": torch.tensor(3), "mask": torch.tensor([True, False, True])},
        "epoch": (1, 2),
    }
    save_safetensors(state, path)


@pytest.mark.parametrize("cut", [Shard(0), Shard(1), Replicate()], ids=str)
def test_the_state_of_all_ranks_is_streamed_into_one_file(tmp_path, cut):
    run_distributed(3, save_one_file, tmp_path / "a.safetensors", cut)
    safetensors_to_dcp(tmp_path / "a.safetensors", tmp_path / "a")
    blank = {"cut": torch.zeros(5, 7), "plain.step": torch.tensor(0), "epoch": None}
    dcp.load(blank, checkpoint_id=tmp_path / "a")
    assert torch.equal(blank["cut"], torch.arange(35.0).view(5, 7))
    assert blank["plain.step"].item() == 3
    assert blank["epoch"] == (1, 2)


def test_all_ranks_are_told_that_the_file_cannot_be_written(tmp_path):
    with pytest.raises(dcp.CheckpointException, match=r"rank 0: FileNotFoundError"):
        run_distributed(3, save_one_file, tmp_path / "none" / "a.safetensors", Shard(0))
