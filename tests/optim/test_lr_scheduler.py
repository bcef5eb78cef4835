"""Schedules against PyTorch's recorded rates; state, order of calls, refusals."""

from __future__ import annotations

import copy

import pytest

import dtrain as torch
from dtrain.optim import lr_scheduler
from tests.optim.schedules import SCHEDULES, STEPS, build, optimizer, run
from tests.recorded import load_json

MIDDLE = 6


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rates_are_those_of_torch(schedule):
    recorded = load_json("schedules")[schedule]
    scheduler = build(torch, schedule, optimizer(torch))
    rates = run(scheduler)
    for ours, theirs in zip(rates, recorded["rates"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-14, abs=1e-18)
    assert sorted(scheduler.state_dict()) == recorded["keys"]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_saved_and_loaded_goes_on(schedule):
    scheduler = build(torch, schedule, optimizer(torch))
    run(scheduler, stop=MIDDLE)
    saved = (
        copy.deepcopy(scheduler.state_dict()),
        copy.deepcopy(scheduler.optimizer.state_dict()),
    )
    expected = run(scheduler, MIDDLE)
    other = build(torch, schedule, optimizer(torch))
    other.load_state_dict(saved[0])
    other.optimizer.load_state_dict(saved[1])
    assert run(other, MIDDLE) == expected
    assert len(expected) == STEPS - MIDDLE + 1


class Ramp:
    """A factor with a state, which is saved."""

    def __init__(self, slope):
        self.slope = slope

    def __call__(self, epoch):
        return self.slope * epoch


def test_callable_objects_are_saved_by_their_attributes():
    saved = lr_scheduler.LambdaLR(optimizer(torch), [Ramp(3), lambda epoch: 1]).state_dict()
    assert saved["lr_lambdas"] == [{"slope": 3}, None]
    loaded = lr_scheduler.LambdaLR(optimizer(torch), [Ramp(1), lambda epoch: 2])
    loaded.load_state_dict(saved)
    loaded.optimizer.step()
    loaded.step()
    assert loaded.get_last_lr() == [1.5, 0.1]


def test_a_schedule_of_ones_own_needs_only_get_lr():
    class Halving(lr_scheduler.LRScheduler):
        def get_lr(self):
            return [base / 2**self.last_epoch for base in self.base_lrs]

    scheduler = Halving(optimizer(torch))
    assert [rates[0] for rates in run(scheduler, stop=3)] == [0.5, 0.25, 0.125, 0.0625]
    with pytest.raises(NotImplementedError, match="neither chained nor get_lr"):
        lr_scheduler.LRScheduler(optimizer(torch))


def test_a_tensor_rate_is_filled():
    given = optimizer(torch)
    rate = given.param_groups[0]["lr"] = torch.tensor(0.5)
    scheduler = lr_scheduler.ExponentialLR(given, 0.5)
    given.step()
    scheduler.step()
    assert given.param_groups[0]["lr"] is rate
    assert rate.item() == 0.25
    assert scheduler.get_last_lr() == [0.25, 0.025]


def test_stepping_before_the_optimizer_is_warned_of():
    scheduler = lr_scheduler.StepLR(optimizer(torch), 2)
    with pytest.warns(UserWarning, match=r"`lr_scheduler.step\(\)` before `optimizer.step\(\)`"):
        scheduler.step()
    scheduler.step()  # once is enough


def test_get_lr_and_epochs_are_warned_of():
    scheduler = lr_scheduler.StepLR(optimizer(torch), 2)
    with pytest.warns(UserWarning, match="please use `get_last_lr"):
        scheduler.get_lr()
    scheduler.optimizer.step()
    with pytest.warns(UserWarning, match="epoch parameter"):
        scheduler.step(5)
    assert scheduler.get_last_lr() == pytest.approx([0.005, 0.0005])


def test_resuming_needs_the_initial_rates():
    given = optimizer(torch)
    with pytest.raises(KeyError, match=r"'initial_lr' is not specified in param_groups\[0\]"):
        lr_scheduler.CosineAnnealingLR(given, 10, last_epoch=4)
    for group in given.param_groups:
        group["initial_lr"] = group["lr"]
    resumed = lr_scheduler.CosineAnnealingLR(given, 10, last_epoch=4)
    assert resumed.get_last_lr() == pytest.approx([0.5, 0.05])


def test_warm_restarts_take_fractions_of_epochs():
    scheduler = lr_scheduler.CosineAnnealingWarmRestarts(optimizer(torch), 2, 2)
    for epoch, share in ((0.5, 0.25), (1.0, 0.5), (2.0, 0.0), (4.0, 0.5), (6.0, 0.0)):
        scheduler.step(epoch)
        assert scheduler.T_cur / scheduler.T_i == share
    with pytest.raises(ValueError, match="Expected non-negative epoch"):
        scheduler.step(-1)


@pytest.mark.parametrize(
    ("schedule", "error", "sentence"),
    [
        ("StepLR(None, 3)", TypeError, "NoneType is not an Optimizer"),
        ("LambdaLR(o, [abs])", ValueError, "lr_lambda has 1 values, param_groups has 2"),
        ("LambdaLR(o, 3)", TypeError, "lr_lambda should be a function, but got int"),
        ("ConstantLR(o, 2.0)", ValueError, "expected to be between 0 and 1"),
        ("LinearLR(o, 0)", ValueError, "Starting multiplicative factor"),
        ("LinearLR(o, 1, 2)", ValueError, "Ending multiplicative factor"),
        ("CosineAnnealingWarmRestarts(o, 0)", ValueError, "positive integer T_0, but got 0"),
        ("CosineAnnealingWarmRestarts(o, 1, 0)", ValueError, "integer T_mult >= 1, but got 0"),
        ("OneCycleLR(o, 1)", ValueError, "define either total_steps OR"),
        ("OneCycleLR(o, 1, 0)", ValueError, "positive integer total_steps, but got 0"),
        ("OneCycleLR(o, 1, 9, pct_start=2.0)", ValueError, "between 0 and 1 pct_start"),
        ("OneCycleLR(o, 1, 9, anneal_strategy='x')", ValueError, "one of 'cos' or 'linear'"),
        ("OneCycleLR(o, [1], 9)", ValueError, "max_lr has 1 values, param_groups has 2"),
        ("ReduceLROnPlateau(o, 'x')", ValueError, "mode x is unknown!"),
        ("ReduceLROnPlateau(o, factor=1)", ValueError, "Factor should be < 1.0"),
        ("ReduceLROnPlateau(o, threshold_mode='x')", ValueError, "threshold mode x is unknown"),
        ("SequentialLR(o, [], [])", ValueError, "at least one scheduler"),
        ("SequentialLR(o, [lr_scheduler.StepLR(o, 1)], [1])", ValueError, "one more than the num"),
        ("ChainedScheduler([])", ValueError, "at least one scheduler"),
        ("ChainedScheduler([lr_scheduler.StepLR(o, 1), 1])", TypeError, "at index 1 should have"),
        ("ChainedScheduler([lr_scheduler.ReduceLROnPlateau(o)])", ValueError, "does not support"),
    ],
)
def test_what_is_refused(schedule, error, sentence):
    with pytest.raises(error, match=sentence):
        build(torch, schedule, optimizer(torch))


def test_schedules_of_two_optimizers_are_not_combined():
    schedules = [lr_scheduler.StepLR(optimizer(torch), 1) for _ in range(2)]
    with pytest.raises(ValueError, match="same optimizer, but got scheduler StepLR at index 1"):
        lr_scheduler.ChainedScheduler(schedules)


def test_one_cycle_ends():
    scheduler = lr_scheduler.OneCycleLR(optimizer(torch), 1.0, total_steps=2)
    scheduler.optimizer.step()
    scheduler.step()
    scheduler.step()
    with pytest.raises(ValueError, match="Tried to step 3 times"):
        scheduler.step()
