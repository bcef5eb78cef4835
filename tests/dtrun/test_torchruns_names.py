"""torchrun's other doors: its modules, the older idiom, functions as programs, @record; the flags
that change what ranks see.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dtrain.distributed.elastic.multiprocessing.errors import (
    ChildFailedError,
    ProcessFailure,
    record,
)
from dtrain.distributed.launcher.api import LaunchConfig, elastic_launch
from dtrain.distributed.run import main
from dtrun import launch
from tests.dtrun.launch import read_lines

PATIENCE = 30


def module(dtrun, name, *args):
    return subprocess.run(
        [sys.executable, "-m", f"dtrain.distributed.{name}", *args], cwd=dtrun.folder,
        capture_output=True, text=True, timeout=PATIENCE, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def test_the_module_run_is_dtrun(dtrun):
    dtrun.script("print(rank, sys.argv[1:]); sys.exit(3 if rank else 0)")
    done = module(dtrun, "run", "--nproc_per_node=2", "train.py", "--lr", "1")
    assert done.returncode == 3
    assert "[rank0]: 0 ['--lr', '1']" in done.stdout


def test_its_main_returns_or_exits(dtrun, monkeypatch, capfd):
    dtrun.script("print('ran', rank); sys.exit(int(sys.argv[1]))")
    monkeypatch.chdir(dtrun.folder)
    assert main(["train.py", "0"]) is None
    with pytest.raises(SystemExit) as end:
        main(["train.py", "5"])
    assert end.value.code == 5
    assert capfd.readouterr().out == "ran 0\nran 0\n"


def test_the_older_idiom_gives_scripts_their_local_rank(dtrun):
    dtrun.script("print(sys.argv[1:], os.environ['LOCAL_RANK'])")
    done = module(dtrun, "launch", "--nproc-per-node", "2", "train.py", "--lr", "1")
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [
        f"[rank{r}]: ['--local-rank={r}', '--lr', '1'] {r}" for r in range(2)
    ]
    assert "is deprecated" in done.stderr


def test_what_the_older_idiom_hands_on():
    assert launch.arguments(["--use-env", "train.py", "--use-env"]) == ["train.py", "--use-env"]
    assert launch.arguments(["-m", "pkg", "a"]) == ["-m", "pkg", launch.FLAG, "a"]
    with pytest.raises(ValueError, match="you must also set the '--use-env' flag"):
        launch.arguments(["--no-python", "prog"])


def squares(base):
    """In a rank: something of its own."""
    return base * int(os.environ["RANK"]) ** 2, os.environ["ROLE_NAME"]


def fails(when):
    if int(os.environ["RANK"]) == when:
        raise ValueError("the weights are gone")


def test_a_function_is_launched_and_returns_for_each_rank():
    config = LaunchConfig(1, 1, nproc_per_node=3, role="worker", run_id="r")
    assert elastic_launch(config, squares)(2) == {r: (2 * r * r, "worker") for r in range(3)}


def test_a_function_that_raises(capfd):
    config = LaunchConfig(1, 1, nproc_per_node=2, max_restarts=0)
    with pytest.raises(ChildFailedError, match=r"fails FAILED: rank 1 .*the weights are gone") as e:
        elastic_launch(config, fails)(1)
    rank, first = e.value.get_first_failure()
    assert (rank, first.exitcode, first.signal_name()) == (1, 1, "<N/A>")
    assert "ValueError: the weights are gone" in capfd.readouterr().err


def test_a_program_by_name():
    assert elastic_launch(LaunchConfig(1, 1, nproc_per_node=2), "true")() == {0: None, 1: None}
    with pytest.raises(ChildFailedError):
        elastic_launch(LaunchConfig(1, 1, nproc_per_node=1, max_restarts=0), "false")()
    with pytest.raises(ValueError, match="no such program: no-such-thing"):
        elastic_launch(LaunchConfig(1, 1, nproc_per_node=1), "no-such-thing")()


def test_settings_that_dtrun_does_not_have_are_refused():
    with pytest.raises(ValueError, match="logs_specs is not supported"):
        LaunchConfig(1, 1, nproc_per_node=1, logs_specs=object()).flags()
    flags = LaunchConfig(
        1, 2, 4, run_id="r", rdzv_endpoint="h:1", rdzv_configs={"timeout": 5},
        duplicate_stdout_filters=["a,b", "c"], virtual_local_rank=True,
    ).flags()  # fmt: skip
    assert "--nnodes=1:2" in flags
    assert "--rdzv-backend=c10d" in flags
    assert "--rdzv-conf=timeout=5" in flags
    assert "--duplicate-stdout-filters=a,,b,c" in flags
    assert "--virtual-local-rank" in flags


def test_record_lets_a_program_that_dtrun_does_not_run_leave_its_traceback(dtrun):
    head = "from dtrain.distributed.elastic.multiprocessing.errors import record\n"
    dtrun.script(head + "@record\ndef main():\n    raise KeyError('lost')\nmain()\n")
    done = dtrun.run("--no-python", sys.executable, "train.py")
    assert done.returncode == 1
    assert "in main\n    raise KeyError('lost')" in done.stderr.partition("traceback :")[2]


def test_record_raises_writes_and_returns(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))

    @record
    def end(code):
        if code is None:
            error = OSError("no")
            error.add_note("two lines\nof advice")
            raise error
        sys.exit(code)

    assert end(0) is None
    with pytest.raises(SystemExit):
        end(2)
    assert not (tmp_path / "error.json").exists()
    with pytest.raises(OSError, match="no"):
        end(None)
    told = json.loads((tmp_path / "error.json").read_text())
    assert told["message"] == "OSError: no"  # not the note behind it
    assert "in end" in told["traceback"]


def test_the_first_failure_is_the_earliest():
    failures = {2: ProcessFailure(2, 12, -9, time=5.0), 0: ProcessFailure(0, 10, 1, time=6.0)}
    error = ChildFailedError("train.py", failures)
    assert error.get_first_failure() == (2, failures[2])
    assert failures[2].signal_name() == "SIGKILL"
    assert "rank 2 (pid: 12) with exit code -9, and 1 more" in str(error)


def test_a_virtual_local_rank_is_0_for_all(dtrun):
    dtrun.script(
        """
        from dtrain import env
        print(os.environ["LOCAL_RANK"], env.local_rank())
        if rank == 1:
            os.abort()
        """
    )
    done = dtrun.run("--nproc-per-node", "2", "--virtual-local-rank", "train.py")
    assert sorted(done.stdout.splitlines()) == ["[rank0]: 0 0", "[rank1]: 0 1"]
    assert "Fatal Python error: Aborted" in done.stderr


def test_lines_with_a_word_are_copied(dtrun):
    dtrun.script(
        """
        print("loss 1,0")
        print("noise")
        sys.stdout.write("apple without an end")
        print("pear", file=sys.stderr)
        """
    )
    words = ["--duplicate-stdout-filters", "loss 1,,0,apple", "--duplicate-stderr-filters", "pear"]
    flags = ["--nproc-per-node", "2", "--log-dir", "logs", "-r", "0:1", *words]
    done = dtrun.run(*flags, "train.py")
    assert done.returncode == 0, done.stderr
    (folder,) = Path(dtrun.folder, "logs").glob("*/attempt_0")
    expected = [
        f"[rank{r}]: {text}" for r in range(2) for text in ("loss 1,0", "apple without an end")
    ]
    assert sorted((folder / "filtered_stdout.log").read_text().splitlines()) == sorted(expected)
    assert (folder / "filtered_stderr.log").read_text().count("pear") == 2
    assert (folder / "0/stdout.log").read_text() == "loss 1,0\nnoise\napple without an end"
    assert "[rank0]: loss" not in done.stdout  # redirected
    assert "[rank1]: noise" in done.stdout


@pytest.mark.parametrize(("flag", "code"), [("SIGUSR1", 128 + signal.SIGUSR1), ("SIGTERM", None)])
def test_signals_to_handle(flag, code, dtrun):
    """A signal that is named ends the run in order; SIGUSR1 that is not asks what ranks do."""
    dtrun.script("print('ready', flush=True)\ntime.sleep(60)")
    process = dtrun.start("--signals-to-handle", flag, "train.py")
    read_lines(process, 1)
    process.send_signal(signal.SIGUSR1)
    if code is None:
        assert "no rank has joined a group yet" in process.stderr.readline()
        process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=PATIENCE)
    assert f"stopped by {flag}" in err
    assert process.returncode == (code or 128 + signal.SIGTERM)
