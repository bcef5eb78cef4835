"""The recordings themselves: described, small, readable, and written only when they change."""

from __future__ import annotations

import numpy as np
import pytest

from tests import recorded
from tests.recorded import registry

DATA = sorted(p for p in recorded.FOLDER.iterdir() if p.suffix in {".npz", ".json"})


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder of recordings with an empty registry."""
    monkeypatch.setattr(recorded, "FOLDER", tmp_path)
    monkeypatch.setattr(registry, "FOLDER", tmp_path)
    monkeypatch.setattr(registry, "RECORDINGS", {})
    recorded.load.cache_clear()
    yield tmp_path
    recorded.load.cache_clear()


def test_all_recordings_together_are_small():
    assert DATA
    assert sum(path.stat().st_size for path in DATA) < 3_000_000


@pytest.mark.parametrize("path", DATA, ids=lambda path: path.name)
def test_every_recording_is_described_and_recorded_by_somebody(path):
    assert f"`{path.name}`" in (recorded.FOLDER / "README.md").read_text(encoding="utf-8")
    recorders = recorded.FOLDER.parent.glob("record_*.py")
    start = f"@recording\ndef {path.stem}("
    assert sum(start in recorder.read_text(encoding="utf-8") for recorder in recorders) == 1


def test_arrays_come_back_read_only(folder):
    @registry.recording
    def squares():
        return {"a/x": np.arange(3) ** 2, "a/y": np.ones(2), "b": np.zeros(())}

    assert registry.write("squares").startswith("squares.npz: 3 entries")
    arrays = recorded.load("squares")
    assert arrays["a/x"].tolist() == [0, 1, 4]
    assert sorted(recorded.under(arrays, "a")) == ["x", "y"]
    with pytest.raises(ValueError, match="read-only"):
        arrays["b"][...] = 1
    with pytest.raises(KeyError, match="no recorded key starts with 'c/'"):
        recorded.under(arrays, "c")


def test_plain_values_come_back(folder):
    @registry.recording
    def orders():
        return {"7": [3, 1, 2]}

    registry.write("orders")
    assert recorded.load_json("orders") == {"7": [3, 1, 2]}


@pytest.mark.parametrize("first", [{"x": np.ones(3)}, {"x": [1, 2]}], ids=["arrays", "plain"])
def test_a_file_that_says_the_same_is_left_alone(folder, first):
    values = [first, first, {"x": first["x"][:2] * 2}]
    registry.recording(lambda: values.pop(0))
    (name,) = registry.RECORDINGS
    registry.write(name)
    (path,) = folder.iterdir()
    before = path.stat().st_mtime_ns, path.read_bytes()
    registry.write(name)
    assert (path.stat().st_mtime_ns, path.read_bytes()) == before
    registry.write(name)
    assert path.read_bytes() != before[1]


def test_two_recordings_of_one_name_are_refused(folder):
    def twice():
        return {}

    registry.recording(twice)
    with pytest.raises(ValueError, match="two recordings are named 'twice'"):
        registry.recording(twice)
