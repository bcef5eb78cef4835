"""One file of torch.save, read by one rank, for the parts of all."""

from __future__ import annotations

import numpy as np
import pytest

import dtrain as torch
import dtrain.distributed.checkpoint as dcp
from dtrain.distributed.checkpoint.format_utils import (
    BroadcastingTorchSaveReader,
    DynamicMetaLoadPlanner,
)
from dtrain.distributed.device_mesh import init_device_mesh
from dtrain.distributed.tensor import Shard, distribute_tensor, zeros
from dtrain.testing.distributed import run_distributed

VALUES = torch.arange(2 * 7, dtype=torch.float32).reshape(2, 7)


@pytest.fixture
def file(tmp_path):
    content = {"model": {"weight": VALUES, "bias": VALUES[0].to(torch.bfloat16)}, "step": 7}
    torch.save(content, tmp_path / "whole.pt")
    return tmp_path / "whole.pt"


def read(state, file, planner=None, **options):
    reader = BroadcastingTorchSaveReader(**options)
    dcp.load(state, checkpoint_id=file, storage_reader=reader, planner=planner)


@pytest.mark.parametrize("ranks", [1, 3, 4])
@pytest.mark.parametrize("planner", [None, DynamicMetaLoadPlanner])
def test_each_rank_gets_its_part(file, ranks, planner):
    """Two rows among more ranks: some get nothing, and take part."""

    def main():
        mesh = init_device_mesh("cpu", (ranks,))
        cut = zeros(2, 7, device_mesh=mesh, placements=[Shard(0)])
        state = {"model": {"weight": cut, "bias": torch.zeros(7)}}
        read(state, file, planner and planner())
        expected = distribute_tensor(VALUES, mesh, [Shard(0)])
        np.testing.assert_array_equal(cut.to_local().numpy(), expected.to_local().numpy())
        return state["model"]["bias"].tolist()

    assert run_distributed(ranks, main) == [VALUES[0].tolist()] * ranks


def test_a_module_of_one_process(file):
    model = torch.nn.Linear(7, 2, bias=False)
    read({"model": model.state_dict()}, file, DynamicMetaLoadPlanner())
    assert torch.equal(model.weight, VALUES)


@pytest.mark.parametrize("planner", [None, DynamicMetaLoadPlanner])
@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        ({"model": {"wait": torch.zeros(2, 7)}}, "model.wait"),
        ({"model": {"weight": torch.zeros(7, 2)}}, "model.weight"),
        ({"step": 0}, "step"),
    ],
)
def test_what_does_not_fit_is_an_error_on_all_ranks(file, planner, state, sentence):
    def main():
        with pytest.raises(dcp.CheckpointException) as raised:
            read(state, file, planner and planner())
        return str(raised.value)

    for told in run_distributed(2, main):
        assert sentence in told


def test_other_errors_are_on_all_ranks_too(file, tmp_path):
    def main():
        told = []
        for path, options in ((tmp_path / "none.pt", {}), (file, {"coordinator_rank": 1})):
            with pytest.raises(dcp.CheckpointException) as raised:
                read({"model": {"weight": torch.zeros(2, 7)}}, path, **options)
            told.append(str(raised.value))
        return told

    for missing, mismatch in run_distributed(2, main):
        assert "none.pt" in missing
        assert "Coordinator rank mismatch: expected 1" in mismatch
