"""Training that goes on: after a kill with the same bits, after being told to stop at its place."""

from __future__ import annotations

import os
import re
import signal
import time

import pytest

from tests.dtrun.launch import DEADLINE, read_lines
from tests.dtrun.test_nodes import ended, node  # noqa: F401 (a fixture)

TRAIN = """
import hashlib, signal
import dtrain as torch
from dtrain import elastic
dist = torch.distributed
dist.init_process_group()
torch.manual_seed(5 + rank)
layers = (torch.nn.Linear(8, 16), torch.nn.Dropout(0.2), torch.nn.Linear(16, 1))
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Sequential(*layers))
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
folder, steps, pause, *strike = sys.argv[1:]
state = elastic.State(model=model, optimizer=optimizer, folder=folder or None, every=10)
first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
begun = None
for step in elastic.run(state, int(steps)):
    if begun is None and rank == 0:
        print("from", begun := step, flush=True)
    loss = model(torch.randn(4, 8)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    if first and strike and step == 7 and str(rank) in strike:
        os.kill(os.getpid(), signal.SIGKILL)
    optimizer.step()
    time.sleep(float(pause))
weights = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
if rank == 0:
    print("end", hashlib.sha256(weights).hexdigest(), flush=True)
"""


def said(done):
    assert done.returncode == 0, done.stderr
    return re.findall(r"(from \d+|end \w+)", done.stdout)


@pytest.mark.parametrize("victims", [["1"], ["0"], ["0", "1"]])
def test_killed_ranks_cost_one_step_and_no_bit(dtrun, victims):
    script = dtrun.script(TRAIN)
    flags = ("--nproc-per-node", "2", "--max-restarts", "1", script, "", "12", "0")
    begun, end = said(dtrun.run(*flags))
    assert begun == "from 0"
    assert said(dtrun.run(*flags, *victims)) == ["from 0", "from 7", end]


@pytest.mark.parametrize("who", ["dtrun", "one rank"])
def test_being_told_to_stop_is_a_checkpoint_and_success(dtrun, who):
    script = dtrun.script("print(os.getpid(), flush=True)" + TRAIN)
    job = ("--nproc-per-node", "2", script, "folder", "1000", "0.01")
    process = dtrun.start(*job)
    lines = read_lines(process, 3)
    pids = [int(found[1]) for line in lines if (found := re.search(r": (\d+)$", line))]
    if who == "dtrun":
        process.send_signal(signal.SIGTERM)
    else:
        os.kill(pids[1], signal.SIGUSR1)
    out, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0, out + err
    if who == "dtrun":
        assert err.endswith("told to stop by SIGTERM, all workers have ended in order\n")
    newest = max(int(p.name[5:]) for p in (dtrun.folder / "folder").glob("step-*"))
    rest = dtrun.run("--nproc-per-node", "2", script, "folder", str(newest + 3), "0")
    assert said(rest)[0] == f"from {newest}"


def test_ranks_that_do_not_ask_are_ended_as_before(dtrun):
    script = dtrun.script("print('up', flush=True)\ntime.sleep(100)")
    process = dtrun.start("--nproc-per-node", "2", script)
    read_lines(process, 2)
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=DEADLINE)
    assert (process.returncode, time.monotonic() - started < 1.5) == (128 + 15, True)


def test_ranks_that_say_so_but_never_stop_are_killed_after_the_timeout(dtrun):
    script = dtrun.script(
        """
        import dtrain as torch
        torch.distributed.should_stop()
        print("up", flush=True)
        while True:
            time.sleep(100)
        """
    )
    process = dtrun.start("--shutdown-timeout", "0.5", script)
    read_lines(process, 1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=DEADLINE)
    assert process.returncode == 128 + 15


def test_a_node_that_is_told_to_stop_stops_a_job_of_fixed_size_in_order(dtrun, node):  # noqa: F811
    script = dtrun.script(TRAIN)
    nodes = [node(n, "--nnodes", "2", script, "folder", "1000", "0.01") for n in (1, 2)]
    read_lines(next(n for n in nodes if n.stdout), 0)
    while not list((dtrun.folder / "folder").glob("step-*")):
        time.sleep(0.02)
    nodes[1].send_signal(signal.SIGTERM)
    assert [code for code, _, _ in ended(*nodes)] == [0, 0]


def test_a_node_that_joins_gets_the_state_and_no_step_is_lost(dtrun, node):  # noqa: F811
    script = dtrun.script(
        TRAIN.replace('print("from"', 'print("of", dist.get_world_size(), "from"')
    )
    flags = ("--nnodes", "1:2", script, "", "300", "0.01")
    first = node(1, *flags)
    assert read_lines(first, 1) == ["of 1 from 0"]
    second = node(2, *flags)
    (code, out, err), (other_code, other_out, _) = ended(first, second)
    assert (code, other_code) == (0, 0), err
    begun = int(re.search(r"of 2 from (\d+)", out)[1])
    assert 0 < begun < 300
    assert "in order" not in other_out
