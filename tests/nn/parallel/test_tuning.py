"""bucket_cap_mb="auto": what is tried and chosen, on all ranks alike, without changing a bit."""

from __future__ import annotations

import numpy as np
import pytest

import dtrain as torch
import dtrain.distributed as dist
from dtrain.nn.parallel import DistributedDataParallel as DDP, tuning
from dtrain.nn.parallel.buckets import DEFAULT_CAPS, MIB
from dtrain.testing.distributed import run_distributed
from tests.nn.parallel.training import descend

nn = torch.nn


class Clockwork:
    """Times of passes by the number of buckets, instead of a clock's."""

    def __init__(self, seconds_of):
        self.seconds_of = seconds_of

    def drive(self, tuner, group):
        switched = [tuner.now]
        for _ in range(tuning.PASSES * (len(tuner.tried) + 2)):
            switched += [tuner.now] if tuner.advance(group) else []
            tuner.add(self.seconds_of(len(tuner.tried[tuner.now][1])))
        return switched


def even(caps, parts=16, each=MIB // 4):
    """`parts` parameters of a quarter of a MiB, cut by the last of `caps`."""
    per = max(1, -(-caps[-1] // each))
    return [list(range(i, min(i + per, parts))) for i in range(0, parts, per)]


def check_choice():
    """4 MiB: 1, 2, 4, 8 and 16 buckets; rank 1 is the slow one, and four are best for it."""
    slow = dist.get_rank() == 1
    tuner = tuning.Tuner(even, 4 * MIB)
    assert [len(members) for _, members in tuner.tried] == [1, 2, 4, 8, 16]
    before = dist.group.WORLD.arrays.statistics().completed
    clock = Clockwork(lambda n: 1 + abs(n - 4) / 20 if slow else n / 100)
    switched = clock.drive(tuner, dist.group.WORLD)
    sent = dist.group.WORLD.arrays.statistics().completed - before
    return switched, tuner.frozen, sent, tuner.words()


def test_the_fastest_on_the_slowest_rank_is_kept_and_costs_one_call():
    one, two = run_distributed(2, check_choice)
    assert one == two
    switched, frozen, sent, words = one
    assert switched == [0, 1, 2, 3, 4, 2]
    assert frozen
    assert sent == 1
    assert words.startswith("chosen number of buckets 4 (")


def test_the_default_stays_unless_another_is_clearly_faster():
    assert tuning.fastest(np.array([1.0, 0.92, 1.2])) == 0
    assert tuning.fastest(np.array([1.0, 0.95, 0.8])) == 2


def test_what_is_alike_is_not_tried():
    tuner = tuning.Tuner(lambda caps: [[0, 1]], 100)
    assert tuner.frozen
    assert [caps for caps, _ in tuner.tried] == [DEFAULT_CAPS]
    assert not tuner.advance(None)
    assert "alike" in tuner.words()


def train(cap, steps=40):
    torch.manual_seed(3)
    model = DDP(nn.Sequential(*[nn.Linear(96, 96) for _ in range(4)]), bucket_cap_mb=cap)
    x = torch.randn(6, 96, generator=torch.Generator().manual_seed(dist.get_rank()))
    sizes = []

    def loss():
        with model.no_sync():
            model(x[:2]).square().mean().backward()
        out = model(x[2:]).square().mean()
        sizes.append([b.members for b in model.reducer.buckets])
        return out

    losses = descend(model, loss, steps)
    end = model.reducer.tuner is None or model.reducer.tuner.frozen
    return losses, sizes, end, model.step_report()


def test_trying_changes_no_bits_and_ends(monkeypatch):
    monkeypatch.setattr(tuning, "SMALLEST", 16 << 10)
    (plain, *_), _ = run_distributed(2, train, None)
    runs = run_distributed(2, train, "auto")
    for losses, sizes, frozen, report in runs:
        assert losses == plain
        assert frozen
        assert len({str(size) for size in sizes}) >= 3
        assert sizes == runs[0][1]
        assert "bucket_cap_mb='auto': " in report
        assert "chosen number of buckets" in report


def check_joined():
    """A rank that is through takes part in the choice."""
    torch.manual_seed(0)
    model = DDP(nn.Sequential(*[nn.Linear(96, 96) for _ in range(4)]), bucket_cap_mb="auto")
    with model.join():
        for _ in range((40, 3)[dist.get_rank()]):
            model(torch.ones(2, 96)).sum().backward()
    return model.reducer.tuner.frozen, [b.members for b in model.reducer.buckets]


def test_ranks_that_have_joined_choose_the_same(monkeypatch):
    monkeypatch.setattr(tuning, "SMALLEST", 16 << 10)
    one, two = run_distributed(2, check_joined)
    assert one == two
    assert one[0]


def check_arguments():
    with pytest.raises(ValueError, match="a number of MiB or 'auto', got 'big'"):
        DDP(nn.Linear(2, 2), bucket_cap_mb="big")
    for wrong in (float("nan"), 0, -1):
        with pytest.raises(ValueError, match="must be positive"):
            DDP(nn.Linear(2, 2), bucket_cap_mb=wrong)
    with pytest.raises(ValueError, match="must be finite"):
        DDP(nn.Linear(2, 2), bucket_cap_mb=float("inf"))
    from dtrain.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    model = DDP(nn.Linear(2, 2), bucket_cap_mb="auto")
    model.register_comm_hook(None, allreduce_hook)
    for _ in range(3):
        model(torch.ones(1, 2)).sum().backward()
    assert model.reducer.tuner is None


def test_arguments_and_hooks():
    run_distributed(1, check_arguments)
