"""Several nodes that meet: agents on addresses of one host, that come late, go, die and return."""

from __future__ import annotations

import functools
import re
import signal
import time

import psutil
import pytest

from dtrun.rendezvous import reserve_port
from dtrun.secret import fresh
from tests.dtrun.launch import DEADLINE, living, read_lines, wait_until

MEET = """
import dtrain as torch
dist = torch.distributed
dist.init_process_group()
total = torch.ones(1)
dist.all_reduce(total)
assert total.item() == dist.get_world_size()
"""
# Goes on until somebody makes a file `stop`; all ranks see it in the same step.
LAST = """
print(rank, "of", dist.get_world_size(), "restarts", os.environ["TORCHELASTIC_RESTART_COUNT"],
      flush=True)
seen = torch.zeros(1)
while seen.item() == 0:
    seen = torch.ones(1) * os.path.exists("stop")
    dist.all_reduce(seen)
    time.sleep(0.01)
"""
# So much silence is patiently borne: a process that ends is noticed by its connection.
SOON = "last_call_timeout=0.3,keep_alive_interval=0.2,keep_alive_max_attempt=1000"


@pytest.fixture
def node(dtrun):
    """`node(1, flags, script)` starts dtrun as the node at 127.0.0.1; the endpoint stays free."""
    with reserve_port("127.0.0.1") as holder:
        port = holder.getsockname()[1]
        key = dtrun.folder / "job.key"
        key.write_text(fresh())
        key.chmod(0o600)

        def start(number, *flags):
            meeting = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}")
            own = ("--rdzv-id", "job", "--rdzv-conf", SOON, "--local-addr", f"127.0.0.{number}")
            return dtrun.start(*meeting, *own, "--secret-file", str(key), *flags)

        yield start


def ended(*nodes):
    """Exit code, output, errors of each."""
    texts = [node.communicate(timeout=DEADLINE) for node in nodes]
    return [(node.returncode, *text) for node, text in zip(nodes, texts, strict=True)]


def stop_all(node):
    """Stop dtrun and everything below it; the processes."""
    family = [psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)]
    for process in family:
        process.suspend()
    return family


def kill_all(node, dtrun):
    """A host that loses its power: dtrun and everything below it, at once.

    What it has left on the disk, the next run on that host removes.
    """
    for process in stop_all(node):  # nobody sees another one die
        process.kill()
    node.wait(DEADLINE)
    dtrun.run("--no-python", "true")


def test_nodes_with_different_numbers_of_ranks(dtrun, node):
    script = dtrun.script(MEET + "print(rank, [os.environ[n] for n in sys.argv[1:]])")
    names = ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "MASTER_ADDR")
    first = node(1, "--nnodes", "2", "--nproc-per-node", "1", script, *names)
    second = node(2, "--nnodes", "2", "--nproc-per-node", "2", script, *names)
    (code, out, _), (other_code, other_out, _) = ended(first, second)
    assert (code, other_code) == (0, 0)
    lines = re.findall(r"(\d) (\[.*\])", out + other_out)
    head = re.search(r"127\.0\.0\.[12]", out)[0]  # either may have been the first
    big = head == "127.0.0.1"
    expected = [(0, 1, 0), (0, 2, 1), (1, 2, 1)] if big else [(0, 2, 0), (1, 2, 0), (0, 1, 1)]
    assert sorted(lines) == [
        (str(rank), str([str(local), str(size), str(group), "2", head]))
        for rank, (local, size, group) in enumerate(expected)
    ]


def test_nodes_come_late_die_and_return(dtrun, node):
    script = dtrun.script(MEET + LAST)
    flags = ("--nnodes", "1:3", script)
    first = node(1, *flags)
    assert read_lines(first, 1) == ["0 of 1 restarts 0"]
    second = node(2, *flags)
    assert read_lines(second, 1) == ["1 of 2 restarts 0"]
    third = node(3, *flags)
    assert read_lines(third, 1) == ["2 of 3 restarts 0"]
    kill_all(third, dtrun)
    assert read_lines(first, 3)[-1] == "0 of 2 restarts 0"
    third = node(3, *flags)
    assert read_lines(third, 1) == ["2 of 3 restarts 0"]
    second.send_signal(signal.SIGTERM)  # leaves in order, at once
    ((code, _, err),) = ended(second)
    assert (code, "stopped by SIGTERM" in err) == (128 + 15, True)
    assert read_lines(third, 1) == ["1 of 2 restarts 0"]
    (dtrun.folder / "stop").touch()
    (code, _, err), (other_code, _, _) = ended(first, third)
    assert (code, other_code) == (0, 0)
    assert "is lost: the connection to it broke" in err
    assert "node 1 " in err
    assert "has left: stopped by SIGTERM" in err


