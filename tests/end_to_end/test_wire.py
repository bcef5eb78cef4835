"""Two hosts with a bad cable between them: late, lost, doubled, disordered; or one way only."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.end_to_end.hosts import ADDRESSES, ended, two_hosts, why_not
from tests.end_to_end.test_partition import read_until
from tests.end_to_end.wire import Wire, judged

why = why_not() or ("" if os.path.exists("/dev/net/tun") else "not run: no /dev/net/tun")
pytestmark = pytest.mark.skipif(bool(why), reason=why or "-")

# The heartbeats of a test, for ranks and envoys alike: the defaults would take 5 seconds.
QUICK = (
    "from dtrain.comm.security import sockets; sockets.HEARTBEAT = sockets.Heartbeat(200, 1500)\n"
)
# A step is one message there and back, and a gradient of 400 KB.
TRAIN = """
import time
import dtrain as torch
dist = torch.distributed
dist.init_process_group()
rank = dist.get_rank()
begun = time.monotonic()
dist.barrier()
trip = time.monotonic() - begun
for step in range(4):
    total = torch.arange(100_000, dtype=torch.float32) * (rank + step)
    dist.all_reduce(total)
    assert (total == torch.arange(100_000, dtype=torch.float32) * (2 * step + 1)).all()
print("all steps are exact, a barrier took", round(trip, 3), flush=True)
dist.destroy_process_group()
"""
FOR_EVER = """
import dtrain as torch
dist = torch.distributed
dist.init_process_group()
print("met", dist.get_world_size(), flush=True)
while True:
    dist.all_reduce(torch.ones(10))
"""


@pytest.fixture
def nodes(tmp_path):
    """`nodes(hosts, script, *flags)` starts dtrun on both."""
    made = [sys.executable, "-m", "dtrun", "keygen"]
    key, script = tmp_path / "job.key", tmp_path / "train.py"
    key.write_bytes(subprocess.run(made, capture_output=True, check=True).stdout)
    key.chmod(0o600)
    meeting = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{ADDRESSES[0]}:29500")

    def start(hosts, text, *flags, **environment):
        script.write_text(text)
        command = (sys.executable, "-m", "dtrun", *meeting, "--secret-file", key, *flags, script)
        return [hosts.start(host, *command, **environment) for host in (0, 1)]

    return start


def test_a_bad_cable_costs_time_and_no_bit(nodes):
    """The heartbeats are those that users have."""
    wire = Wire(delay=0.02, jitter=0.005, loss=0.01, twice=0.02)
    with two_hosts(wire) as hosts, judged(wire):
        for code, out, err in ended(*nodes(hosts, TRAIN, "--nnodes", "2")):
            assert code == 0, err
            assert "all steps are exact" in out
            assert float(out.split()[-1]) > 0.03
            assert "lost" not in err
    for way in wire.ways:
        assert way.carried > 200
        assert min(way.lost, way.doubled, way.overtaken) > 0, f"not run: {way}"


@pytest.mark.parametrize("deaf", [0, 1])
def test_a_cable_that_carries_one_way_only_is_a_cut(nodes, tmp_path, deaf):
    """Both sides notice, whichever of them is not heard: the head goes on, the other one ends."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nif 'dtrun.envoy' in ' '.join(sys.orig_argv):\n    " + QUICK
    )
    conf = ("--rdzv-conf", "last_call_timeout=0.3,keep_alive_max_attempt=60")
    wire = Wire()
    with two_hosts(wire) as hosts, judged(wire):
        flags = ("--nnodes", "1:2", *conf)
        head, other = nodes(hosts, QUICK + FOR_EVER, *flags, PYTHONPATH=str(tmp_path))
        read_until(head, lambda line: line == "met 2\n")
        wire.ways[1 - deaf].loss = 1.0
        ((code, _, err),) = ended(other)
        assert code == 75, err
        assert "Start dtrun again" in err
        read_until(head, lambda line: line == "met 1\n")
        assert wire.ways[1 - deaf].lost > 0
        head.terminate()
        assert ended(head)[0][0] == 128 + 15
