"""Whatever is done to the files of a checkpoint: it is noticed before anything is changed.

Every byte of every file is changed in turn; files are cut, swapped, removed, taken from another
checkpoint; and manifests whose digest is right say what an attacker would.
"""

from __future__ import annotations

import json
import os
import resource
import shutil

import pytest

import dtrain as torch
import dtrain.distributed as dist
import dtrain.distributed.checkpoint as dcp
from dtrain.distributed.checkpoint import _disk, _manifest
from dtrain.distributed.tensor import Shard, distribute_tensor
from dtrain.testing.distributed import run_distributed


def saved(folder, value=1.0):
    dcp.save({"w": torch.full((3, 2), value), "n": [1, "a"]}, checkpoint_id=folder)
    return folder


def blank():
    return {"w": torch.zeros(3, 2), "n": None}


def is_refused(folder):
    """Whether loading says that it is damaged, with nothing changed."""
    state = blank()
    with pytest.raises(dcp.CheckpointException) as caught:
        dcp.load(state, storage_reader=dcp.FileSystemReader(folder, fallback=False))
    assert isinstance(caught.value.failures[0][0], dcp.DamagedCheckpoint), caught.value
    return state["w"].sum().item() == 0 and state["n"] is None


@pytest.mark.parametrize("name", ["manifest.json", "rank-0.safetensors"])
def test_every_byte_counts(tmp_path, name):
    path = saved(tmp_path / "a") / name
    data = path.read_bytes()
    for place in range(len(data)):
        for other in (data[place] ^ 1, 0):
            path.write_bytes(data[:place] + bytes([other]) + data[place + 1 :])
            assert data[place] == other or is_refused(tmp_path / "a"), place
        path.write_bytes(data[:place])
        assert is_refused(tmp_path / "a"), place
    path.write_bytes(data + b" ")
    assert is_refused(tmp_path / "a")
    path.write_bytes(data)
    state = blank()
    dcp.load(state, checkpoint_id=tmp_path / "a")
    assert state["w"].sum().item() == 6


def save_halves(folder, value):
    mesh = dist.init_device_mesh("cpu", (2,))
    cut = distribute_tensor(torch.full((3, 2), value), mesh, [Shard(0)])
    dcp.save({"w": cut, "n": 1}, checkpoint_id=folder)


def test_files_missing_swapped_or_of_another(tmp_path):
    run_distributed(2, save_halves, tmp_path / "a", 1.0)
    run_distributed(2, save_halves, tmp_path / "b", 2.0)
    one, two = "rank-0.safetensors", "rank-1.safetensors"
    changes = {
        "missing": lambda f: (f / two).unlink(),
        "swapped": lambda f: _disk.exchange(f / one, f / two),
        "of another": lambda f: shutil.copy(tmp_path / "b" / two, f / two),
        "its manifest": lambda f: shutil.copy(tmp_path / "b" / "manifest.json", f),
        "no manifest": lambda f: (f / "manifest.json").unlink(),
        "a folder": lambda f: ((f / two).unlink(), (f / two).mkdir()),
    }  # fmt: skip
    for name, change in changes.items():
        folder = shutil.copytree(tmp_path / "a", tmp_path / name)
        change(folder)
        assert is_refused(folder), name
    with pytest.raises(dcp.CheckpointException, match=r"FileNotFoundError: there is no checkpoint"):
        dcp.load(blank(), checkpoint_id=tmp_path / "none")


def forged(folder, change):
    """Give a manifest another content, with the right digest for it."""
    path = folder / "manifest.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_bytes(_manifest._sealed(document))


def chunk(document):
    return document["tensors"]["w"]["chunks"][0]


FORGED = {
    "a path out": lambda d: d["files"].update({"../x": {"size": 1, "sha256": ""}}),
    "an absolute path": lambda d: d["files"].update({"/etc/passwd": {"size": 1, "sha256": ""}}),
    "a file that is not listed": lambda d: chunk(d).__setitem__(2, "../secret"),
    "beyond the end": lambda d: chunk(d).__setitem__(3, 10**6),
    "before the begin": lambda d: chunk(d).__setitem__(3, -8),
    "a large shape": lambda d: d["tensors"]["w"].update({"shape": [2**63, 2]}),
    "a negative shape": lambda d: d["tensors"]["w"].update({"shape": [-3, -2]}),
    "chunks that overlap": lambda d: d["tensors"]["w"]["chunks"].append(chunk(d)),
    "a hole": lambda d: chunk(d).__setitem__(1, [2, 2]),
    "a large box": lambda d: chunk(d).__setitem__(1, [2**62, 2]),
    "no chunk": lambda d: d["tensors"]["w"].update({"chunks": []}),
    "an unknown dtype": lambda d: d["tensors"]["w"].update({"dtype": "object"}),
    "text for a number": lambda d: chunk(d).__setitem__(3, "8"),
    "a float for a number": lambda d: chunk(d).__setitem__(3, 8.5),
    "another format": lambda d: d.update({"format": "dtrain checkpoint 2"}),
    "no files": lambda d: d.pop("files"),
    "a list": lambda d: d.update({"tensors": []}),
    "an unknown tag": lambda d: d["values"].update({"n": {"!run": "rm"}}),
    "a path of other things": lambda d: d["paths"].update({"n": [[1]]}),
    "a path of two indices": lambda d: d["paths"].update({"n": [{"!tuple": [1, 2]}]}),
    "no digest of a file": lambda d: d["files"].update({"x": {}}),
}


@pytest.mark.parametrize("change", FORGED.values(), ids=FORGED)
def test_what_an_attacker_would_say(tmp_path, change):
    forged(saved(tmp_path / "a"), change)
    assert is_refused(tmp_path / "a")


TEXTS = {
    "nothing": b"",
    "no JSON": b"\x80\x04N.",
    "deep": b"[" * 100_000,
    "a number": b"1",
    "a list": b"[]",
    "twice": b'{"format": 1, "format": 2}',
    "not UTF-8": b"\xff\xfe",
    "a long number": b"9" * 10_000,
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_what_is_no_manifest(tmp_path, text):
    (saved(tmp_path / "a") / "manifest.json").write_bytes(text)
    assert is_refused(tmp_path / "a")


def test_a_manifest_of_any_size_costs_little_memory(tmp_path):
    path = saved(tmp_path / "a") / "manifest.json"
    os.truncate(path, 1 << 40)  # sparse
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert is_refused(tmp_path / "a")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def test_no_code_is_run(tmp_path):
    """No part of the package can pickle."""
    for path in os.scandir(os.path.dirname(dcp.__file__)):
        if path.name.endswith(".py"):
            with open(path) as file:
                assert "import pickle" not in file.read()
