"""`dtrun debug`, SIGUSR1, and the last calls in the report of a failed run."""

from __future__ import annotations

import os
import select
import signal

import pytest

from dtrun import debug, table
from dtrun.table import verdict
from tests.dtrun.launch import DEADLINE, wait_until

HANGS = """
    import dtrain as torch
    dist = torch.distributed
    dist.init_process_group()
    dist.all_reduce(torch.ones(4))
    def load():
        print("loading", flush=True)
        while not os.path.exists("go"):
            time.sleep(0.01)
    if rank == 1:
        load()
    dist.barrier()
    """


def started(dtrun, *options):
    """A run of two ranks whose rank 1 does not come; rank 0 waits for it."""
    process = dtrun.start("--nproc-per-node", "2", *options, dtrun.script(HANGS))
    assert select.select([process.stdout], [], [], DEADLINE)[0]
    directory = next(path for path in dtrun.run_dirs.iterdir())
    wait_until(lambda: "#1 barrier()" in debug.ask(str(directory / "0")), DEADLINE)
    return process


def go_on(dtrun, process):
    (dtrun.folder / "go").touch()
    out, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0
    return out, err


def check_table(text):
    lines = [line.strip() for line in text.splitlines()]
    rank0 = next(line for line in lines if line.startswith("rank 0 (pid "))
    assert "last completed #0 all_reduce(float32[4], op=SUM) at " in rank0
    assert "; in #1 barrier() at " in rank0
    rank1 = lines.index(next(line for line in lines if line.startswith("rank 1 (pid ")))
    assert lines[rank1].endswith("; in no call")
    assert "load()" in lines[rank1 + 1 : rank1 + 6]
    assert "time.sleep(0.01)" in lines[rank1 + 1 : rank1 + 6]
    assert "Last calls of group 'default' (2 ranks)" in lines
    assert "#1 COLLECTIVE_STATE_MISMATCH" in lines
    assert "rank 1: has not called it" in lines


def test_a_run_that_hangs_by_its_id(dtrun):
    process = started(dtrun, "--rdzv-id", f"hangs-{os.getpid()}")
    shown = dtrun.run("debug", f"hangs-{os.getpid()}")
    assert (shown.returncode, shown.stderr) == (0, "")
    check_table(shown.stdout)
    go_on(dtrun, process)


def test_sigusr1_prints_the_table_and_the_run_goes_on(dtrun):
    process = started(dtrun)
    process.send_signal(signal.SIGUSR1)
    text = b""
    while b"COLLECTIVE_STATE_MISMATCH" not in text:
        assert select.select([process.stderr], [], [], DEADLINE)[0], text
        text += os.read(process.stderr.fileno(), 65536)
    _, err = go_on(dtrun, process)
    check_table(text.decode() + err)


def test_after_a_crash_the_records_are_beside_the_logs(dtrun):
    script = dtrun.script(
        """
        import signal
        import dtrain as torch
        dist = torch.distributed
        dist.init_process_group()
        dist.barrier()
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.all_reduce(torch.ones(4))
        """
    )
    ended = dtrun.run("--nproc-per-node", "2", "--log-dir", "logs", script)
    assert ended.returncode == 128 + 9
    said = ended.stderr.partition("Last Calls:\n")[2].splitlines()
    assert said[0].startswith("  rank 0: failed #1 all_reduce(float32[4], op=SUM) at ")
    assert said[0].endswith("train.py:11 of group 'default'")
    assert said[1].startswith("  rank 1: done #0 barrier() at ")
    shown = dtrun.run("debug", "logs")
    assert shown.returncode == 0
    assert "its process has ended" in shown.stdout
    assert "#0 FULLY_MATCHED" in shown.stdout
    assert "rank 1: has not called it" in shown.stdout


def test_a_program_without_dtrain_has_no_last_calls(dtrun):
    ended = dtrun.run(dtrun.script("raise SystemExit(3)"))
    assert "Last Calls" not in ended.stderr


@pytest.mark.parametrize("run", ["nothing-of-this-name", "."])
def test_no_such_run(dtrun, run):
    shown = dtrun.run("debug", run)
    assert shown.returncode == 2
    assert shown.stderr.startswith("dtrun debug: error: ")
    assert shown.stderr.count("\n") == 1


def test_several_runs_are_listed(tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / f"dtrun-{name}").mkdir()
        debug.write_run_id(str(tmp_path / f"dtrun-{name}"), f"id-{name}")
    monkeypatch.setattr(debug, "run_dirs", lambda _: sorted(tmp_path.iterdir()))
    with pytest.raises(LookupError, match=r"several runs: id-a \(.*\), id-b \(.*\); name one"):
        debug.find(None, {})


SUM, MAX = "all_reduce(float32[4], op=SUM)", "all_reduce(float32[4], op=MAX)"
DOUBLE, LONG = "all_reduce(float64[4], op=SUM)", "all_reduce(float32[5], op=SUM)"


@pytest.mark.parametrize(
    ("signatures", "states", "complete", "expected"),
    [
        ([SUM, SUM], [3, 3], True, table.FULLY_MATCHED),
        ([SUM, SUM], [2, 2], True, table.FULLY_MATCHED),
        ([SUM, SUM], [3, 2], True, table.COLLECTIVE_STATE_MISMATCH),
        ([SUM], [2, 0], True, table.COLLECTIVE_STATE_MISMATCH),
        ([SUM], [3], False, table.UNDECIDED),
        ([SUM, "barrier()"], [2, 2], True, table.COLLECTIVE_TYPE_MISMATCH),
        ([SUM, LONG], [2, 2], True, table.SIZE_OR_SYNTAX_MISMATCH),
        ([SUM, MAX], [2, 2], False, table.SIZE_OR_SYNTAX_MISMATCH),
        ([SUM, DOUBLE], [2, 2], True, table.COLLECTIVE_DTYPE_MISMATCH),
    ],
)
def test_verdicts(signatures, states, complete, expected):
    found = verdict(dict(enumerate(signatures)), dict(enumerate(states)), complete)
    assert found == expected
