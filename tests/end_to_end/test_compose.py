"""What docker-compose.yml starts, on two hosts that are network namespaces: no engine is needed.

The commands are the file's own, with paths and the address of node0 put in place and a small job
behind. Whatever happens to a node or the cable, the losses are those of four ranks on one host.
"""

from __future__ import annotations

import re
import shutil
import sys

import pytest

from tests.end_to_end.hosts import ADDRESSES, DEADLINE, ended, two_hosts, why_not
from tests.end_to_end.launch import dtrun
from tests.test_container import COMPOSE, commands
from tests.tree import ROOT

pytestmark = [
    pytest.mark.skipif(bool(why_not()), reason=why_not() or "-"),
    pytest.mark.timeout(240),
]

SCRIPT = "examples/train_gpt.py"
SMALL = ["--batch-size", "4", "--context", "16"]
LAST = 80  # the step; a checkpoint is written every 40
# Silence of ranks and of nodes that counts as loss, instead of 5 seconds.
QUICK = """
import sys
if {"dtrun.envoy", "train_gpt.py"} & {word.rpartition("/")[2] for word in sys.orig_argv}:
    from dtrain.comm.security import sockets
    sockets.HEARTBEAT = sockets.Heartbeat(300, 3000)
"""
SOON = ["--rdzv-conf", "keep_alive_interval=0.5,keep_alive_max_attempt=6"]


def losses(text):
    """{step: (loss, held-out loss)} of all lines of training."""
    found = re.findall(r"step +(\d+)  loss ([\d.]+)  valid ([\d.]+)", text)
    return {int(step): values for step, *values in found}


class Job:
    """The two containers of the compose file."""

    def __init__(self, hosts, folder, steps):
        self.hosts, self.folder, self.steps = hosts, folder, steps
        self.checkpoints = folder / "checkpoints"
        self.checkpoints.mkdir()
        key = folder / "job_key"
        key.write_bytes(bytes(range(32)))
        key.chmod(0o600)
        self.environ = {"PYTHONPATH": f"{folder}:{ROOT}", "HOME": str(folder)}
        (folder / "sitecustomize.py").write_text(QUICK)

    def start(self, node):
        """What compose runs as this node, with the job's own arguments behind."""
        text = COMPOSE.replace("/run/secrets/job_key", str(self.folder / "job_key"))
        text = text.replace("/checkpoints/", f"{self.checkpoints}/")
        text = text.replace("/home/dtrain", str(ROOT)).replace("node0:", f"{ADDRESSES[0]}:")
        words = commands(text)[node][1:]
        head = [sys.executable, "-m", "dtrun", *SOON]
        arguments = [*words, *SMALL, "--steps", self.steps]
        return self.hosts.start(node, *head, *arguments, **self.environ)


def read_step(process, step):
    """Wait until a node has printed this step."""
    for line in process.stdout:
        if losses(line).keys() == {step}:
            return
    raise AssertionError(process.stderr.read())


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The losses of four ranks on one host."""
    path = tmp_path_factory.mktemp("alone") / "gpt"
    options = ["--steps", LAST + 1, "--checkpoint", path]
    run = dtrun(4, ROOT / SCRIPT, *SMALL, *options, timeout=120)
    assert run.code == 0, run.err
    return losses(run.out)


@pytest.mark.skipif(shutil.which("tc") is None, reason="not run: no tc")
def test_a_slow_link_changes_nothing_but_the_time(tmp_path, alone):
    with two_hosts() as hosts:
        hosts.slow("200mbit")
        job = Job(hosts, tmp_path, steps=3)
        (code, out, err), (other, _, _) = ended(job.start(0), job.start(1))
    assert (code, other) == (0, 0), err
    assert losses(out)[0] == alone[0]
    assert (tmp_path / "checkpoints" / "gpt" / "manifest.json").exists()


@pytest.mark.parametrize("how", ["killed", "cut off"])
def test_a_node_that_is_lost_comes_back_and_training_goes_on(tmp_path, alone, how):
    """Node 1 goes after the checkpoint of step 40; the rest is as if it had not."""
    with two_hosts() as hosts:
        job = Job(hosts, tmp_path, steps=LAST + 1)
        first, second = job.start(0), job.start(1)
        read_step(first, 40)
        if how == "killed":
            hosts.kill(1)
            second.wait(DEADLINE)
        else:
            hosts.cut()
            ((code, _, err),) = ended(second)
            assert code == 75, err
            assert "the head of the job" in err
            hosts.join()
        again = job.start(1)
        (code, out, err), (other, _, _) = ended(first, again)
    assert (code, other) == (0, 0), err
    # From the checkpoint on, or from the next one if it was written before node 1 went.
    resumed = losses(out)
    assert resumed[LAST] == alone[LAST], (out, err)
    assert resumed == {step: alone[step] for step in resumed}
