"""Offloaded models: the same bits, what a rank keeps is in files, and no file has a name."""

from __future__ import annotations

import functools
import tempfile

import numpy as np
import pytest

import dtrain as torch
from dtrain.distributed.fsdp import (
    CPUOffload,
    CPUOffloadPolicy,
    FullyShardedDataParallel as FSDP,
    fully_shard,
    offload,
)
from dtrain.testing.distributed import run_distributed
from tests.distributed.fsdp import training
from tests.distributed.fsdp.test_golden import train

POLICY = {"offload_policy": CPUOffloadPolicy()}


@pytest.mark.parametrize("transport", ["local", "shm", "zmq"])
@pytest.mark.parametrize("name", ["GPT", "tied"])
def test_the_same_bits_as_in_memory(name, transport):
    expected = run_distributed(2, train, name)
    found = run_distributed(2, functools.partial(train, name, **POLICY), transport=transport)
    assert found == expected


def in_files(made):
    """The addresses of arrays that were made in files."""

    def counted(count, dtype):
        array = offload.mapped(count, dtype)
        made.append(array)
        return array

    return counted


def kept(monkeypatch, build):
    """Whether shards, gradients and moments are all in files after a step."""
    made = []
    for module in ("memory", "unit", "sharded"):
        monkeypatch.setattr(f"dtrain.distributed.fsdp.{module}.mapped", in_files(made))

    def is_in_a_file(array):
        return any(np.may_share_memory(array, each) for each in made)

    def trained():
        model = build(training.made("MLP"))
        optimizer = torch.optim.AdamW(model.parameters())
        model(*training.MODELS["MLP"][1](0)).backward()
        optimizer.step()
        state = [t for held in optimizer.state.values() for t in held.values() if t.ndim]
        parts = [*model.parameters(), *(p.grad for p in model.parameters()), *state]
        return [is_in_a_file(part.to_local().detach().numpy()) for part in parts]

    return run_distributed(2, trained)


@pytest.mark.parametrize(
    "build",
    [
        lambda model: fully_shard(model, **POLICY),
        lambda model: FSDP(model, cpu_offload=CPUOffload(offload_params=True)),
    ],
)
def test_what_a_rank_keeps_is_in_files(build, monkeypatch):
    for found in kept(monkeypatch, build):
        assert all(found)
        assert len(found) == 4 * len(list(training.made("MLP").parameters()))


def test_what_is_in_memory_is_not_in_files(monkeypatch):
    for found in kept(monkeypatch, fully_shard):
        assert not any(found)


def test_files_have_no_names(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    array = offload.mapped(1000, np.float32)
    array[:] = 7
    assert list(tmp_path.iterdir()) == []
    assert array.sum() == 7000


def test_a_full_disk_is_told(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(OSError, match="No space left") as caught:
        offload.mapped(10, np.float32)
    assert "TMPDIR" in caught.value.__notes__[0]