def test_a_node_that_was_stopped_for_too_long_ends_as_soon_as_it_goes_on(dtrun, node):
    script = dtrun.script(MEET + LAST)
    flags = ("--nnodes", "1:2", "--rdzv-conf", SOON.replace("1000", "10"), script)
    first = node(1, *flags)
    assert read_lines(first, 1) == ["0 of 1 restarts 0"]
    second = node(2, *flags)
    assert read_lines(second, 1) == ["1 of 2 restarts 0"]
    assert read_lines(first, 1) == ["0 of 2 restarts 0"]
    stopped = stop_all(second)
    assert read_lines(first, 1) == ["0 of 1 restarts 0"]
    for process in stopped:
        process.resume()
    ((code, out, err),) = ended(second)
    assert (code, out) == (75, "")
    assert "Start dtrun again" in err
    (dtrun.folder / "stop").touch()
    ((code, out, err),) = ended(first)
    assert (code, out) == (0, "")  # nobody joined again
    assert "node 1 " in err
    assert "is lost: silent for 2 s" in err


def test_a_failure_is_told_on_all_nodes_and_uses_up_a_restart(dtrun, node):
    script = dtrun.script(
        MEET
        + """
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and rank == 1:
    raise ValueError("no data")
dist.barrier()
"""
    )
    nodes = []
    for number in (1, 2, 3):
        nodes.append(node(number, "--nnodes", "3", "--max-restarts", "1", script))
        if number == 1:  # so that it is the head
            wait_until(functools.partial(listens, psutil.Process(nodes[0].pid)))
    results = ended(*nodes)
    assert [code for code, _, _ in results] == [0, 0, 0], results
    errors = [err for _, _, err in results]
    for err in errors:
        assert "restart 1 of 1 of all workers" in err
    assert "ValueError: no data" in errors[0]
    assert [err.count("train.py FAILED") for err in errors].count(1) == 2
    assert sum("dtrun: failed on" in err for err in errors) == 1


def listens(head):
    processes = head.children(recursive=True)
    return any(c.status == "LISTEN" for p in processes for c in p.net_connections("tcp"))


def test_the_exit_code_is_that_of_the_root_cause_on_every_node(dtrun, node):
    script = dtrun.script(MEET + "if rank == 1: os._exit(7)\ndist.barrier()")
    nodes = [node(number, "--nnodes", "2", script) for number in (1, 2)]
    assert [code for code, _, _ in ended(*nodes)] == [7, 7]


def test_the_ranks_of_an_epoch_do_not_know_the_next(dtrun, node):
    """What a rank knows is worth nothing after a restart: the store refuses its key."""
    script = dtrun.script(
        MEET
        + """
from dtrain.comm.store.tcp import TcpStore
path = os.path.join(os.environ["DTRAIN_RUN_DIR"], "secret")
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    os.system(f"cp -p {path} old-{rank}")
    dist.barrier()
    sys.exit(1)
meeting = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
TcpStore(*meeting, timeout=5).add("x", 1)
os.environ |= {"DTRAIN_RUN_DIR": "", "DTRAIN_SECRET_FILE": f"old-{rank}"}
try:
    TcpStore(*meeting, timeout=5).add("x", 1)
except dist.DistStoreError as error:
    print("do not know each other" in str(error))
dist.barrier()
"""
    )
    nodes = [node(number, "--nnodes", "2", "--max-restarts", "1", script) for number in (1, 2)]
    assert [(code, out) for code, out, _ in ended(*nodes)] == [(0, "True\n")] * 2


def test_a_head_that_dies_ends_the_job_with_one_line(dtrun, node):
    script = dtrun.script(MEET + LAST)
    head = node(1, "--nnodes", "1:2", script)
    read_lines(head, 1)
    other = node(2, "--nnodes", "1:2", script)
    read_lines(other, 1)
    pids = [child.pid for child in psutil.Process(other.pid).children(recursive=True)]
    started = time.monotonic()
    kill_all(head, dtrun)
    ((code, _, err),) = ended(other)
    assert code == 75
    assert time.monotonic() - started < 3.0
    assert err.count("dtrun: the head of the job at 127.0.0.1:") == 1
    assert "Start dtrun again on all nodes to go on" in err
    assert not living(pids)


def test_a_node_that_was_started_differently_is_refused(dtrun, node):
    script = dtrun.script(MEET + LAST)
    head = node(1, "--nnodes", "1:2", script)
    read_lines(head, 1)
    ((code, _, err),) = ended(node(2, "--nnodes", "1:3", script))
    assert code == 2
    assert "the nodes were started differently: most nodes 3 here, 2 at the head" in err
    (dtrun.folder / "stop").touch()
    assert ended(head)[0][0] == 0


def test_nodes_that_do_not_come_are_waited_for_and_then_said(dtrun, node):
    script = dtrun.script("")
    alone = node(1, "--nnodes", "2", "--rdzv-conf", "join_timeout=0.5", script)
    ((code, _, err),) = ended(alone)
    assert (code, err) == (1, "dtrun: only 1 of 2 nodes came within 0.5 s\n")
