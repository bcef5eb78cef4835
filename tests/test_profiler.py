"""Timelines: the format, arrows between ranks, what a run leaves behind."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
import threading
from collections import defaultdict

import pytest

import dtrain as torch
import dtrain.distributed as dist
from dtrain import profiler, tape as tapes
from dtrain.distributed.world import current_world, own_world
from dtrain.nn.parallel import DistributedDataParallel as DDP
from dtrain.profiler import ProfilerAction, merge, profile, record_function
from dtrain.tape import MAIN, Tape
from dtrain.testing.distributed import run_distributed
from tests.profiler_cases import SCHEDULES, actions_of, cycles_of
from tests.recorded import load_json

SLACK = 1e-3  # microseconds, of numbers that are about 1e10


def flaws(trace):
    """What is wrong with a trace by the Trace Event Format, in words."""
    found = []
    rows, flows = defaultdict(list), defaultdict(list)
    for event in trace["traceEvents"]:
        if event["ph"] not in "MXstf" or not isinstance(event["name"], str):
            found.append(f"unknown event {event}")
        elif event["ph"] == "X":
            rows[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
            if event["dur"] < 0:
                found.append(f"ends before it begins: {event}")
        elif event["ph"] != "M":
            flows[event["id"]].append(event)
    found += [f"spans in row {row} cross" for row, spans in rows.items() if crossing(spans)]
    for flow in flows.values():
        phases = "".join(event["ph"] for event in flow)
        if phases != "s" + "t" * (len(flow) - 2) + "f":
            found.append(f"a flow with phases {phases}")
        if [e["ts"] for e in flow] != sorted(e["ts"] for e in flow):
            found.append("a flow goes back in time")
        for e in flow:
            if not any(a <= e["ts"] <= b for a, b in rows[e["pid"], e["tid"]]):
                found.append(f"a flow without a span: {e}")
    return found


def crossing(spans):
    """Whether two spans of a row overlap without one lying in the other."""
    ends = []
    for begun, ended in sorted(spans, key=lambda span: (span[0], -span[1])):
        while ends and ends[-1] <= begun + SLACK:
            ends.pop()
        if ends and ended > ends[-1] + SLACK:
            return True
        ends.append(ended)
    return False


def span(ts, dur, tid=0, **more):
    return {"ph": "X", "name": "a", "pid": 0, "tid": tid, "ts": ts, "dur": dur, **more}


def arrow(ph, ts):
    return {"ph": ph, "name": "a", "cat": "flow", "id": 1, "pid": 0, "tid": 0, "ts": ts}


@pytest.mark.parametrize(
    ("events", "flaw"),
    [
        ([span(0, 10), span(5, 10)], "cross"),
        ([span(0, -1)], "ends before"),
        ([{"ph": "Q", "name": "a"}], "unknown"),
        ([span(0, 10), arrow("s", 1)], "phases"),
        ([span(0, 10), arrow("s", 5), arrow("f", 4)], "back in time"),
        ([span(0, 10), arrow("s", 5), arrow("f", 14)], "without a span"),
    ],
)
def test_the_validator_sees(events, flaw):
    assert flaw in flaws({"traceEvents": events})[0]


def test_the_validator_lets_good_traces_pass():
    events = [span(0, 10), span(2, 3), span(5, 5), arrow("s", 1), arrow("f", 3)]
    assert flaws({"traceEvents": events}) == []


def passes(folder):
    torch.manual_seed(1)
    model = DDP(torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 32)),
                bucket_cap_mb=0.004)  # fmt: skip
    with profile() as prof:
        for _ in range(2):
            with record_function("step", "an argument"):
                model(torch.ones(4, 32)).sum().backward()
        if dist.get_rank() == 0:
            dist.send(torch.ones(3), 1)
        else:
            dist.recv(torch.ones(3), 0)
    assert current_world().tape is None
    count = len(prof.events())
    model(torch.ones(4, 32)).sum().backward()
    assert len(prof.events()) == count  # it has stopped
    prof.export_chrome_trace(folder / f"rank-{dist.get_rank()}.json")
    return model.logging_data()["num_buckets_reduced"]


def test_all_ranks_in_one_file_with_arrows(tmp_path):
    buckets = run_distributed(2, passes, tmp_path)[0]
    assert buckets > 1
    trace = json.loads(merge(tmp_path).read_text())
    assert flaws(trace) == []
    assert [about["rank"] for about in trace["dtrain"]] == [0, 1]
    spans = defaultdict(list)
    for event in trace["traceEvents"]:
        if event["ph"] == "X":
            spans[event["pid"], event["cat"]].append(event)
    for rank in (0, 1):
        names = [event["name"] for event in spans[rank, "ddp"]]
        assert names == 2 * ["forward", "backward", "wait for gradients"]
        assert [event["args"] for event in spans[rank, "user"]] == 2 * [{"args": "an argument"}]
        assert len(spans[rank, "message"]) == 1
        assert len(spans[rank, "bucket"]) >= 2 * 2
    calls = [{e["args"]["seq"] for e in spans[rank, "collective"]} for rank in (0, 1)]
    assert calls[0] == calls[1]
    flows = {event["id"] for event in trace["traceEvents"] if event["ph"] in "sf"}
    assert len(flows) == len(calls[0])
    waits = [e["args"]["waited_ms"] for rank in (0, 1) for e in spans[rank, "collective"]]
    assert all(wait >= 0 for wait in waits)


def recorded_run(rank, store):
    dist.init_process_group("local", store=store, rank=rank, world_size=2)
    group = dist.new_group([0, 1])
    dist.all_reduce(torch.ones(4), group=group)
    with profile() as prof:
        dist.barrier()
    assert [event.name for event in prof.events()] == ["barrier 0 B"]
    dist.destroy_process_group()


def test_DTRAIN_TRACE_leaves_a_file_of_all_ranks(tmp_path, monkeypatch):
    monkeypatch.setenv("DTRAIN_TRACE", str(tmp_path / "traces"))
    store, errors = dist.HashStore(), []

    def main(rank):
        try:
            with own_world():
                recorded_run(rank, store)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=main, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert errors == []
    trace = json.loads((tmp_path / "traces" / "trace.json").read_text())
    assert flaws(trace) == []
    groups = {e["args"]["group"] for e in trace["traceEvents"] if e.get("cat") == "collective"}
    assert groups == {"default", "default[0,1]"}
    assert len([e for e in trace["traceEvents"] if e["ph"] == "f"]) == 2


def test_after_a_crash_what_is_there_is_merged(tmp_path):
    left = Tape(1, 3, str(tmp_path))
    left.add("forward", "ddp", MAIN, 1.0, 2.0)
    left.save()
    (tmp_path / "trace.json").unlink()
    command = [sys.executable, "-m", "dtrain.profiler", "merge", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.strip() == str(tmp_path / "trace.json")
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert flaws(trace) == []
    assert [about["rank"] for about in trace["dtrain"]] == [1]


def test_nothing_to_merge_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing to merge"):
        merge(tmp_path)


def test_the_clock_of_another_host_is_shifted(tmp_path, monkeypatch):
    for rank, (boot, joined) in enumerate([("a", 10.0), ("a", 10.5), ("b", 900.0)]):
        monkeypatch.setattr(tapes, "_boot", lambda boot=boot: boot)
        tape = Tape(rank, 3, str(tmp_path))
        tape.joined = joined
        tape.add("all_reduce", "collective", "group", joined + 1, joined + 2, group="g", seq=0)
        tape.save()
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert [about["shift"] for about in trace["dtrain"]] == [0, 0, -890e6]
    begun = [e["ts"] for e in trace["traceEvents"] if e["ph"] == "X"]
    assert begun == [11e6, 11.5e6, 11e6]
    assert flaws(trace) == []


def test_a_full_tape_counts_what_it_drops(tmp_path, monkeypatch):
    monkeypatch.setattr(tapes, "LIMIT", 1)
    tape = Tape(0, 1, str(tmp_path))
    for _ in range(3):
        tape.add("forward", "ddp", MAIN, 1.0, 2.0)
    tape.save()
    assert json.loads((tmp_path / "trace.json").read_text())["dtrain"][0]["dropped"] == 2


def test_a_profile_that_was_not_started_says_so():
    with pytest.raises(RuntimeError, match="has not been started"):
        profile().stop()


def test_a_profile_calls_back_when_it_is_ready():
    ready = []
    with own_world(), profile(on_trace_ready=ready.append) as prof, record_function("mine"):
        pass
    assert ready == [prof]
    assert [event.name for event in prof.events()] == ["mine"]


# ---- all files in one, by the last rank


def test_the_last_rank_merges_once(tmp_path, monkeypatch):
    """Files are read once in all, however many ranks there are; one that died is not waited for."""
    merges, inner = [], tapes.merge
    monkeypatch.setattr(tapes, "merge", lambda folder: merges.append(inner(folder)))
    ranks = [Tape(rank, 5, str(tmp_path)) for rank in range(5)]
    for tape in ranks:
        tape.add("forward", "ddp", MAIN, 1.0, 2.0)
    for rank in (3, 1, 0):
        ranks[rank].save()
    assert merges == []
    ranks[2]._alive.close()  # what the kernel does when a process dies
    ranks[4].save()
    assert merges == [tmp_path / "trace.json"]
    trace = json.loads(merges[0].read_text())
    assert [about["rank"] for about in trace["dtrain"]] == [0, 1, 3, 4]


# ---- schedules


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_those_of_torch(name):
    """Actions of each step, when a trace is ready, and which steps are in it."""
    with own_world():
        found = [f(profiler, SCHEDULES[name]) for f in (actions_of, cycles_of)]
    assert found == load_json("profiler_schedules")[name]


@pytest.mark.parametrize("wrong", [{"wait": -1}, {"active": 0}, {"skip_first": -2}])
def test_schedules_that_cannot_be(wrong):
    with pytest.raises(AssertionError, match=r"Invalid profiler schedule arguments\. Got wait="):
        profiler.schedule(**{"wait": 1, "warmup": 1, "active": 1, **wrong})
    with pytest.raises(AssertionError, match=r"Step must be non-negative\. Got -1\."):
        profiler.schedule(wait=1, warmup=1, active=1)(-1)


def test_a_schedule_that_drops_what_it_recorded_is_warned_of():
    actions = [ProfilerAction.RECORD, ProfilerAction.NONE, ProfilerAction.RECORD_AND_SAVE]
    ready = []
    with own_world(), profile(schedule=actions.__getitem__, on_trace_ready=ready.append) as prof:
        with pytest.warns(UserWarning, match="RECORD followed by NONE"):
            prof.step()
        assert ready == []
        prof.step()
    assert ready == [prof]
    with pytest.raises(TypeError, match="gives a ProfilerAction for each step, got 2"):
        profile(schedule=lambda step: 2)
    with pytest.raises(RuntimeError, match="has not been started"):
        prof.step()


def check_cycles(folder, use_gzip):
    """Two cycles of two steps under a schedule: two files of this rank's steps alone."""
    model = DDP(torch.nn.Linear(4, 4))
    rank = dist.get_rank()
    handler = profiler.tensorboard_trace_handler(
        str(folder / "made"), worker_name=f"rank{rank}", use_gzip=use_gzip
    )
    plan = profiler.schedule(wait=1, warmup=1, active=2, repeat=2)
    with profile(
        activities=[profiler.ProfilerActivity.CPU], schedule=plan, on_trace_ready=handler
    ) as prof:
        with pytest.raises(RuntimeError, match="nothing has been recorded up to step 0"):
            prof.export_chrome_trace("nowhere.json")
        for _ in range(10):
            model(torch.ones(1, 4)).sum().backward()
            prof.step()
    assert current_world().tape is None


