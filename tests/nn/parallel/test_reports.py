"""What DDP tells of its passes: the times, the reasons, torch's names."""

from __future__ import annotations

import logging

import pytest

import dtrain as torch
import dtrain.distributed as dist
from dtrain.comm.work import Future
from dtrain.nn.parallel import DistributedDataParallel as DDP
from dtrain.nn.parallel.meter import BucketTimes, Step
from dtrain.nn.parallel.reports import why_exposed
from dtrain.testing.distributed import run_distributed

nn = torch.nn

# What torch 2.13 tells on a CPU, but for what has no meaning here (gloo's devices, CUDA's).
TORCH = """
    avg_backward_comm_time avg_backward_compute_comm_overlap_time avg_backward_compute_time
    avg_forward_compute_time backend_name backward_comm_time backward_comm_time_end
    backward_comm_time_start backward_compute_comm_overlap_time backward_compute_time
    backward_compute_time_end backward_compute_time_start broadcast_buffers bucket_cap_bytes
    bucket_sizes device_ids dtypes find_unused_parameters forward_compute_time
    forward_compute_time_start gradient_as_bucket_view has_rebuilt_buckets has_sync_bn
    is_multi_device_module iteration module_name num_buckets_reduced num_parameter_tensors
    output_device prev_iteration_grad_ready_order_indices rank rebuilt_bucket_sizes
    rebuilt_per_bucket_param_indices total_parameter_size_bytes unused_parameter_size world_size
"""


def bucket(index, filled, submitted, begun, done, waits=None):
    return BucketTimes(index, 1 << 20, index, filled, submitted, begun, done, done, waits or {})


def step(*buckets, computed=10.0):
    """A pass whose backward went from 1 s to `computed`."""
    return Step(0, 0.0, (0.0, 1.0), 1.0, computed, buckets[-1].done, buckets, (), (), False)


def why(last, *before, aside=True, memory=True):
    return why_exposed(step(*before, last), last, aside, memory)


def test_communication_is_split_at_the_end_of_backward():
    measured = step(bucket(0, 2, 2, 2, 5), bucket(1, 9, 9, 9, 12))
    assert measured.communication == 6
    assert measured.overlap == 4
    assert [measured.exposed(b) for b in measured.buckets] == [0, 2]


def test_a_bucket_behind_another_is_exposed_by_its_own_share():
    measured = step(bucket(0, 9, 9, 9, 12), bucket(1, 10, 10, 12, 13))
    assert [measured.exposed(b) for b in measured.buckets] == [2, 1]


def test_each_reason_is_told():
    early = bucket(0, 2, 2, 2, 5)
    assert why(bucket(1, 3, 5, 5, 9), early) is None
    late = bucket(1, 9, 9, 9, 14, waits={3: 4.0, 2: 0.5})
    assert why(late, early) == "rank 3 came late: 4000.00 ms of it waited for that rank"
    assert "nothing left" in why(late, early, memory=False)  # the bytes may have been under way
    assert "reduced after backward" in why(bucket(1, 9, 10, 10, 12), early, aside=False)
    assert "got no gradient" in why(bucket(1, 0.0, 10, 10, 12), early)
    held = why(bucket(1, 3, 9, 9, 12), bucket(0, 9, 9, 9, 9.5))
    assert held.startswith("filled late: it was full 6000.00 ms before bucket 0")
    queued = why(bucket(1, 9, 9, 13, 14), bucket(0, 9, 9, 9, 13))
    assert queued == "previous still running: it waited 4000.00 ms for bucket 0"
    assert "came to it 3000.00 ms after it was full" in why(bucket(0, 9, 9, 12, 13))
    assert why(bucket(0, 9, 9, 9, 12)).startswith("nothing left to compute: it took 3000.00 ms")


class Two(nn.Module):
    """Uses `second` only when it is told to."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x, both=True):
        return self.second(self.first(x)) if both else self.first(x)


def passes(model, number, **how):
    for _ in range(number):
        model(torch.ones(4, 64), **how).sum().backward()


def data_of_three_passes():
    model = DDP(Two(), bucket_cap_mb=0.01)
    before = model.logging_data()
    with pytest.raises(RuntimeError, match="nothing to report"):
        model.step_report()
    passes(model, 3)
    return before, model.logging_data(), model._get_ddp_logging_data(), model.step_report()


@pytest.mark.parametrize("transport", ["local", "shm"])
def test_logging_data_has_torch_names_and_consistent_times(transport):
    for rank, told in enumerate(run_distributed(2, data_of_three_passes, transport=transport)):
        before, data, as_torch, report = told
        assert before["iteration"] == 0
        assert set(TORCH.split()) <= set(data)
        assert (data["rank"], data["world_size"], data["iteration"]) == (rank, 2, 3)
        assert data["dtypes"] == ["float"]
        assert data["total_parameter_size_bytes"] == 2 * (64 * 64 + 64) * 4
        assert sum(data["rebuilt_bucket_sizes"]) == data["total_parameter_size_bytes"]
        assert data["num_buckets_reduced"] == len(data["rebuilt_bucket_sizes"]) > 1
        began, ended = data["backward_compute_time_start"], data["backward_compute_time_end"]
        assert data["forward_compute_time_start"] < began < ended
        assert began < data["backward_comm_time_start"] < data["backward_comm_time_end"]
        assert 0 <= data["backward_compute_comm_overlap_time"] <= data["backward_comm_time"]
        assert as_torch["broadcast_buffers"] == 1
        assert as_torch["rebuilt_bucket_sizes"].count(",") == data["num_buckets_reduced"] - 1
        assert report.startswith(f"pass 2 on rank {rank} of 2: forward ")
        assert all(f"bucket {i} (" in report for i in range(data["num_buckets_reduced"]))


def unused_here():
    model = DDP(Two())
    passes(model, 1, both=dist.get_rank() == 0)
    data, report = model.logging_data(), model.step_report()
    passes(model, 1, both=False)
    return data, report, model.logging_data(), model.step_report()


def test_unused_parameters_are_named(caplog):
    with caplog.at_level(logging.INFO, logger="dtrain.nn.parallel"):
        ranks = run_distributed(2, unused_here)
    (used, _, changed, both), (unused, report, same, _) = ranks
    assert used["unused_parameter_names"] == []
    assert sorted(unused["unused_parameter_names"]) == ["second.bias", "second.weight"]
    assert unused["unused_parameter_size"] == (64 * 64 + 64) * 4
    assert [changed["can_set_static_graph"], same["can_set_static_graph"]] == [False, True]
    assert "no gradient here: second" in report
    assert "on any rank" not in report
    assert "no gradient on any rank: second" in both
    assert any("without a gradient in pass 0" in r.getMessage() for r in caplog.records)


def named_hook(state, given):
    future: Future = Future()
    future.set_result(given.buffer())
    return future


def with_a_hook():
    model = DDP(Two(), bucket_cap_mb=0.01)
    model.register_comm_hook(None, named_hook)
    passes(model, 2)
    return model.logging_data(), model.step_report()


def test_a_communication_hook_is_named_and_timed():
    for data, report in run_distributed(2, with_a_hook):
        assert data["comm_hook"] == "named_hook"
        assert data["backward_comm_time"] > 0
        assert "bucket 0" in report


def join_early():
    model = DDP(Two())
    with model.join():
        passes(model, 1 + dist.get_rank())
    return model.step_report()


def test_a_rank_that_has_joined_reports_its_shadow_pass():
    first, second = run_distributed(2, join_early)
    assert "pass 1 on rank 0 of 2 (without input: it has joined)" in first
    assert "joined" not in second
