"""What goes wrong in a pipeline: a stage dies, arguments are refused; errors say where."""

from __future__ import annotations

import os
import signal
import time

import pytest

import dtrain as torch
import dtrain.distributed as dist
from dtrain.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
)
from dtrain.distributed.pipelining.boundary import PipeliningShapeError
from dtrain.distributed.pipelining.schedules import get_schedule_class
from dtrain.errors import PeerLost
from dtrain.testing.distributed import joined, run_distributed
from dtrain.testing.world import run_ranks
from tests.distributed.pipelining.cases import WIDTH, batch_of, mine

nn, F = torch.nn, torch.nn.functional


def test_a_stage_that_dies_is_named_by_its_neighbours():
    def rank_main():
        (part,) = mine(3)
        x, y = batch_of(0)
        schedule = Schedule1F1B(part, 4, F.mse_loss)
        schedule.step(x, target=y)
        if part.stage_index == 1:
            dist.group.WORLD.arrays.abandon()
            return None
        with pytest.raises(PeerLost) as caught:
            schedule.step(x, target=y)
        return caught.value.rank, caught.value.__notes__[-1]

    first, _, last = run_distributed(3, rank_main)
    assert first[0] == last[0] == 1
    assert "on pipeline stage 0 (rank 0)" in first[1]
    assert last[1] == ("in the forward pass of microbatch 0 (of 4) on pipeline stage 2 (rank 2)")


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (lambda part: Schedule1F1B(part, 3, F.mse_loss).step, "3 microbatches with gradients"),
        (lambda part: Schedule1F1B(part, 4, F.mse_loss).eval, "4 microbatches without gradients"),
        (lambda part: Schedule1F1B(part, 4).step, "4 microbatches without gradients"),
    ],
)
def test_ranks_that_make_different_steps(other, difference):
    def rank_main():
        (part,) = mine(2)
        x, y = batch_of(0)
        if part.is_last:
            with pytest.raises(
                ValueError, match=f"step of 4 .* with .*, but stage 1 .* {difference}"
            ):
                other(part)(target=y)
            dist.group.WORLD.arrays.abandon()
        else:
            with pytest.raises(PeerLost):
                Schedule1F1B(part, 4, F.mse_loss).step(x)

    run_distributed(2, rank_main)


class Deadly(nn.Linear):
    """Kills its process in the third microbatch."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        if self.calls == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)


def _one_is_killed(group):
    with joined(group):
        rank, x = group.rank, torch.ones(8, WIDTH)
        part = (Deadly if rank == 1 else nn.Linear)(WIDTH, WIDTH)
        schedule = Schedule1F1B(PipelineStage(part, rank, 3), 4, F.mse_loss)
        clock = time.monotonic()
        try:
            schedule.step(x, target=x)
        except PeerLost as error:
            return [error.rank, error.__notes__[-1], time.monotonic() - clock]


def test_a_killed_stage_is_seen_at_once():
    outcomes = run_ranks(3, _one_is_killed, transport="shm", processes=True)
    assert outcomes[1].status == -signal.SIGKILL
    for rank in (0, 2):
        lost, note, seconds = outcomes[rank].value
        assert lost == 1
        assert f"on pipeline stage {rank} (rank {rank})" in note
        assert seconds < 2  # 0.1 s on an idle machine


def one_stage(module, microbatches=2, loss_fn=F.mse_loss):
    return ScheduleGPipe(PipelineStage(module, 0, 1), microbatches, loss_fn)


def test_errors_name_stage_and_microbatch():
    class Failing(nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            if self.calls == 2:
                raise ArithmeticError("no more")
            return x.clone().requires_grad_()

    def rank_main():
        model = Failing()
        schedule = one_stage(model)
        x, y = batch_of(0)
        with pytest.raises(ArithmeticError) as caught:
            schedule.step(x, target=y)
        assert (
            "forward pass of microbatch 1 (of 2) on pipeline stage 0" in caught.value.__notes__[-1]
        )
        schedule.eval(x)
        assert not schedule._stages[0]._held  # nothing is left behind
        assert torch.equal(schedule.step(x, target=y), x)

    run_distributed(1, rank_main)


def test_arguments_that_are_refused():
    def rank_main():
        x, y = batch_of(0)
        schedule = one_stage(nn.Linear(WIDTH, WIDTH))
        with torch.no_grad(), pytest.raises(RuntimeError, match="call eval"):
            schedule.step(x, target=y)
        with pytest.raises(ValueError, match="needs target="):
            schedule.step(x)
        with pytest.raises(TypeError, match="losses must be a list"):
            schedule.step(x, target=y, losses=())
        with pytest.raises(ValueError, match="cannot be cut into 2 microbatches"):
            schedule.step(x[:1], target=y[:1])
        with pytest.raises(ValueError, match="at least 1, got 0"):
            one_stage(nn.Tanh(), 0)
        with pytest.raises(ValueError, match="out of range of 2"):
            PipelineStage(nn.Tanh(), 2, 2)
        with pytest.raises(NotImplementedError, match="dw_builder"):
            PipelineStage(nn.Tanh(), 0, 1, dw_builder=lambda: None)
        with pytest.raises(ValueError, match=r"needs the stages \[0, 1\] of 2, but got \[0\]"):
            ScheduleGPipe(PipelineStage(nn.Tanh(), 0, 2), 2)
        with pytest.raises(ValueError, match="Unknown schedule 'Zero'"):
            get_schedule_class("Zero")

    run_distributed(1, rank_main)


def test_stages_on_the_wrong_rank():
    def rank_main():
        rank = dist.get_rank()
        with pytest.raises(ValueError, match=f"belongs on rank {1 - rank} .* this is rank {rank}"):
            PipelineStage(nn.Tanh(), 1 - rank, 2)
        with pytest.raises(ValueError, match="size 2 cannot be larger than number of stages 1"):
            PipelineStage(nn.Tanh(), 0, 1)

    run_distributed(2, rank_main)


@pytest.mark.parametrize(
    ("output", "error", "message"),
    [
        (lambda x, n: [x] * n, PipeliningShapeError, r"output of stage 0 is .* but for an earlier"),
        (lambda x, n: "text", TypeError, "output 0 of stage 0 is a str"),
        (lambda x, n: [x] * 80, ValueError, "stage 0 has 80 outputs"),
    ],
)
def test_outputs_that_cannot_be_sent(output, error, message):
    class Giving(nn.Module):
        calls = 0

        def forward(self, *args):
            self.calls += 1
            return output(args[0], self.calls)

    def rank_main():
        schedule = ScheduleGPipe(PipelineStage(Giving(), dist.get_rank(), 2), 2)
        if dist.get_rank() == 0:
            with pytest.raises(error, match=message):
                schedule.step(torch.ones(4, 2))
        dist.barrier()  # a rank that leaves before could not be sent to

    run_distributed(2, rank_main)
