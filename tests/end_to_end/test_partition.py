"""Nodes that meet, on two hosts (network namespaces): a cut cable, and a return."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.end_to_end.hosts import ended, two_hosts, why_not

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")

# The heartbeats of a test, for ranks and envoys alike: the defaults would take 5 seconds.
QUICK = (
    "from dtrain.comm.security import sockets; sockets.HEARTBEAT = sockets.Heartbeat(100, 600)\n"
)
TRAIN = """
import os, sys, time
import dtrain as torch
from dtrain import elastic
dist = torch.distributed
dist.init_process_group()
state = elastic.State(total=0.0)
for step in elastic.run(state, 10_000):
    x = torch.ones(1)
    dist.all_reduce(x)
    size = int(x.item())
    state.total += 1.0
    if step % 20 == 0 and dist.get_rank() == 0:
        print(step, size, flush=True)
    done = torch.tensor([float(os.path.exists(sys.argv[1]))])
    dist.all_reduce(done)
    if done.item():
        break
    time.sleep(0.01)
assert state.total == state.step + 1
"""
SOON = "last_call_timeout=1,keep_alive_interval=0.2,keep_alive_max_attempt=5"


def read_until(process, wanted):
    """What a node prints, up to a line that `wanted` takes."""
    for line in process.stdout:
        if wanted(line):
            return line
    raise AssertionError(process.stderr.read())


def test_both_sides_of_a_cut_stop_side_by_side_and_one_goes_on(tmp_path):
    made = subprocess.run(
        [sys.executable, "-m", "dtrun", "keygen"], capture_output=True, check=True
    )
    key = tmp_path / "job.key"
    key.write_bytes(made.stdout)
    key.chmod(0o600)
    script, done = tmp_path / "script.py", tmp_path / "done"
    script.write_text(QUICK + TRAIN)
    # The envoy of a node is another process: told the same through its start-up file.
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nif 'dtrun.envoy' in ' '.join(sys.orig_argv):\n    " + QUICK
    )
    flags = ("--nnodes", "1:2", "--rdzv-conf", SOON)
    with two_hosts() as hosts:

        def start(host):
            return hosts.dtrun(
                host, key, script, *flags, args=[str(done)], PYTHONPATH=str(tmp_path)
            )

        head = start(0)
        read_until(head, lambda line: line.startswith("0 1"))
        other = start(1)
        last = read_until(head, lambda line: line.endswith(" 2\n"))
        hosts.cut()
        ((code, _, err),) = ended(other)
        assert code == 75, err
        assert "the head of the job at 10.77.0.1:29500 is lost" in err
        alone = read_until(head, lambda line: line.endswith(" 1\n"))
        assert int(alone.split()[0]) >= int(last.split()[0])  # no step was lost
        hosts.join()
        other = start(1)
        again = read_until(head, lambda line: line.endswith(" 2\n"))
        assert int(again.split()[0]) >= int(alone.split()[0])
        done.touch()
        assert [code for code, _, _ in ended(head, other)] == [0, 0]
