"""SIGKILL of any subset of a job's processes leaves nothing: no process, memory, socket."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from tests.dtrun.launch import Launches, living, wait_until

JOB = """
import signal
import dtrain as torch
dist = torch.distributed
dist.init_process_group()
x = dist.empty(100_000).fill_(1.0)
dist.all_reduce(x)
open(f"{os.getpid()}.pid", "w").close()
dist.barrier()
victims = sys.argv[1].split(",")
if "launcher" in victims and rank == 0:
    os.kill(os.getppid(), signal.SIGKILL)
if str(rank) in victims:
    os.kill(os.getpid(), signal.SIGKILL)
while True:
    dist.all_reduce(x)
"""


def traces(pids):
    """What these processes have left outside of their run directory."""
    folders = (Path(tempfile.gettempdir()), Path("/dev/shm"))
    left = [str(path) for pid in pids for base in folders for path in base.glob(f"dtrain-{pid}-*")]
    named = Path("/proc/net/unix").read_text()
    return left + [f"@dtrain-{pid}-" for pid in pids if f"dtrain-{pid}-" in named]


@pytest.mark.parametrize("victims", ["1", "0,2", "0,1,2", "launcher", "launcher,0,1,2"])
def test_nothing_is_left(tmp_path, victims):
    launches = Launches(tmp_path)
    try:
        ended = launches.run("--standalone", "--nproc-per-node", "3", launches.script(JOB), victims)
        pids = [int(path.stem) for path in tmp_path.glob("*.pid")]
        assert len(pids) == 3, ended.stderr
        assert ended.returncode == 128 + 9
        wait_until(lambda: not living(pids))
        assert traces(pids) == []
        wait_until(lambda: os.listdir(launches.run_dirs) == [])
    finally:
        launches.close()