@pytest.mark.parametrize("use_gzip", [False, True])
def test_files_where_tensorboard_looks(tmp_path, use_gzip):
    run_distributed(2, check_cycles, tmp_path, use_gzip)
    ending = r"\.json\.gz" if use_gzip else r"\.json"
    names = sorted(os.listdir(tmp_path / "made"))
    assert len(names) == 4
    for i, name in enumerate(names):
        assert re.fullmatch(rf"rank{i // 2}\.\d+\.pt\.trace{ending}", name)
        content = (tmp_path / "made" / name).read_bytes()
        trace = json.loads(gzip.decompress(content) if use_gzip else content)
        assert flaws(trace) == []
        shown = [e["name"] for e in trace["traceEvents"] if e["ph"] == "X"]
        first = (2, 6)[i % 2]
        steps = [name for name in shown if name.startswith("ProfilerStep")]
        assert steps == [f"ProfilerStep#{first}", f"ProfilerStep#{first + 1}"]
        assert shown.count("backward") == 2


# ---- passes that do not reduce, and averages


def check_no_sync():
    model = DDP(torch.nn.Linear(4, 4))
    with profile() as prof:
        with model.no_sync():
            model(torch.ones(1, 4)).sum().backward()
        model(torch.ones(1, 4)).sum().backward()
    return [event.name for event in prof.events() if event.category == "ddp"]


