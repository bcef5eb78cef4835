"""Two hosts (network namespaces) of two ranks: the bits of one host, and each byte crosses once."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest

from dtrain.comm import collectives as c
from dtrain.comm.reduce import AVG
from dtrain.testing.world import run_world
from tests.end_to_end.hosts import ended, two_hosts, why_not
from tests.end_to_end.test_hosts import key, write  # noqa: F401  a fixture

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")

COUNT = 1_000_000

SCRIPT = """
import hashlib, json
import numpy as np
import dtrain as torch

dist = torch.distributed
dist.init_process_group()
rank, group = dist.get_rank(), dist.group.WORLD.arrays
cable = f"/sys/class/net/cable{rank // 2}/statistics/tx_bytes"
x = torch.from_numpy(np.random.default_rng(rank).normal(size=COUNT).astype(np.float32))
part, whole = torch.empty(COUNT // 4), torch.empty(4 * COUNT)
calls = {
    "all_reduce": lambda: dist.all_reduce(x, dist.ReduceOp.AVG),
    "reduce_scatter": lambda: dist.reduce_scatter_tensor(part, x),
    "all_gather": lambda: dist.all_gather_into_tensor(whole, x),
    "broadcast": lambda: dist.broadcast(x, 3),
}
crossed = {}
for name, call in calls.items():
    dist.barrier()
    before = int(open(cable).read())
    dist.barrier()
    call()
    dist.barrier()
    crossed[name] = int(open(cable).read()) - before
bits = [hashlib.sha256(t.numpy().tobytes()).hexdigest() for t in (x, part, whole)]
print(json.dumps([rank, group.transport.island is not None, bits[0], bits[1], bits[2], crossed]))
dist.destroy_process_group()
"""


def _on_one_host(group):
    x = np.random.default_rng(group.rank).normal(size=COUNT).astype(np.float32)
    part, whole = np.empty(COUNT // 4, np.float32), np.empty(4 * COUNT, np.float32)
    group.submit(c.AllReduce(x, AVG))
    group.submit(c.ReduceScatter(x, part))
    group.submit(c.AllGather(x, whole))
    group.submit(c.Broadcast(x, 3))
    return [x.tobytes(), part.tobytes(), whole.tobytes()]


def test_two_hosts_have_the_bits_of_one_and_send_each_byte_once(tmp_path, key):  # noqa: F811
    script = write(tmp_path, f"COUNT = {COUNT}\n{SCRIPT}")
    with two_hosts() as hosts:
        nodes = ended(*[hosts.dtrun(i, key, script, "--nproc-per-node", 2) for i in (0, 1)])
    assert [code for code, *_ in nodes] == [0, 0], nodes
    lines = [line for _, out, _ in nodes for line in out.splitlines() if "[" in line]
    told = sorted(json.loads(line.partition(": ")[2]) for line in lines)
    for rank, results in enumerate(run_world(4, _on_one_host)):
        bits = [hashlib.sha256(result).hexdigest() for result in results]
        assert told[rank][:5] == [rank, True, *bits]
    # Headers, encryption, TCP and barriers add less than a tenth; nothing crosses twice.
    nbytes = 4 * COUNT
    forward, backward = told[0][5], told[2][5]
    expected = {
        "all_reduce": (nbytes, nbytes),
        "reduce_scatter": (nbytes, nbytes / 2),
        "all_gather": (2 * nbytes, 2 * nbytes),
        "broadcast": (0, nbytes),
    }
    for name, sent in expected.items():
        for counted, least in zip((forward[name], backward[name]), sent, strict=True):
            assert least <= counted < 1.1 * least + 300_000, (name, forward, backward)
