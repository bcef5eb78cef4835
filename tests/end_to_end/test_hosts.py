"""Ranks on two hosts (network namespaces): meeting, talking, strangers, and losing each other."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from tests.end_to_end.hosts import ADDRESSES, ended, two_hosts, why_not

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")

TALK = """
import sys
import dtrain as torch
dist = torch.distributed
dist.init_process_group()
rank, size = dist.get_rank(), dist.get_world_size()
total = torch.arange(300_000, dtype=torch.float32) + rank
dist.all_reduce(total)
assert (total == size * torch.arange(300_000, dtype=torch.float32) + size * (size - 1) / 2).all()
names = [None] * size
dist.all_gather_object(names, open("/proc/sys/kernel/hostname").read().strip())
if rank == 0:
    rows = [line.split() for line in [*open("/proc/net/tcp"), *open("/proc/net/tcp6")]]
    print("listening:", *sorted(row[1] for row in rows if row[3] == "0A"))
dist.barrier()
print(dist.get_backend(), *names)
dist.destroy_process_group()
"""

# The heartbeats of a test: the defaults would take 5 seconds.
LOSE = """
import os, signal, sys, time
from dtrain.comm.security import sockets
sockets.HEARTBEAT = sockets.Heartbeat(100, 400)
import dtrain as torch
dist = torch.distributed
dist.init_process_group()
dist.all_reduce(torch.ones(10))
print("met", flush=True)
started = time.monotonic()
try:
    for step in range(10_000):
        dist.all_reduce(torch.ones(10))
        started = time.monotonic()
        if sys.argv[1:] == ["kill"] and step == 20 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.01)
except dist.DistError as error:
    print(type(error).__name__, error.rank, f"{time.monotonic() - started:.2f}", flush=True)
"""


@pytest.fixture
def key(tmp_path):
    made = subprocess.run(
        [sys.executable, "-m", "dtrun", "keygen"], capture_output=True, check=True
    )
    path = tmp_path / "job.key"
    path.write_bytes(made.stdout)
    path.chmod(0o600)
    return path


def write(folder, text):
    path = folder / "script.py"
    path.write_text(text)
    return path


def listening(out):
    """What rank 0 saw in its host's table of sockets: [(address, port)]."""
    (line,) = [line for line in out.splitlines() if "listening:" in line]
    pairs = [text.split(":") for text in line.partition("listening: ")[2].split()]
    return [(socket.inet_ntoa(bytes.fromhex(a)[::-1]), int(port, 16)) for a, port in pairs]


def test_two_hosts_with_two_ranks_each_talk_and_listen_nowhere_else(tmp_path, key):
    script = write(tmp_path, TALK)
    with two_hosts() as hosts:
        nodes = ended(*[hosts.dtrun(i, key, script, "--nproc-per-node", 2) for i in (0, 1)])
    for code, out, err in nodes:
        assert code == 0, out + err
        assert out.count("shm node0 node0 node1 node1") == 2
        assert "plain" not in err
    found = listening(nodes[0][1])
    assert {address for address, _ in found} == {ADDRESSES[0]}
    assert len(found) == 3  # the store, and an inbox for each of the two ranks
    assert (ADDRESSES[0], 29500) in found


def test_plain_text_says_so_once(tmp_path, key):
    script = write(tmp_path, TALK)
    with two_hosts() as hosts:
        plain = ("--data-plane", "plaintext", "--local-addr")
        nodes = ended(*[hosts.dtrun(i, key, script, *plain, ADDRESSES[i]) for i in (0, 1)])
    assert [code for code, _, _ in nodes] == [0, 0], nodes
    assert [err.count("the ranks exchange tensors in plain text") for *_, err in nodes] == [1, 0]


def test_a_node_with_another_secret_is_told_so_at_once(tmp_path, key):
    script = write(tmp_path, TALK)
    other = tmp_path / "other.key"
    other.write_text("another secret, which nobody else has")
    other.chmod(0o600)
    with two_hosts() as hosts:
        first, stranger = hosts.dtrun(0, key, script), hosts.dtrun(1, other, script)
        ((code, out, err),) = ended(stranger)
        first.terminate()
        ((_, first_out, first_err),) = ended(first)
    assert code == 1
    assert "do not know each other" in err, err
    assert "sum" not in out + first_out
    for secret in (key.read_text().strip(), other.read_text()):
        assert secret not in out + err + first_out + first_err


@pytest.mark.parametrize("how", ["cut", "kill"])
def test_a_lost_host_is_named(tmp_path, key, how):
    """A cut cable is seen by heartbeats (here 0.1 and 0.4 s), a death by the broken connection."""
    script = write(tmp_path, LOSE)
    with two_hosts() as hosts:
        nodes = [hosts.dtrun(i, key, script, args=[how]) for i in (0, 1)]
        if how == "cut":
            for node in nodes:
                assert node.stdout.readline() == "met\n"
            hosts.cut()
        outcomes = ended(*nodes)
    limit = {"cut": 3.0, "kill": 1.0}[how]
    for rank in {"cut": (0, 1), "kill": (0,)}[how]:
        name, lost, seconds = outcomes[rank][1].split()[-3:]
        assert (name, lost) == ("PeerLost", str(1 - rank)), outcomes
        assert float(seconds) < limit, outcomes