def test_passes_without_reduction_are_shown():
    expected = "forward,backward without reduction,forward,backward,wait for gradients"
    assert run_distributed(2, check_no_sync) == [expected.split(",")] * 2


class HeldUp(torch.autograd.Function):
    """The identity; in backward it goes on when the last bucket that is full has been reduced."""

    reducer = threading.local()

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        HeldUp.reducer.of._flights[-1].work.wait(20.0)
        return grad


def check_overlap():
    """Spans, as (begin, end): the all-reduces of two buckets, backward, the wait after it."""
    first, second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList([first, second])

        def forward(self, x):
            return second(HeldUp.apply(first(x)))

    model = DDP(Model(), bucket_cap_mb=1e-5)
    HeldUp.reducer.of = model.reducer
    model(torch.ones(1, 4)).sum().backward()  # the buckets are made anew before the next
    with profile() as prof:
        model(torch.ones(1, 4)).sum().backward()
    spans = [(e.name.partition(" ")[0], e.begun, e.ended) for e in prof.events()]
    return [[span[1:] for span in spans if span[0] == name]
            for name in ("all_reduce", "backward", "wait")]  # fmt: skip


@pytest.mark.parametrize("transport", ["local", "tcp"])
def test_what_is_reduced_beside_backward_lies_under_it(transport):
    for reduced, (backward,), (wait,) in run_distributed(2, check_overlap, transport=transport):
        assert len(reduced) > 2
        assert backward[0] < reduced[0][0] < reduced[0][1] < backward[1]
        assert backward[1] <= reduced[-1][1] <= wait[1]


