"""Units under way beside what computes, read from the trace; what was exposed, and the reason."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

import dtrain as torch
import dtrain.distributed as dist
from dtrain.distributed.fsdp import FullyShardedDataParallel, fully_shard
from dtrain.distributed.fsdp.meter import Pass, Transfer
from dtrain.distributed.fsdp.reports import why_exposed
from dtrain.distributed.fsdp.root import LIMIT
from dtrain.distributed.fsdp.unit import State
from dtrain.profiler import profile, record_function
from dtrain.testing.distributed import run_distributed
from tests.comm.hosts import islands

nn = torch.nn

LAYERS = 5


class Held(torch.autograd.Function):
    """Computes in backward until the unit that backward wants next has been gathered."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        layer = ctx.layer
        layer.look(layer.before)
        return grad.clone(), None


class Patient(nn.Module):
    """A layer that computes until the unit that is wanted next has been gathered.

    It could not end if that were not done beside it. `most`: units whole or under way, and being
    reduced, while one of these computed.
    """

    def __init__(self, number):
        super().__init__()
        self.number, self.linear = number, nn.Linear(4, 4)
        self.state = self.after = self.before = None  # its own and those of its neighbours
        self.holds, self.most = False, (0, 0)

    def forward(self, x):
        x = Held.apply(self.linear(x), self)
        with record_function(f"layer {self.number}"):
            self.look(self.after)
            return x

    def look(self, following):
        root = self.state.root
        whole = sum(unit.state is not State.SHARDED for unit in root.units if unit.where)
        self.most = max(self.most, (whole, len(root._flights)))
        if self.holds and following is not None:
            (unit,) = following.units
            unit._gathering.work.wait(10.0)


def by_fully_shard(*, named):
    model = nn.Sequential(*(Patient(n) for n in range(LAYERS)))
    layers = [fully_shard(layer, reshard_after_forward=True) for layer in model]
    for layer in layers:
        layer.state = layer._fsdp_state
    if named:
        for this, following in itertools.pairwise(layers):
            this.set_modules_to_forward_prefetch([following])
            following.set_modules_to_backward_prefetch([this])
    return fully_shard(model), layers


def by_wrapper(*, named):
    model = FullyShardedDataParallel(
        nn.Sequential(*(Patient(n) for n in range(LAYERS))), auto_wrap_policy=only_patient
    )
    inner = FullyShardedDataParallel.fsdp_modules(model)[1:]
    for wrapper in inner:
        wrapper.module.state = wrapper._fsdp_state
    return model, [wrapper.module for wrapper in inner]


def only_patient(module, recurse, **_):
    return recurse or isinstance(module, Patient)


def traced(made, named):
    """Events of this rank's second pass, of those held; the pass, its report; the most at once."""
    model, layers = made(named=named)
    for this, following in itertools.pairwise(layers):
        this.after, following.before = following.state, this.state
    model(torch.ones(2, 4)).sum().backward()
    for layer in layers:
        layer.holds = True
    with profile() as prof:
        model(torch.ones(2, 4)).sum().backward()
    most = [layer.most for layer in layers]
    return list(prof.events()), model._fsdp_state.root.meter.last, model.step_report(), most


@pytest.mark.parametrize(
    ("made", "named", "transport", "ranks"),
    [
        (by_fully_shard, False, "zmq", 2),
        (by_fully_shard, True, "zmq", 2),
        (by_wrapper, False, "zmq", 2),
        (by_fully_shard, False, islands(2, 2), 4),
        (by_fully_shard, True, islands(2, 2), 4),
        (by_wrapper, False, islands(1, 1), 2),
    ],
)
def test_the_next_unit_is_gathered_under_the_computation_of_the_one_before(
    made, named, transport, ranks
):
    """By messages between ranks, and over hosts, of one rank and of several."""
    for events, done, report, most in run_distributed(
        ranks, traced, made, named, transport=transport
    ):
        gathers = {(t.phase, t.unit): t for t in done.transfers if t.kind == "gather"}
        spans = {event.name: event for event in events}
        for this in range(LAYERS - 1):
            following = gathers["forward", str(this + 1)]
            assert following.exposed == 0.0, report
            assert following.ended <= spans[f"layer {this}"].ended
            assert gathers["backward", str(this)].exposed == 0.0, report
        assert max(whole for whole, _ in most) == LIMIT
        assert max(flights for _, flights in most) <= LIMIT


