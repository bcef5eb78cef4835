"""The bootstrap of a worker: a script cannot tell it from plain Python."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.dtrun.launch import DEADLINE

SELF_PORTRAIT = """
import os, pickle, sys
def f():
    return 1
main = sys.modules["__main__"]
known = set(globals())
def names(values):
    return sorted(set(values) - {"known"})
print(sys.argv, sys.path[:2], __name__, __file__, __package__, __doc__)
print(type(__loader__).__name__, __cached__, type(__builtins__).__name__, names(known))
print(None if __spec__ is None else (__spec__.name, __spec__.origin))
print(main.__dict__ is globals(), pickle.loads(pickle.dumps(f)) is f)
print(sys._getframe().f_code.co_filename)
print(__annotations__, "annotations" in dir(), type(sys.stdout).__name__, sys.stdin.closed)
"""
ANSWERS = """
import atexit, sys, threading
def last():
    print("at exit", __name__, sys.modules["__main__"].__dict__ is globals())
atexit.register(last)
def later(event):
    event.wait()
    print("in a thread", helper())
def helper():
    return 41 + 1
event = threading.Event()
threading.Thread(target=later, args=(event,)).start()
event.set()
sys.exit("goodbye")
"""
SPAWNS = """
import multiprocessing
def square(x):
    return x * x
if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.map(square, [2, 3]))
"""


def python(folder, *args):
    line = [sys.executable, *args]
    return subprocess.run(
        line, cwd=folder, capture_output=True, text=True, timeout=DEADLINE, check=False
    )


@pytest.mark.parametrize("text", [SELF_PORTRAIT, ANSWERS, SPAWNS])
@pytest.mark.parametrize("target", [["sub/x.py"], ["-m", "sub.x"]])
def test_a_script_sees_what_python_shows(dtrun, text, target):
    (dtrun.folder / "sub").mkdir()
    (dtrun.folder / "sub" / "x.py").write_text(text)
    (dtrun.folder / "sub" / "__init__.py").write_text("")
    plain = python(dtrun.folder, *target, "--a", "-b")
    assert plain.stdout
    run = dtrun.run(*target, "--a", "-b")
    assert (run.returncode, run.stdout) == (plain.returncode, plain.stdout)
    assert run.stderr.startswith(plain.stderr)


def test_safe_path_is_kept(dtrun):
    (dtrun.folder / "x.py").write_text("import sys; print(sys.path)")
    plain = python(dtrun.folder, "-P", "x.py")
    assert python(dtrun.folder, "-P", "-m", "dtrun", "x.py").stdout == plain.stdout


def test_a_hook_of_the_script_still_shows_the_error(dtrun):
    script = dtrun.script(
        """
        import traceback
        def hook(kind, value, trace):
            print("mine:", kind.__name__, [f.name for f in traceback.extract_tb(trace)], flush=True)
        sys.excepthook = hook
        raise ValueError("boom")
        """
    )
    run = dtrun.run(script)
    assert run.stdout == "mine: ValueError ['<module>']\n"
    assert "ValueError: boom" in run.stderr


def test_a_forked_child_does_not_speak_for_its_parent(dtrun):
    script = dtrun.script(
        """
        if os.fork() == 0:
            raise ValueError("in the child")
        os.wait()
        sys.exit(5)
        """
    )
    run = dtrun.run(script)
    assert run.returncode == 5
    report = run.stderr.partition("FAILED")
    assert "ValueError: in the child" in report[0]
    assert "in the child" not in report[2]


def test_an_error_that_cannot_be_recorded_is_printed(dtrun):
    script = dtrun.script(
        """
        import shutil
        shutil.rmtree(os.path.dirname(os.environ["TORCHELASTIC_ERROR_FILE"]))
        raise ValueError("boom")
        """
    )
    run = dtrun.run(script)
    assert run.returncode == 1
    before = run.stderr.partition("FAILED")[0]
    assert "dtrun: cannot record the next traceback: FileNotFoundError" in before
    assert "ValueError: boom" in before
    assert "worker.py" not in before
