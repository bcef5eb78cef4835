"""Process ranks are forked from a server: what reaches them, what they cost, what they leave."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time

import psutil
import pytest

from dtrain.testing import processes
from dtrain.testing.world import run_world, started
from tests.dtrun.launch import living, wait_until


def where_am_i(store, rank, size):
    threads = len(os.listdir("/proc/self/task"))
    return [os.getppid(), os.getcwd(), os.environ.get("FROM_THE_TEST"), threads]


def look(size=2):
    """What `where_am_i` says on each rank."""
    with started(size, where_am_i, (), timeout=20, group=None) as ranks:
        for rank in ranks:
            assert rank.wait(time.monotonic() + 20) == 0
        return [rank.report()[0] for rank in ranks]


def test_ranks_get_the_environment_and_the_folder_of_now(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for value in ("one", "two"):
        monkeypatch.setenv("FROM_THE_TEST", value)
        for parent, folder, variable, _ in look():
            assert (parent, folder, variable) == (processes.own_process(), str(tmp_path), value)


def test_ranks_are_forked_without_threads_and_with_few_descriptors():
    held = psutil.Process(look()[0][0])
    assert held.num_threads() == 1
    assert [threads for *_, threads in look(4)] == [2] * 4  # its own and that of the deadline
    wait_until(lambda: held.num_fds() == 4)  # standard ones, and the one to this process
    assert held.children() == []


def sleeps(store, rank, size):
    signal.pause()


def test_the_end_of_the_block_kills_what_still_runs():
    with started(3, sleeps, (), timeout=20, group=None) as ranks:
        pids = [rank.pid for rank in ranks]
        with pytest.raises(TimeoutError):
            ranks[0].wait(time.monotonic())
    assert [rank.status for rank in ranks] == [-signal.SIGKILL] * 3
    assert not any(map(psutil.pid_exists, pids))


def test_a_server_that_has_died_is_reported_and_replaced():
    with started(1, sleeps, (), timeout=20, group=None) as (rank,):
        os.kill(processes.own_process(), signal.SIGKILL)
        with pytest.raises(RuntimeError, match="fork server"):
            rank.wait(time.monotonic() + 20)
        wait_until(lambda: not living([rank.pid]))
    assert len(look(1)) == 1


KILLED = textwrap.dedent(
    """
    import os, signal, sys, time
    from dtrain.testing import processes
    from dtrain.testing.world import started
    from tests.testing.test_processes import sleeps

    with started(2, sleeps, (), timeout=20, group=None) as ranks:
        print(processes.own_process(), *[rank.pid for rank in ranks], flush=True)
        os.kill(os.getpid(), int(sys.argv[1]))
        time.sleep(20)
    """
)


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGINT])
def test_server_and_ranks_end_with_the_process_that_started_them(signum):
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, str(int(signum))], capture_output=True, text=True, timeout=30
    )
    pids = [int(pid) for pid in ended.stdout.split()]
    assert len(pids) == 3
    wait_until(lambda: not living(pids))


def test_many_worlds_cost_little():
    run_world(2, rank_of, transport="zmq", processes=True)  # the server has started
    begin = time.monotonic()
    for _ in range(10):
        assert run_world(2, rank_of, transport="zmq", processes=True) == [0, 1]
    assert time.monotonic() - begin < 10  # 0.6 s on an idle machine; 8 s with new interpreters


def rank_of(group):
    return group.rank
