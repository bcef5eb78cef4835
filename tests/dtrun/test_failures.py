"""Runs that fail: exit codes, the report, how soon everybody else is gone."""

from __future__ import annotations

import json
import subprocess
import time

import pytest

from tests.dtrun.launch import living, wait_until

# Ranks that are not the cause wait like this; it is never waited for.
FOREVER = "time.sleep(100)"


@pytest.mark.parametrize(
    ("how", "code"),
    [
        ("sys.exit(7)", 7),
        ("os._exit(3)", 3),
        ("raise ValueError('boom')", 1),
        ("os.kill(os.getpid(), 9)", 137),
        ("import ctypes; ctypes.string_at(0)", 139),
    ],
)
def test_the_exit_code_of_the_first_failure_is_passed_on(dtrun, how, code):
    script = dtrun.script(f"if rank == 1:\n    open('failed', 'w').close()\n    {how}\n{FOREVER}")
    run = dtrun.run("--nproc-per-node", "2", script)
    assert run.returncode == code
    # From the failure on, 0.5 s on an idle machine: the 100 s of the other rank are not waited for.
    # The grace that it gets is stated, and held to 2 s, in test_supervisor.
    assert time.time() - (dtrun.folder / "failed").stat().st_mtime < 10.0
    assert "train.py FAILED" in run.stderr
    assert "rank      : 1 (local_rank: 1)" in run.stderr
    assert "rank 0 (local_rank: 0" in run.stderr


def test_the_root_cause_is_shown_in_full_and_once(dtrun):
    script = dtrun.script(
        """
        class PeerLost(RuntimeError):
            pass
        def inner():
            raise ValueError("the cause")
        if rank == 1:
            while not os.path.exists("lost"):
                time.sleep(0.001)
            inner()
        try:
            raise PeerLost("rank 1 is lost")
        except PeerLost as error:
            open("lost", "w").close()
            raise RuntimeError("step 3 failed") from error
        """
    )
    run = dtrun.run("--nproc-per-node", "2", script)
    assert run.returncode == 1
    cause, _, others = run.stderr.partition("Other Failures:")
    folder = dtrun.folder
    trace = (
        "Traceback (most recent call last):\n"
        f'  File "{folder}/train.py", line 11, in <module>\n    inner()\n'
        f'  File "{folder}/train.py", line 7, in inner\n    raise ValueError("the cause")\n'
        "ValueError: the cause\n"
    )
    assert trace in cause
    assert run.stderr.count("Traceback") == 1
    assert "worker.py" not in run.stderr
    assert "exitcode 1, RuntimeError: step 3 failed" in others


def test_a_crash_shows_where_it_happened(dtrun):
    run = dtrun.run(dtrun.script("import ctypes\ndef f():\n    ctypes.string_at(0)\nf()"))
    assert run.returncode == 139
    assert "Signal 11 (SIGSEGV) received by PID" in run.stderr
    assert f'File "{dtrun.folder}/train.py", line 5 in f' in run.stderr
    assert "worker.py" not in run.stderr


def test_an_exception_in_a_thread_is_the_reason_of_a_later_exit(dtrun):
    run = dtrun.run(
        dtrun.script(
            """
            import threading
            thread = threading.Thread(target=lambda: 1 / 0)
            thread.start()
            thread.join()
            sys.exit(4)
            """
        )
    )
    assert run.returncode == 4
    assert "ZeroDivisionError" in run.stderr.partition("FAILED")[2]


def test_the_last_words_of_a_killed_worker_are_kept(dtrun):
    script = dtrun.script("print('last', end='')\nif rank == 1: os.kill(os.getpid(), 9)")
    run = dtrun.run("--nproc-per-node", "2", script)
    assert run.returncode == 137
    assert "[rank1]: last" in run.stdout


def test_a_failed_rank_leaves_its_error_file_and_a_complete_log(dtrun):
    script = dtrun.script("if rank == 1: raise KeyError('k')")
    flags = ("--nproc-per-node", "2", "--log-dir", "logs", "-r", "3")
    run = dtrun.run(*flags, script)
    (folder,) = (dtrun.folder / "logs").glob("*_*/attempt_0/1")
    error = json.loads((folder / "error.json").read_text())
    assert (error["rank"], error["message"]) == (1, "KeyError: 'k'")
    assert error["traceback"] == (folder / "stderr.log").read_text()
    assert f"error_file: {folder}/error.json" in run.stderr


def test_a_script_that_cannot_be_compiled(dtrun):
    (dtrun.folder / "bad.py").write_text("x = (\n")
    run = dtrun.run("bad.py")
    assert run.returncode == 1
    assert f'File "{dtrun.folder}/bad.py", line 1' in run.stderr
    assert "SyntaxError: '(' was never closed" in run.stderr
    assert "Traceback" not in run.stderr


def test_a_worker_that_cannot_be_started(dtrun):
    run = dtrun.run(dtrun.script("pass"), env={"PYTHON_EXEC": "/nothing/python"})
    assert run.returncode == 126
    assert run.stderr == (
        "dtrun: error: cannot start the workers: "
        "[Errno 2] No such file or directory: '/nothing/python'\n"
    )


def test_an_address_that_is_not_ours(dtrun):
    run = dtrun.run("--master-addr", "192.0.2.1", dtrun.script("pass"))
    assert run.returncode == 2
    assert run.stderr.startswith("dtrun: error: cannot reserve 192.0.2.1")
    assert run.stderr.count("\n") == 1


def test_workers_that_ignore_sigterm_are_gone_in_time(dtrun):
    script = dtrun.script(
        f"""
        import signal
        open(f"{{os.getpid()}}.pid", "w").close()
        if rank == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            open("ready", "w").close()
            {FOREVER}
        while not os.path.exists("ready"):
            time.sleep(0.001)
        open("failed", "w").close()
        os._exit(5)
        """
    )
    process = dtrun.start("--nproc-per-node", "2", script)
    wait_until((dtrun.folder / "failed").exists)
    pids = [int(path.stem) for path in dtrun.folder.glob("*.pid")]
    assert len(pids) == 2
    assert wait_until(lambda: not living(pids)) < 2.0
    process.communicate(timeout=5)
    assert process.returncode == 5


def test_a_failed_rank_that_hangs_at_its_end_shows_why(dtrun):
    script = dtrun.script(
        """
        import threading
        threading.Thread(target=lambda: sys.stdin.read()).start()
        raise ValueError("and now a thread keeps me")
        """
    )
    process = dtrun.start(script, stdin=subprocess.PIPE, stderr=subprocess.STDOUT)
    seen = [process.stdout.readline() for _ in range(4)]
    assert seen[-1] == "ValueError: and now a thread keeps me\n"
    process.communicate("", timeout=5)
    assert process.returncode == 1
