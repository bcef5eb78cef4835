"""`srun dtrun` on two hosts, each of which knows its own name as 127.0.1.1, as Debian has it."""

from __future__ import annotations

import os
import sys

import pytest

from tests.end_to_end.hosts import ADDRESSES, ended, two_hosts, why_not
from tests.tree import ROOT

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")

# Its arguments: the file with the names, and the command to become.
BECOME = 'mount --bind "$0" /etc/hosts; exec "$@"'


def test_two_tasks_on_two_hosts_need_no_flags(tmp_path):
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "node[0-1]", "SLURM_STEP_ID": "0"}
    step |= {"SLURM_JOB_ID": str(os.getpid()), "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}

    def start(hosts, task):
        names = tmp_path / f"hosts-{task}"
        lines = [f"{address} node{i}" for i, address in enumerate(ADDRESSES)]
        lines[task] = f"127.0.1.1 node{task}"
        names.write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
        become = ["unshare", "--mount", "sh", "-c", BECOME, names]
        command = [sys.executable, "-m", "dtrun", "-m", "dtrain.distributed.selftest"]
        return hosts.start(task, *become, *command, **step, SLURM_PROCID=str(task))

    with two_hosts() as hosts:
        (code, out, err), (other, _, other_err) = ended(start(hosts, 0), start(hosts, 1))
    assert (code, other) == (0, 0), err + other_err
    assert "2 ranks work together (node0 1, node1 1)" in out
    assert f"meeting at {ADDRESSES[0]}:" in err
