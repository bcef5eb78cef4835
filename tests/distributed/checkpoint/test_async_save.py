"""async_save: what is written is the state at the call, training's calls go on beside it, failures
reach all ranks.
"""

from __future__ import annotations

import logging
import threading
from concurrent.futures import Future

import pytest

import dtrain as torch
import dtrain.distributed as dist
import dtrain.distributed.checkpoint as dcp
from dtrain.distributed.checkpoint import staging
from dtrain.distributed.tensor import Shard, distribute_tensor
from dtrain.testing.distributed import run_distributed

PATIENCE = 30  # seconds


class Gate(dcp.DefaultSavePlanner):
    """A planner that lets the writing wait until `opened`."""

    def __init__(self, opened):
        super().__init__()
        self.opened = opened

    def finish_plan(self, new_plan):
        assert self.opened.wait(PATIENCE)
        return new_plan


def check_snapshot(folder):
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    cut = distribute_tensor(torch.arange(12.0).view(4, 3), mesh, [Shard(0)])
    plain, values, opened = torch.ones(3), {"step": [1, 2]}, threading.Event()
    state = {"cut": cut, "plain": plain, "values": values}
    future = dcp.async_save(state, checkpoint_id=folder / "step-1", planner=Gate(opened))
    assert isinstance(future, Future)
    with torch.no_grad():
        cut.zero_()
    plain.zero_()
    values["step"][0] = 5
    total = torch.ones(1)
    for _ in range(3):  # training's calls, while ranks are at different places of the save
        dist.all_reduce(total)
    assert total.item() == dist.get_world_size() ** 3
    assert not future.done()
    assert not (folder / "step-1").exists()
    opened.set()
    assert sorted(future.result(PATIENCE).state_dict_metadata) == ["cut", "plain", "values.step"]
    second = dcp.async_save({"n": 2}, checkpoint_id=folder / "step-2")
    third = dcp.async_save({"n": 3}, checkpoint_id=folder / "step-3")  # waits for the second
    assert second.done()
    third.result(PATIENCE)
    dcp.load(state, checkpoint_id=folder / "step-1")
    assert torch.equal(cut.full_tensor(), torch.arange(12.0).view(4, 3))
    assert plain.tolist() == [1, 1, 1]
    assert state["values"]["step"] == [1, 2]


@pytest.mark.parametrize("size", [1, 3])
def test_what_is_saved_is_the_state_at_the_call(tmp_path, size):
    run_distributed(size, check_snapshot, tmp_path)


def check_failure(folder):
    mine = {"x": object() if dist.get_rank() else 1}
    future = dcp.async_save(mine, checkpoint_id=folder / "a")
    with pytest.raises(dcp.CheckpointException, match=r"rank 1: TypeError: x: a builtins.object"):
        future.result(PATIENCE)
    dcp.async_save({"x": 1}, checkpoint_id=folder / "a").result(PATIENCE)


def test_failures_reach_all_ranks_and_the_log(tmp_path, caplog):
    with caplog.at_level(logging.ERROR, "dtrain.distributed"):
        run_distributed(2, check_failure, tmp_path)
    assert sum("async_save of" in record.message for record in caplog.records) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_staging_in_the_background(tmp_path):
    stager, tensor = dcp.DefaultStager(), torch.ones(5)
    memory = []
    for step in range(2):
        response = dcp.async_save(
            {"x": tensor}, checkpoint_id=tmp_path / f"{step}", async_stager=stager
        )
        assert isinstance(response, dcp.AsyncSaveResponse)
        assert response.staging_completion.result(PATIENCE) is None
        tensor.add_(1)
        response.upload_completion.result(PATIENCE)
        memory.append(stager._inner._held["x"].ctypes.data)
    assert memory[0] == memory[1]  # used again
    stager.close()
    for step in range(2):
        blank = {"x": torch.zeros(5)}
        dcp.load(blank, checkpoint_id=tmp_path / f"{step}")
        assert blank["x"].tolist() == [step + 1] * 5


class Failing(staging.BlockingAsyncStager):
    """A stager that cannot copy."""

    def stage(self, state_dict):
        raise MemoryError("no room for a copy")


def check_failing_stager(folder):
    stager = Failing() if dist.get_rank() == 0 else None
    future = dcp.async_save({"x": 1}, checkpoint_id=folder, async_stager=stager)
    with pytest.raises(dcp.CheckpointException, match="rank 0: MemoryError: no room for a copy"):
        future.result(PATIENCE)


def test_a_rank_without_room_for_a_copy(tmp_path):
    run_distributed(2, check_failing_stager, tmp_path / "a")


def test_a_writer_that_caches(tmp_path):
    writer = dcp.FileSystemWriter(tmp_path / "a", cache_staged_state_dict=True)
    tensor = torch.ones(5)
    future = dcp.async_save({"x": tensor}, storage_writer=writer)
    tensor.zero_()
    future.result(PATIENCE)
    assert writer._held["x"].tolist() == [1] * 5
    blank = {"x": torch.zeros(5)}
    dcp.load(blank, checkpoint_id=tmp_path / "a")
    assert blank["x"].tolist() == [1] * 5
