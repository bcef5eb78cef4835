"""mp.spawn: torch's sentences, the cause among several failures, and nothing that is left."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time

import pytest

import dtrain as torch
from tests.dtrun.launch import living, wait_until
from tests.multiprocessing import programs
from tests.tree import ROOT

mp = torch.multiprocessing
METHODS = ("spawn", "fork", "forkserver")
# Newer Pythons warn of what "fork" is known for.
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


def failure_of(context, **options):
    """The exception that joining raises, without the frames that keep its processes."""
    try:
        while not context.join(**options):
            pass
    except mp.ProcessException as error:
        return error.with_traceback(None)
    raise AssertionError("joining did not raise")


def test_it_is_multiprocessing_and_more():
    assert mp.Process is multiprocessing.Process
    assert set(multiprocessing.__all__) < set(mp.__all__)
    assert mp.get_sharing_strategy() == "file_descriptor"
    mp.set_sharing_strategy("file_system")
    assert mp.get_sharing_strategy() == "file_system"
    assert mp.get_all_sharing_strategies() == {"file_descriptor", "file_system"}
    mp.set_sharing_strategy("file_descriptor")
    with pytest.raises(ValueError, match="unknown sharing strategy 'x'"):
        mp.set_sharing_strategy("x")


@pytest.mark.parametrize("method", METHODS)
def test_each_process_is_given_its_number_and_the_arguments(tmp_path, method):
    assert mp.start_processes(programs.write_rank, (tmp_path, "a"), 3, start_method=method) is None
    written = [(tmp_path / str(i)).read_text().split() for i in range(3)]
    assert [word for word, _ in written] == ["a"] * 3
    assert len({pid for _, pid in written} | {str(os.getpid())}) == 4


def test_ranks_meet_and_share_the_cores(tmp_path, monkeypatch):
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    meeting = (tmp_path / "meeting", 2, tmp_path)
    mp.start_processes(programs.all_reduce, meeting, 2, start_method="forkserver")
    share = max(1, len(os.sched_getaffinity(0)) // 2)
    assert [(tmp_path / str(i)).read_text() for i in range(2)] == [f"3.0 {share}"] * 2


@pytest.mark.parametrize(
    ("how", "kind", "code", "name", "sentence"),
    [
        ("exit", mp.ProcessExitedException, 7, None, "process 1 terminated with exit code 7"),
        ("kill", mp.ProcessExitedException, -9, "SIGKILL", "process 1 terminated with signal SIG"),
        ("crash", mp.ProcessExitedException, -11, "SIGSEGV", "terminated with signal SIGSEGV"),
        ("raise", mp.ProcessRaisedException, None, None, "\n\n-- Process 1 terminated with the fo"),
        ("long", mp.ProcessRaisedException, None, None, " the end\n"),
    ],
)
def test_a_failure_is_told_in_torchs_words_and_ends_the_others(how, kind, code, name, sentence):
    begin = time.monotonic()
    context = mp.start_processes(programs.fail, (how,), 3, join=False, start_method="forkserver")
    pids = context.pids()
    raised = failure_of(context)
    assert type(raised) is kind
    assert time.monotonic() - begin < 30
    assert sentence in str(raised)
    assert (raised.error_index, raised.error_pid) == (1, pids[1])
    assert not living(pids)
    if code is None:
        assert "ValueError" in str(raised) or how == "long"
    else:
        assert (raised.exit_code, raised.signal_name) == (code, name)
    again = pickle.loads(pickle.dumps(raised))
    assert (str(again), again.error_index) == (str(raised), 1)


def test_the_cause_is_raised_and_not_its_first_victim():
    started = multiprocessing.get_context("forkserver").Event()
    context = mp.start_processes(
        programs.lose, (started,), 2, join=False, start_method="forkserver"
    )
    context.processes[0].join(20)
    started.set()
    raised = failure_of(context)
    assert "ValueError: the reason" in str(raised)
    assert raised.error_index == 1


def test_a_process_that_ignores_sigterm_is_killed():
    begin = time.monotonic()
    context = mp.start_processes(programs.stubborn, (), 2, join=False, start_method="forkserver")
    for _ in range(2):  # and so it is to whoever asks once more
        assert "no data for rank 1" in str(failure_of(context, grace_period=0.3))
    assert time.monotonic() - begin < 10


def test_join_without_time_says_that_they_still_run(tmp_path):
    context = mp.start_processes(
        programs.sleep, (tmp_path,), 1, join=False, start_method="forkserver"
    )
    assert context.join(timeout=0.01) is False
    context.processes[0].kill()
    assert str(failure_of(context)) == "process 0 terminated with signal SIGKILL"


def test_an_interrupt_in_a_process_is_no_failure_of_it():
    assert mp.start_processes(programs.interrupted, (), 2, start_method="forkserver") is None


def test_tensors_travel_through_queues_as_copies():
    context = mp.get_context("forkserver")
    questions, answers = context.SimpleQueue(), context.SimpleQueue()
    x = torch.arange(6, dtype=torch.float32).view(2, 3).requires_grad_()
    questions.put(x)
    mp.start_processes(programs.answer, (questions, answers), 1, start_method="forkserver")
    y = answers.get()
    assert torch.equal(y, 2 * x)
    assert (y.dtype, y.requires_grad, y.is_leaf) == (torch.float32, True, True)
    questions.close()
    answers.close()


def test_a_function_without_a_name_is_refused_and_nothing_stays():
    with pytest.raises((AttributeError, pickle.PicklingError)):
        mp.spawn(lambda index: None, nprocs=2)


def test_spawn_takes_no_other_method():
    with (
        pytest.warns(FutureWarning, match=r"only supports start_method=spawn \(got: fork\)"),
        pytest.raises((AttributeError, pickle.PicklingError)),
    ):
        mp.spawn(lambda index: None, start_method="fork")


@pytest.mark.parametrize("threaded", [False, True], ids=["main", "thread"])
@pytest.mark.parametrize("method", METHODS)
def test_processes_do_not_outlive_a_parent_that_is_killed(tmp_path, method, threaded):
    code = (
        "import pathlib; from tests.multiprocessing import programs\n"
        f"if __name__ == '__main__':\n"
        f"    programs.start_and_wait({method!r}, pathlib.Path({str(tmp_path)!r}), {threaded})\n"
    )
    (tmp_path / "parent.py").write_text(code)
    with subprocess.Popen(
        [sys.executable, str(tmp_path / "parent.py")],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
    ) as parent:
        files = [tmp_path / "0.pid", tmp_path / "1.pid"]
        try:
            wait_until(lambda: all(file.exists() for file in files), 30.0)
            pids = [int(file.read_text()) for file in files]
            assert living(pids) == pids
        finally:
            parent.send_signal(signal.SIGKILL)
    wait_until(lambda: not living(pids))
