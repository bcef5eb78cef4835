"""Every example runs, alone and under dtrun, and does what its text says; a resume is exact."""

from __future__ import annotations

import re
import sys

import pytest

import dtrain
from dtrain.distributed.checkpoint.format_utils import dcp_to_torch_save
from tests.end_to_end.launch import ROOT, dtrun, run

EXAMPLES = ROOT / "examples"
LOSS = re.compile(r"step +(\d+)  loss (\d+\.\d+)  valid (\d+\.\d+)")


def test_hello_collectives():
    """3 ranks start with r + 1: the sum is 6, rank 0's value is 1."""
    ended = dtrun(3, EXAMPLES / "hello_collectives.py")
    assert ended.code == 0, ended.err
    for rank in range(3):
        assert (
            f"rank {rank} of 3: all_reduce 6, broadcast 1, all_gather [1.0, 2.0, 3.0], "
            f"all_to_all {[10.0 * src + rank for src in range(3)]}" in ended.out
        )


def test_pipeline_gpt():
    """The losses of two stages are those of one; the bubble of 4 microbatches is 1 / 5."""
    options = ["--steps", 20, "--width", 32, "--layers", 2, "--context", 16, "--microbatches", 4]
    script = EXAMPLES / "pipeline_gpt.py"
    one, two = (dtrun(n, script, "--data", script, *options) for n in (1, 2))
    assert one.code == two.code == 0, one.err + two.err
    losses = [re.findall(r"loss (\d\.\d+)", ended.out) for ended in (one, two)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
    assert float(losses[1][1]) < float(losses[1][0]) - 0.1
    assert re.search(r"1F1B, 2 stages, 4 microbatches: bubble \d+%, of equal stages 20%", two.out)


@pytest.mark.parametrize("ranks", [0, 2], ids=["one process", "two ranks"])
def test_train_digits(ranks):
    script, options = EXAMPLES / "train_digits.py", ["--epochs", 6]
    ended = dtrun(ranks, script, *options) if ranks else run(sys.executable, script, *options)
    assert ended.code == 0, ended.err
    accuracy = float(re.findall(r"accuracy (\d\.\d+)", ended.out)[-1])
    assert accuracy > 0.93


@pytest.mark.skipif(sys.platform != "linux", reason="the limit of memory is Linux's")
def test_fsdp_larger_than_memory():
    """FSDP trains, DDP runs out of memory, under the same limit."""
    script = EXAMPLES / "fsdp_larger_than_memory.py"
    ended = dtrun(2, script, "--steps", 3)
    assert ended.code == 0, ended.err
    first, last = (float(loss) for loss in re.findall(r"loss (\d+\.\d+)", ended.out))
    assert last < first
    state, limit = map(
        int, re.search(r"(\d+) MiB of state, a rank may use (\d+)", ended.out).groups()
    )
    assert state >= 1.5 * limit
    ended = dtrun(2, script, "--steps", 3, "--ddp")
    assert ended.code != 0
    assert "MemoryError" in ended.err + ended.out


SMALL = ["--steps", 50, "--batch-size", 4, "--context", 24, "--data", EXAMPLES / "train_gpt.py"]

# Runs a script whose process ends hard right after the second checkpoint has its name.
CRASH = """
import os, runpy, sys
from dtrain.distributed.checkpoint import _disk
exchange = _disk.exchange
def crash(*names):
    exchange(*names)
    os._exit(3)
_disk.exchange = crash
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("kind", [[], ["--fsdp"]], ids=["replicated", "fully sharded"])
def test_train_gpt_learns_and_a_crash_changes_nothing(tmp_path, kind):
    """50 steps in one go, and 41 steps, a crash and a resume, end with the same bits."""
    script = EXAMPLES / "train_gpt.py"
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    once = dtrun(2, script, "--checkpoint", whole, *SMALL, *kind)
    assert once.code == 0, once.err
    steps = LOSS.findall(once.out)
    assert [int(step) for step, _, _ in steps] == [0, 40, 49]
    assert float(steps[0][1]) == pytest.approx(5.6, abs=0.3)
    assert float(steps[-1][1]) < 4.0

    (tmp_path / "crash.py").write_text(CRASH)
    crash = [tmp_path / "crash.py", script]
    crashed = dtrun(2, *crash, "--checkpoint", parts, *SMALL, *kind)
    assert crashed.code == 3, crashed.err
    resumed = dtrun(2, script, "--resume", "--checkpoint", parts, *SMALL, *kind)
    assert resumed.code == 0, resumed.err
    assert LOSS.findall(resumed.out) == steps[2:]
    assert_equal(content(parts), content(whole))


def content(folder):
    """A checkpoint in whole tensors."""
    file = folder.with_suffix(".pt")
    dcp_to_torch_save(folder, file)
    return dtrain.load(file)


def assert_equal(ours, theirs):
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for key in theirs:
            assert_equal(ours[key], theirs[key])
    elif isinstance(theirs, (list, tuple)):
        for one, other in zip(ours, theirs, strict=True):
            assert_equal(one, other)
    else:
        assert bool((ours == theirs).all() if hasattr(theirs, "all") else ours == theirs)


def test_train_gpt_refuses_a_file_that_is_not_there(tmp_path):
    ended = run(sys.executable, EXAMPLES / "train_gpt.py", "--data", tmp_path / "nothing.txt")
    assert ended.code == 1
    assert "nothing.txt" in ended.err.splitlines()[-1]


def test_ddp_comm_hooks():
    """Every hook sends what it computes, and DDP's own flags; those with 8 bits or more learn."""
    ended = dtrun(2, EXAMPLES / "ddp_comm_hooks.py", "--epochs", 2)
    assert ended.code == 0, ended.err
    row = re.compile(r"^(.+?) {2,}(\d+|-) +(\d+) +(\d+\.\d+) +(\d\.\d+) +\d+\.\d$", re.MULTILINE)
    rows = {name.split("]: ")[-1]: numbers for name, *numbers in row.findall(ended.out)}
    assert len(rows) == 11
    exact = float(rows.pop("none")[2])
    for name, (computed, sent, loss, _) in rows.items():
        assert 0 < int(sent) - int(computed) < 200, name
        if name in ("allreduce", "fp16", "bf16", "8 bits", "8 bits per 512"):
            assert float(loss) == pytest.approx(exact, abs=0.02)


def test_rpc_parameter_server():
    """It learns; two trainers, whoever is first, do what one does, and the same bits each time."""
    script, options = EXAMPLES / "rpc_parameter_server.py", ["--epochs", 4]
    runs = [dtrun(ranks, script, *options) for ranks in (3, 3, 2)]
    assert [ended.code for ended in runs] == [0, 0, 0], runs[0].err
    two, again, one = (
        re.findall(r"loss (\d\.\d+)  accuracy (\d\.\d+)", ended.out) for ended in runs
    )
    assert two == again
    assert [float(loss) for loss, _ in two] == pytest.approx([float(n) for n, _ in one], abs=1e-3)
    assert float(two[-1][1]) > 0.92
    assert not any("still held" in ended.err for ended in runs)


def test_rpc_pipeline():
    """The losses of two stages are those of one, and fall; at the end nobody holds anything."""
    script = EXAMPLES / "rpc_pipeline.py"
    runs = [dtrun(n, script, "--data", script, "--steps", 30) for n in (2, 3)]
    assert [ended.code for ended in runs] == [0, 0], runs[0].err + runs[1].err
    one, two = ([float(n) for n in re.findall(r"loss (\d\.\d+)", ended.out)] for ended in runs)
    assert len(one) == 3
    assert two == pytest.approx(one, abs=2e-3)
    assert two[-1] < two[0] - 0.5
    assert "29 parameters in 2 stages" in runs[1].out
    assert not any("still held" in ended.err for ended in runs)


def test_rpc_actor_learner():
    """Random actions keep a pole up for some 22 steps of 200; what was learned, above 150."""
    ended = dtrun(3, EXAMPLES / "rpc_actor_learner.py")
    assert ended.code == 0, ended.err
    rewards = [float(reward) for reward in re.findall(r"reward +(\d+\.\d)", ended.out)]
    assert rewards[0] < 40
    assert rewards[-1] > 150
    assert "still held" not in ended.err