class Nested(nn.Module):
    """Units in a unit, one behind it, and a head that belongs to the root."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
        self.behind, self.head = nn.Linear(4, 4), nn.Linear(4, 4)
        self.inner.register_parameter("scale", nn.Parameter(torch.ones(4)))
        self.inner.register_forward_hook(lambda module, args, output: output * module.scale)

    def forward(self, x):
        return self.head(self.behind(self.inner(x)))


def gathers_of_nested(by):
    model = Nested()
    if by is FullyShardedDataParallel:
        parts = {*model.inner, model.inner, model.behind}
        model = by(model, auto_wrap_policy=lambda module, recurse, **_: recurse or module in parts)
    else:
        for part in (*model.inner, model.inner, model.behind):
            by(part)
        by(model)
    for _ in range(2):
        model(torch.ones(2, 4)).sum().backward()
    transfers = model._fsdp_state.root.meter.last.transfers
    found = [each for each in transfers if each.kind == "gather"]
    return [
        [(each.unit, each.ahead) for each in found if each.phase == phase]
        for phase in ("forward", "backward")
    ]


@pytest.mark.parametrize("by", [fully_shard, FullyShardedDataParallel])
def test_all_but_the_first_unit_is_gathered_ahead_in_a_tree_of_units(by):
    """In backward units come in the reverse of the order in which their forwards ended."""
    for forward, backward in run_distributed(2, gathers_of_nested, by, transport="zmq"):
        assert [unit for unit, _ in forward] == ["", "inner", "inner.0", "inner.1", "inner.2",
                                                 "behind"]  # fmt: skip
        assert [ahead for _, ahead in forward] == [False] + [True] * 5
        assert [unit for unit, _ in backward] == ["behind", "inner", "inner.2", "inner.1",
                                                  "inner.0"]  # fmt: skip
        assert all(ahead for _, ahead in backward), backward


def check_trace():
    """Units stand in the trace with the times of their calls and what the report says."""
    model, _ = by_fully_shard(named=False)
    for _ in range(2):
        with profile() as prof:
            model(torch.ones(2, 4)).sum().backward()
    done = model._fsdp_state.root.meter.last
    units = [event for event in prof.events() if event.category == "unit"]
    calls = {e.args["seq"]: e for e in prof.events() if e.category == "collective"}
    assert len(units) == len(done.transfers) == 3 * LAYERS
    for event, each in zip(units, done.transfers, strict=True):
        call = calls[event.args["seq"]]
        assert (event.begun, event.ended) == (call.begun, call.ended)
        assert event.name == f"{each.kind} {each.unit}"
        assert f"{each.unit}.linear.weight" in call.args["call"]
        assert event.args["exposed_ms"] == each.exposed * 1e3
    total = sum(event.args["exposed_ms"] for event in units)
    assert f"stood still for {total:.2f} ms" in model.step_report()
    names = {event.name for event in prof.events() if event.category == "fsdp"}
    assert names == {"forward", "backward", "wait for gradients"}


def test_units_stand_in_the_trace():
    run_distributed(2, check_trace, transport="zmq")


def check_shared():
    model, _ = by_fully_shard(named=False)
    with pytest.raises(RuntimeError, match="no backward pass has been reduced yet"):
        model.step_report()
    model(torch.ones(2, 4)).sum().backward()
    report = model.step_report()
    assert report.startswith(f"pass 0 on rank {dist.get_rank()} of 2: forward ")
    assert "until all ranks had shown their parameters" in report
    assert report.count("reduce in backward") == LAYERS
    assert "gather" not in report
    model.set_requires_gradient_sync(False)
    model(torch.ones(2, 4)).sum().backward()
    assert "in 0 calls" in model.step_report()


def test_ranks_that_share_memory_gather_nothing():
    run_distributed(2, check_shared, transport="shm")


EACH = Transfer(
    unit="layers.1", kind="gather", phase="forward", nbytes=4, seq=7, issued=1.0, begun=1.0,
    ended=3.0, wanted=2.0, ahead=True, beside=True,
)  # fmt: skip
BEFORE = dataclasses.replace(EACH, unit="layers.0", seq=6, begun=0.0, ended=1.9)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"ended": 1.5}, None),
        ({"waits": {1: 0.9}}, "rank 1 came late: 900.00 ms of it waited for that rank"),
        ({"beside": False}, "where it was wanted"),
        ({"ahead": False}, "not gathered ahead: no prefetch names it"),
        ({"begun": 1.9}, "previous still running: it waited 900.00 ms"),
        ({"begun": 2.8}, "previous still running"),
        ({"begun": 2.8, "seq": 5}, "started late: the thread that carries calls"),
        ({}, "too little to compute beside it: it took 2000.00 ms, 1000.00 ms of it beside"),
        ({"kind": "reduce", "cause": "limit"}, "limit: no more units may be reduced at once"),
        ({"kind": "reduce", "cause": "end"}, "nothing left to compute"),
    ],
)
def test_the_reason(changes, reason):
    each = dataclasses.replace(EACH, **changes)
    done = Pass(3, shadow=False, forward=(0.0, 4.0), transfers=[BEFORE, each])
    said = why_exposed(done, each, memory=True)
    assert said is None if reason is None else said.startswith(reason)


def test_what_was_not_gathered_ahead():
    each = dataclasses.replace(EACH, ahead=False)
    first = Pass(0, shadow=False, forward=(0.0, 4.0), transfers=[BEFORE, each])
    assert "the order of units is learned in the first pass" in why_exposed(first, each, True)
    alone = Pass(3, shadow=False, forward=(0.0, 4.0), transfers=[each])
    assert "nothing is computed before it in forward" in why_exposed(alone, each, True)
