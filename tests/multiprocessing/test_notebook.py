"""notebook_launcher in a real Jupyter kernel, and what needs none."""

from __future__ import annotations

import json
import os
import sys
import textwrap
import time

import pytest

import dtrain as torch
from dtrain.multiprocessing import notebook
from tests.dtrun.launch import living, wait_until
from tests.multiprocessing import programs

why = "not run: no Jupyter kernel; install the extra 'test'"
manager = pytest.importorskip("jupyter_client.manager", reason=why)
kernelspec = pytest.importorskip("jupyter_client.kernelspec", reason=why)
pytest.importorskip("ipykernel", reason=why)

mp = torch.multiprocessing
DEADLINE = 50.0
SET_UP = """
import os, time
import dtrain as torch
dist, scale = torch.distributed, 10.0

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)

def add(x):
    dist.init_process_group()
    x = scale * x * (dist.get_rank() + 1)
    dist.all_reduce(x)
    print("the sum is", x.item())
    net = Net()
    dist.destroy_process_group()
    return x, net

def fail():
    dist.init_process_group()
    if dist.get_rank() == 1:
        raise ValueError("no data for rank 1")
    dist.barrier()

def die():
    if os.environ["RANK"] == "1":
        os.abort()
    time.sleep(60)

def sleep():
    print("pid", os.getpid(), flush=True)
    time.sleep(60)
"""


class Kernel:
    """A Jupyter kernel and its client; runs cells as a notebook does."""

    def __init__(self, folder):
        """Of this interpreter, whatever kernels the user has, and with no trace in his home."""
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        (folder / "own").mkdir()
        spec = {"argv": argv, "display_name": "own", "language": "python"}
        (folder / "own" / "kernel.json").write_text(json.dumps(spec))
        specs = kernelspec.KernelSpecManager(kernel_dirs=[str(folder)])
        self.manager = manager.KernelManager(kernel_name="own", kernel_spec_manager=specs)
        self.manager.connection_file = str(folder / "connection.json")
        self.manager.start_kernel(env=os.environ | {"IPYTHONDIR": str(folder / "ipython")})
        self.client = self.manager.blocking_client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=DEADLINE)

    def start(self, code):
        """Begin a cell; see `output` and `end`."""
        self.cell, self.shown = self.client.execute(textwrap.dedent(code)), ""

    def output(self, until):
        """What the cell shows, read until `until(text)` holds or it has ended."""
        while not until(self.shown):
            message = self.client.get_iopub_msg(timeout=DEADLINE)
            if message["parent_header"].get("msg_id") != self.cell:
                continue
            content = message["content"]
            if message["msg_type"] == "stream":
                self.shown += content["text"]
            elif message["msg_type"] == "execute_result":
                self.shown += content["data"]["text/plain"] + "\n"
            elif content.get("execution_state") == "idle":
                break
        return self.shown

    def end(self):
        """The cell's reply and all that it showed."""
        shown = self.output(lambda text: False)
        while True:  # some replies belong to questions that were asked while it started
            reply = self.client.get_shell_msg(timeout=DEADLINE)
            if reply["parent_header"]["msg_id"] == self.cell:
                return reply["content"], shown

    def run(self, code):
        self.start(code)
        return self.end()

    def close(self):
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)
        self.manager.cleanup_resources()


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    started = Kernel(tmp_path_factory.mktemp("kernel"))
    assert started.run(SET_UP)[0]["status"] == "ok"
    yield started
    started.close()


def pids_in(text):
    return [int(line.split()[-1]) for line in text.splitlines() if line.split()[1:2] == ["pid"]]


@pytest.mark.timeout(180)
def test_functions_of_a_cell_run_and_rank_0_returns(kernel):
    """Rank r brings 10 x 2 (r + 1): the sum over two ranks is 60. Classes of a cell come back."""
    reply, shown = kernel.run("total, net = torch.notebook_launcher(add, (torch.tensor(2.0),), 2)")
    assert reply["status"] == "ok", reply
    assert "[rank0]: the sum is 60.0\n" in shown
    assert "[rank1]: the sum is 60.0\n" in shown
    _, shown = kernel.run("print(total.item(), type(net) is Net, net.layer.weight.shape[1])")
    assert shown == "60.0 True 3\n"


@pytest.mark.timeout(180)
def test_a_failure_shows_the_line_of_the_cell_and_is_raised(kernel):
    reply, shown = kernel.run("torch.notebook_launcher(fail, num_processes=2)")
    assert (reply["status"], reply["ename"]) == ("error", "ProcessRaisedException")
    assert "process 1 terminated with ValueError: no data for rank 1" in reply["evalue"]
    assert '    raise ValueError("no data for rank 1")\n' in shown
    assert shown.index("ValueError: no data") < shown.index("Other Failures")
    reply, shown = kernel.run("torch.notebook_launcher(die, num_processes=2)")
    assert (reply["status"], reply["ename"]) == ("error", "ProcessExitedException")
    assert "exit code 134" in reply["evalue"]
    assert "SIGABRT" in shown


@pytest.mark.timeout(180)
def test_an_interrupt_ends_all_ranks(kernel):
    kernel.start("torch.notebook_launcher(sleep, num_processes=2)")
    pids = pids_in(kernel.output(lambda text: len(pids_in(text)) == 2 and text.endswith("\n")))
    assert living(pids) == pids
    kernel.manager.interrupt_kernel()
    reply, _ = kernel.end()
    assert (reply["status"], reply["ename"]) == ("error", "KeyboardInterrupt")
    assert not living(pids)
    assert kernel.run("print(1 + 1)")[1] == "2\n"


@pytest.mark.timeout(180)
def test_ranks_do_not_outlive_a_killed_kernel(tmp_path):
    kernel = Kernel(tmp_path)
    try:
        kernel.run(SET_UP)
        kernel.start("torch.notebook_launcher(sleep, num_processes=2)")
        pids = pids_in(kernel.output(lambda text: len(pids_in(text)) == 2 and text.endswith("\n")))
        assert living(pids) == pids
    finally:
        kernel.close()  # kills it
    wait_until(lambda: not living(pids))


def test_what_cannot_be_copied_is_refused_before_anything_starts():
    lock = __import__("threading").Lock()

    def locked():
        return lock

    begin = time.monotonic()
    with pytest.raises(TypeError, match=r"'locked', its arguments, .* cannot be copied"):
        torch.notebook_launcher(locked, (), 2)
    assert time.monotonic() - begin < 5
    with pytest.raises(ValueError, match="num_processes must be at least 1, got 0"):
        torch.notebook_launcher(print, (), 0)


def test_ranks_start_again_and_what_rank_0_returns_must_travel():
    assert torch.notebook_launcher(programs.second_time, (), 2, max_restarts=1) == 1
    with pytest.raises(mp.ProcessRaisedException, match="what this rank returned cannot be sent"):
        torch.notebook_launcher(programs.lock, (), 1)


def test_the_cause_of_several_failures_is_named():
    told = [
        {"message": "PeerLost: rank 1", "lost_peer": True, "time": 1.0, "pid": 10, "rank": 0},
        {"message": "ValueError: x", "lost_peer": False, "time": 2.0, "pid": 11, "rank": 1},
        {},
    ]
    error = notebook._failure(1, told)
    assert (error.error_index, error.error_pid) == (1, 11)
    assert "ValueError: x" in str(error)
    assert notebook._failure(137, [{}, {}]).exit_code == 137
