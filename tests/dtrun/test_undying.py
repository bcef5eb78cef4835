"""A rank that SIGKILL does not end: a frozen one stands for one in the kernel's hands (state D)."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.dtrun.launch import DEADLINE, read_lines, wait_until

FREEZER = Path("/sys/fs/cgroup/freezer")  # of cgroup v1; v2 lets the frozen be killed
# Its last seconds take 0.3, not 10.
IMPATIENT = """
import sys
from dtrun import cli, supervisor
supervisor.GRACE_SECONDS, supervisor.GIVE_UP_SECONDS = 0.1, 0.3
sys.exit(cli.main())
"""

pytestmark = pytest.mark.skipif(
    not os.access(FREEZER / "cgroup.procs", os.W_OK), reason="not run: needs root and cgroup v1"
)


@pytest.fixture
def freezer():
    """A group of processes; frozen by writing FROZEN into its state, thawed and gone at the end."""
    group = FREEZER / f"dtrun-test-{os.getpid()}"
    group.mkdir()
    yield group
    (group / "freezer.state").write_text("THAWED")
    wait_until(lambda: not (group / "cgroup.procs").read_text())
    group.rmdir()


def test_dtrun_ends_and_says_who_does_not(dtrun, freezer):
    script = dtrun.script(
        """
        print(os.getpid(), flush=True)
        if rank == 0:
            sys.stdin.readline()
            sys.exit(3)
        time.sleep(100)
        """
    )
    process = dtrun.start(
        *("--nproc-per-node", "2", "--max-restarts", "5", script),
        program=("-c", IMPATIENT),
        stdin=-1,
    )
    lines = dict(line.split(": ") for line in read_lines(process, 2))
    pid = lines["[rank1]"]
    (freezer / "cgroup.procs").write_text(pid)
    (freezer / "freezer.state").write_text("FROZEN")
    wait_until(lambda: (freezer / "freezer.state").read_text() == "FROZEN\n")
    started = time.monotonic()
    _, err = process.communicate("fail\n", timeout=DEADLINE)
    assert process.returncode == 75
    assert f"rank 1 (pid {pid}) has not ended" in err
    assert "look at this host before you start dtrun here again" in err
    assert time.monotonic() - started < 6.0
