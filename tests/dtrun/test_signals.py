"""Being interrupted and being killed: how soon, with which exit code, and that nothing stays."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time

import psutil
import pytest

from dtrun.supervisor import STOP_SECONDS
from tests.dtrun.launch import DEADLINE, living, read_lines, wait_until

# Each rank has a child, a daemon of its own session and one without an environment, all deaf to
# polite signals; every pid becomes the name of a file.
FAMILY = """
import subprocess
deaf = (
    "import os, signal, sys, time\\n"
    "for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP): signal.signal(s, signal.SIG_IGN)\\n"
    "open(sys.argv[1] + '/' + str(os.getpid()) + '.pid', 'w').close(); time.sleep(100)"
)
command = [sys.executable, "-c", deaf, os.getcwd()]
subprocess.Popen(command)
twice = f"import subprocess; subprocess.Popen({command!r}, start_new_session=True)"
subprocess.run([sys.executable, "-c", twice], check=True)
subprocess.Popen(["env", "-i", *command], start_new_session=True)
open(f"{os.getpid()}.pid", "w").close()
"""
# What a shell does for a program in the foreground: a session whose terminal is descriptor 0.
AT_A_TERMINAL = """
import fcntl, os, sys, termios
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, "-m", "dtrun", *sys.argv[1:]])
"""
IDLE = "print('up', flush=True)\ntime.sleep(100)"


@pytest.fixture
def family(dtrun):
    """A running dtrun whose two ranks have six descendants; the process and all eight pids."""
    process = dtrun.start("--nproc-per-node", "2", dtrun.script(FAMILY + IDLE))
    read_lines(process, 2)
    wait_until(lambda: len(list(dtrun.folder.glob("*.pid"))) == 8)
    pids = [int(path.stem) for path in dtrun.folder.glob("*.pid")]
    assert sorted(living(pids)) == sorted(pids)
    return process, pids


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_everything_within_a_second(family, signum):
    process, pids = family
    bystander = subprocess.Popen(["sleep", "100"])
    start = time.monotonic()
    process.send_signal(signum)
    _, err = process.communicate(timeout=DEADLINE)
    assert time.monotonic() - start < 1.0
    assert process.returncode == 128 + signum
    assert not living(pids)
    assert f"dtrun: stopped by {signum.name}, all workers have ended" in err
    assert "Traceback" not in err
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()


@pytest.mark.parametrize("victim", ["dtrun", "its child"])
def test_killing_the_launcher_leaves_no_orphan(family, dtrun, victim):
    process, pids = family
    (child,) = psutil.Process(process.pid).children()
    os.kill(process.pid if victim == "dtrun" else child.pid, signal.SIGKILL)
    assert wait_until(lambda: not living([*pids, child.pid])) < 2.0
    wait_until(lambda: not os.listdir(dtrun.run_dirs))
    assert process.wait(DEADLINE) == (-9 if victim == "dtrun" else 137)


def test_a_killed_worker_ends_the_others_within_two_seconds(family):
    process, pids = family
    worker = max(pids, key=lambda pid: os.getpgid(pid) == pid and "train.py" in _line(pid))
    start = time.monotonic()
    os.kill(worker, signal.SIGKILL)
    _, err = process.communicate(timeout=DEADLINE)
    assert time.monotonic() - start < 2.0
    assert process.returncode == 137
    assert f"Signal 9 (SIGKILL) received by PID {worker}" in err
    assert not living(pids)


def _line(pid: int) -> str:
    return " ".join(psutil.Process(pid).cmdline())


def test_the_second_interrupt_does_not_wait(dtrun):
    script = dtrun.script(
        """
        import signal
        signal.signal(signal.SIGINT, lambda *_: print("busy", flush=True))
        print("up", flush=True)
        while True:
            time.sleep(100)
        """
    )
    process = dtrun.start(script)
    read_lines(process, 1)
    process.send_signal(signal.SIGINT)
    assert read_lines(process, 1) == ["busy"]
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=DEADLINE)
    assert time.monotonic() - start < STOP_SECONDS - 0.1
    assert process.returncode == 130


def test_a_script_may_clean_up_after_an_interrupt(dtrun):
    script = dtrun.script(
        """
        try:
            print("up", flush=True)
            time.sleep(100)
        except KeyboardInterrupt:
            print("saved", flush=True)
            raise
        """
    )
    process = dtrun.start("--nproc-per-node", "2", script)
    read_lines(process, 2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=DEADLINE)
    assert out.count("saved") == 2
    assert "Traceback" not in err
    assert process.returncode == 130


def test_control_c_at_a_terminal(dtrun):
    ours, theirs = pty.openpty()
    dtrun.script(IDLE)
    process = subprocess.Popen(
        [sys.executable, "-c", AT_A_TERMINAL, "--nproc-per-node=2", "train.py"],
        cwd=dtrun.folder,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    seen = b""
    while seen.count(b"up") < 2:
        seen += os.read(ours, 1000)
    start = time.monotonic()
    os.write(ours, b"\x03")
    assert process.wait(DEADLINE) == 130
    assert time.monotonic() - start < 1.0
    assert b"Traceback" not in os.read(ours, 10000)
    os.close(ours)


def test_a_console_that_nobody_reads_does_not_delay_the_end(dtrun):
    script = dtrun.script("print('up')\nwhile True: print('x' * 99)")
    process = dtrun.start("--nproc-per-node", "2", script)
    read_lines(process, 2)
    wait_until(lambda: _is_full(process.stdout))
    start = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(DEADLINE) == 143
    assert time.monotonic() - start < 1.5


def _is_full(pipe) -> bool:
    writer = os.open(f"/proc/self/fd/{pipe.fileno()}", os.O_WRONLY | os.O_NONBLOCK)
    try:
        return not select.select([], [writer], [], 0)[1]
    finally:
        os.close(writer)


def test_a_signal_that_is_ignored_stays_ignored(dtrun):
    line = f"trap '' HUP; exec {sys.executable} -m dtrun train.py"
    dtrun.script("print('up', flush=True)\nsys.stdin.readline()")
    process = subprocess.Popen(
        ["sh", "-c", line],
        cwd=dtrun.folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    read_lines(process, 1)
    process.send_signal(signal.SIGHUP)
    process.communicate("go on\n", timeout=DEADLINE)
    assert process.returncode == 0
