"""Pipelines against one process: the same losses and gradients, the bytes and memory of closed
forms.
"""

from __future__ import annotations

import importlib

import numpy as np
import pytest

import dtrain as torch
import dtrain.distributed as dist
from dtrain.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from dtrain.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
)
from dtrain.distributed.pipelining.boundary import ANNOUNCED, Boundary
from dtrain.distributed.pipelining.microbatch import TensorChunkSpec, sum_reducer
from dtrain.distributed.pipelining.schedules import get_schedule_class
from dtrain.nn.parallel import DistributedDataParallel as DDP
from dtrain.profiler import profile
from dtrain.testing.distributed import run_distributed
from tests.distributed.pipelining.cases import BATCH, WIDTH, batch_of, layers, mine
from tests.tree import ROOT

nn, F = torch.nn, torch.nn.functional

STEPS = 4
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def serial():
    """Losses of the first steps, and the parameters after them."""
    model, found = nn.Sequential(*layers()), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    for step in range(STEPS):
        x, y = batch_of(step)
        loss = F.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found, [p.detach().numpy() for p in model.parameters()]


def pipelined(name, stages, microbatches):
    """As `serial`; losses are None on all ranks but that of the last stage."""
    parts, kind = mine(stages), get_schedule_class(name)
    single = issubclass(kind, (ScheduleGPipe, Schedule1F1B))
    schedule = kind(parts[0] if single else parts, microbatches, loss_fn=F.mse_loss)
    parameters = [p for part in parts for p in part.submod.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.5, momentum=0.9)
    found, last = [], parts[-1].is_last
    for step in range(STEPS):
        x, y = batch_of(step)
        losses = []
        optimizer.zero_grad()
        output = schedule.step(x, target=y, losses=losses)
        assert (output is not None) == last
        assert len(losses) == (microbatches if last else 0)
        assert not any(loss.requires_grad for loss in losses)
        optimizer.step()
        found.append(sum(loss.item() for loss in losses) / len(losses) if last else None)
    return found, {part.stage_index: [p.detach().numpy() for p in part.submod.parameters()]
                   for part in parts}  # fmt: skip


@pytest.mark.parametrize("transport", ["local", "shm"])
@pytest.mark.parametrize(
    ("name", "ranks", "stages", "microbatches"),
    [
        *(("GPipe", n, n, m) for n, m in [(1, 3), (2, 4), (3, 2), (4, 6)]),
        *(("1F1B", n, n, m) for n, m in [(1, 3), (2, 4), (3, 2), (4, 6)]),
        ("Interleaved1F1B", 2, 4, 4),
        ("Interleaved1F1B", 2, 6, 3),
        ("Interleaved1F1B", 1, 3, 2),
        ("LoopedBFS", 2, 4, 3),
    ],
)
def test_losses_and_parameters_are_those_of_one_process(
    name, ranks, stages, microbatches, transport
):
    losses, parameters = serial()
    found = run_distributed(ranks, pipelined, name, stages, microbatches, transport=transport)
    of_stages = {s: values for _, parts in found for s, values in parts.items()}
    last = found[(stages - 1) % ranks][0]
    np.testing.assert_allclose(last, losses, **CLOSE)
    for value, expected in zip(
        [v for s in range(stages) for v in of_stages[s]], parameters, strict=True
    ):
        np.testing.assert_allclose(value, expected, **CLOSE)