def test_averages_have_self_times_without_inner_spans():
    tape = Tape(0, 1)
    for step in range(2):
        tape.add("inner", "user", MAIN, step + 0.25, step + 0.5)
        tape.add("innermost", "user", MAIN, step + 0.25, step + 0.375)
        tape.add(f"ProfilerStep#{step}", "user", MAIN, step, step + 1)
    tape.add("inner", "collective", "group", 0.0, 2.0)
    rows = {row.key: row for row in profiler.profiler.averages_of(tape.events)}
    times = {
        key: (row.count, row.cpu_time_total / 1e6, row.self_cpu_time_total / 1e6)
        for key, row in rows.items()
    }
    assert times == {
        "inner": (3, 2.5, 2.25), "innermost": (2, 0.25, 0.25), "ProfilerStep*": (2, 2.0, 1.5)
    }  # fmt: skip


def test_a_table_of_averages():
    with own_world(), profile() as prof:
        for name in ("one", "two", "two"):
            with record_function(name):
                pass
    table = prof.key_averages().table(sort_by="count", row_limit=1, header="times")
    header, columns, row = table.splitlines()
    assert header == "times"
    assert columns.split()[:3] == ["Name", "Self", "ms"]
    assert row.split()[0] == "two"
    assert row.split()[-1] == "2"
    assert len(prof.key_averages().table(row_limit=-1).splitlines()) == 3
    with pytest.raises(ValueError, match="sort_by is one of"):
        prof.key_averages().table(sort_by="name")