@pytest.fixture
def gpt(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module("pipeline_gpt")


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_a_gpt_in_stages_has_the_losses_of_one_process(gpt, stages):
    def batches():
        text = gpt.read_text(ROOT / "LICENSE")
        return [gpt.batch_of(text, 8, 16, seed) for seed in range(6)]

    def model():
        torch.manual_seed(0)
        return gpt.GPT(16, width=16, layers=4, heads=2)

    def optimizer_of(module):
        return torch.optim.AdamW(module.parameters(), lr=3e-3, weight_decay=0.1)

    def alone():
        whole, found = model(), []
        optimizer = optimizer_of(whole)
        for x, y in batches():
            loss = whole(x, y)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(whole.parameters(), 1.0)
            optimizer.step()
            found.append(loss.item())
        return found

    def in_stages():
        rank = dist.get_rank()
        part = gpt.Part(model(), rank, stages)
        schedule = Schedule1F1B(PipelineStage(part, rank, stages), 4, gpt.loss_of)
        optimizer, found = optimizer_of(part), []
        for x, y in batches():
            losses = []
            optimizer.zero_grad()
            schedule.step(x, target=y, losses=losses)
            gpt.clip_grad_norm(list(part.parameters()), 1.0)
            optimizer.step()
            found.append(sum(loss.item() for loss in losses) / 4 if losses else None)
        return found

    np.testing.assert_allclose(run_distributed(stages, in_stages)[-1], alone(), rtol=1e-5)


# --- what travels, what is kept


def test_bytes_and_messages():
    """One announcement a boundary and step, then 2 M tensors of a microbatch's size."""
    stages, microbatches = 3, 4

    def rank_main():
        (part,) = mine(stages)
        schedule = Schedule1F1B(part, microbatches, F.mse_loss)
        statistics = dist.group.WORLD.arrays.statistics
        counts = []
        for step in range(2):
            before = statistics()
            x, y = batch_of(step)
            schedule.step(x, target=y)
            after = statistics()
            counts.append((after.messages_sent - before.messages_sent,
                           after.bytes_sent - before.bytes_sent))  # fmt: skip
        return counts

    found = run_distributed(stages, rank_main)
    size = BATCH * WIDTH * 4  # of all microbatches' activations
    for rank, counts in enumerate(found):
        forward, back = rank < stages - 1, rank > 0
        messages = (microbatches + 1) * forward + microbatches * back
        assert counts == [(messages, (size + ANNOUNCED) * forward + size * back)] * 2


def test_boundaries_between_the_same_ranks_do_not_mix():
    def rank_main():
        rank = dist.get_rank()
        boundaries = [Boundary(dist.group.WORLD, stage, 1 - rank) for stage in (0, 2)]
        if rank == 0:
            for stage, boundary in enumerate(boundaries):
                boundary.send([torch.full((2 + stage,), float(stage))], True)
        else:
            for stage in (1, 0):
                (got,), _ = boundaries[stage].receive()
                assert got.tolist() == [float(stage)] * (2 + stage)
        dist.barrier()

    run_distributed(2, rank_main)


def test_passes_are_on_the_timeline():
    def rank_main():
        (part,) = mine(2)
        x, y = batch_of(0)
        with profile() as timeline:
            Schedule1F1B(part, 2, F.mse_loss).step(x, target=y)
        return [e.name for e in timeline.events() if e.category == "pipeline"]

    found = run_distributed(2, rank_main)
    assert found[0] == ["forward 0F0", "forward 0F1", "backward 0B0", "backward 0B1"]
    assert found[1] == ["forward 1F0", "backward 1B0", "forward 1F1", "backward 1B1"]


class Counting(PipelineStage):
    """Notes the most microbatches that were held at once."""

    most = 0

    def forward(self, *args):
        output = super().forward(*args)
        self.most = max(self.most, len(self._held))
        return output


@pytest.mark.parametrize(
    ("kind", "expected"), [(ScheduleGPipe, [6, 6, 6]), (Schedule1F1B, [3, 2, 1])]
)
def test_microbatches_in_memory(kind, expected):
    def rank_main():
        part = Counting(nn.Linear(WIDTH, WIDTH), dist.get_rank(), 3)
        x, y = batch_of(0)
        kind(part, 6, F.mse_loss).step(x, target=y)
        assert not part._held
        return part.most

    assert run_distributed(3, rank_main) == expected


# --- kinds of stages


class Several(nn.Module):
    """Gives on a float, an integer tensor, and one that is not used behind."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, *, scale):
        h = self.lin(x) * scale
        return h, (x > 0).long(), h * 2.0


class Using(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(WIDTH, WIDTH)

    def forward(self, h, mask, unused):
        return {"y": self.lin(h * mask), "sum": h.detach().sum()}


def test_several_outputs_keyword_arguments_and_nested_results():
    def parts():
        torch.manual_seed(0)
        return Several(), Using()

    def loss_of(output, target, weight=1.0):
        return weight * F.mse_loss(output["y"], target)

    x, y = batch_of(0)
    first, second = parts()
    whole = second(*first(x, scale=2.0))
    loss_of(whole, y, 3.0).backward()

    def rank_main():
        rank = dist.get_rank()
        part = parts()[rank]
        merge = {"y": TensorChunkSpec(0), "sum": sum_reducer}
        stage = PipelineStage(part, rank, 2)
        schedule = ScheduleGPipe(stage, 3, loss_of, output_merge_spec=merge)
        options = {} if rank else {"scale": 2.0}
        output = schedule.step(x, target=y, loss_kwargs={"weight": 3.0}, **options)
        if rank:
            np.testing.assert_allclose(output["y"].numpy(), whole["y"].detach().numpy(), **CLOSE)
            np.testing.assert_allclose(output["sum"].item(), whole["sum"].item(), **CLOSE)
        return [p.grad.numpy() for p in part.parameters()]

    found = run_distributed(2, rank_main)
    for module, gradients in zip((first, second), found, strict=True):
        for p, gradient in zip(module.parameters(), gradients, strict=True):
            np.testing.assert_allclose(gradient, p.grad.numpy(), **CLOSE)


def test_microbatches_of_different_sizes_are_announced_each():
    def rank_main():
        (part,) = mine(2)
        x, y = batch_of(0, 10)
        before = dist.group.WORLD.arrays.statistics().messages_sent
        output = ScheduleGPipe(part, 4, F.mse_loss).step(x, target=y)
        sent = dist.group.WORLD.arrays.statistics().messages_sent - before
        return None if output is None else output.numpy(), sent

    (_, sent), (output, back) = run_distributed(2, rank_main)
    assert (sent, back) == (8, 4)
    expected = nn.Sequential(*layers())(batch_of(0, 10)[0]).detach().numpy()
    np.testing.assert_allclose(output, expected, **CLOSE)


def test_nothing_goes_back_to_a_frozen_stage():
    def rank_main():
        (part,) = mine(2)
        if part.is_first:
            part.submod.requires_grad_(False)
        x, y = batch_of(0)
        ScheduleGPipe(part, 3, F.mse_loss).step(x, target=y)
        return dist.group.WORLD.arrays.statistics().messages_sent

    assert run_distributed(2, rank_main) == [4, 0]


def test_steps_accumulate():
    """Two steps leave the sum of both gradients: nothing is divided twice."""

    def rank_main():
        (part,) = mine(2)
        schedule = Schedule1F1B(part, 4, F.mse_loss)
        for step in range(2):
            x, y = batch_of(step)
            schedule.step(x, target=y)
        return [p.grad.numpy() for p in part.submod.parameters()]

    model = nn.Sequential(*layers())
    for step in range(2):
        x, y = batch_of(step)
        F.mse_loss(model(x), y).backward()
    found = [g for gradients in run_distributed(2, rank_main) for g in gradients]
    for p, gradient in zip(model.parameters(), found, strict=True):
        np.testing.assert_allclose(gradient, p.grad.numpy(), **CLOSE)


def test_gpipe_and_1f1b_give_the_same_bits():
    def rank_main():
        gradients = []
        for kind in (ScheduleGPipe, Schedule1F1B):
            (part,) = mine(3)
            x, y = batch_of(0)
            kind(part, 5, F.mse_loss).step(x, target=y)
            gradients.append([p.grad.tolist() for p in part.submod.parameters()])
        assert gradients[0] == gradients[1]

    run_distributed(3, rank_main)


def test_stages_that_keep_less():
    def rank_main():
        gradients = []
        for less in (False, True):
            (part,) = mine(2)
            if less:
                apply_activation_checkpointing(part.submod)
            x, y = batch_of(0)
            Schedule1F1B(part, 4, F.mse_loss).step(x, target=y)
            gradients.append([p.grad.tolist() for p in part.submod.parameters()])
        assert gradients[0] == gradients[1]

    run_distributed(2, rank_main)


def test_the_sum_instead_of_the_mean():
    def rank_main():
        (part,) = mine(2)
        gradients = []
        for scale in (True, False):
            x, y = batch_of(0)
            part.submod.zero_grad()
            ScheduleGPipe(part, 4, F.mse_loss, scale_grads=scale).step(x, target=y)
            gradients.append(part.submod[0][0].weight.grad.numpy().copy())
        np.testing.assert_array_equal(gradients[0] * 4, gradients[1])

    run_distributed(2, rank_main)


def test_eval_computes_no_gradients():
    x, y = batch_of(0)
    expected = nn.Sequential(*layers())(x).detach()

    def rank_main():
        (part,) = mine(2)
        losses = []
        for loss_fn, target in ((F.mse_loss, y), (F.mse_loss, None), (None, None)):
            schedule = Schedule1F1B(part, 4, loss_fn)
            output = schedule.eval(x, target=target, losses=losses)
            if loss_fn is None:
                output = schedule.step(x)
            assert all(p.grad is None for p in part.submod.parameters())
            if part.is_last:
                np.testing.assert_allclose(output.numpy(), expected.numpy(), **CLOSE)
                assert len(losses) == (4 if target is not None else 0)
                assert not output.requires_grad
            else:
                assert output is None

    run_distributed(2, rank_main)


def test_pipelines_beside_each_other_under_ddp():
    """2 x 2: gradients are the mean over the two pipelines, reduced once a step."""

    def rank_main():
        mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "pp"))
        place, replica = mesh.get_local_rank("pp"), mesh.get_local_rank("dp")
        model = DDP(nn.Sequential(*layers()[place * 6 : place * 6 + 6]),
                    process_group=mesh.get_group("dp"))  # fmt: skip
        stage = PipelineStage(model, place, 2, group=mesh.get_group("pp"))
        schedule = Schedule1F1B(stage, 3, F.mse_loss)
        calls = []
        mesh.get_group("dp").register_pre_hook(0, lambda call: calls.append(call.name))
        for step in range(2):  # buckets are arranged anew in the second
            model.zero_grad()
            x, y = batch_of(step)
            half = slice(replica * 6, replica * 6 + 6)
            schedule.step(x[half], target=y[half])
        assert calls.count("all_reduce") == 2  # of one bucket
        return [p.grad.numpy() for p in model.parameters()]

    model = nn.Sequential(*layers())
    x, y = batch_of(1)
    F.mse_loss(model(x), y).backward()
    found = run_distributed(4, rank_main)
    for row in (found[0] + found[1], found[2] + found[3]):
        for p, gradient in zip(model.parameters(), row, strict=True):
            np.testing.assert_allclose(gradient, p.grad.numpy(), **CLOSE)
