"""An open world of remote calls over two hosts (network namespaces): workers come, die and leave.

Both hosts have the secret of the run; who has another one gets nowhere.
"""

from __future__ import annotations

import sys

import pytest

from tests.end_to_end.hosts import ADDRESSES, ended, two_hosts, why_not
from tests.end_to_end.test_hosts import key, write  # noqa: F401  a fixture
from tests.end_to_end.test_partition import read_until

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")

WORKER = """
import os, signal, sys, threading
import dtrain as torch
from dtrain.distributed import rpc
from dtrain.errors import PeerLost

name, url, *rank = sys.argv[1:]
options = rpc.TensorPipeRpcBackendOptions(init_method=url, rpc_timeout=20)
kept, over = [], threading.Event()

def whoami(): return [rpc.get_worker_info().name, open("/proc/sys/kernel/hostname").read().strip()]
def ask(to): return rpc.rpc_sync(to, whoami)
def keep(reference): kept.append(reference)
def held(): return sorted(rpc.get_debug_info()["owned"].values())
def finish(): over.set()
def die(): os.kill(os.getpid(), signal.SIGKILL)

rpc.init_rpc(name, rank=int(rank[0]) if rank else -1, rpc_backend_options=options)
print("here", rpc.get_worker_info().id, flush=True)
if name == "visitor":
    print(*rpc.rpc_sync("first", whoami), *rpc.rpc_sync("first", ask, ("second",)), flush=True)
    x = torch.arange(3_000_000)
    assert torch.equal(rpc.rpc_sync("first", torch.add, (x, 1)), x + 1)
    rpc.rpc_sync("second", keep, (rpc.RRef("mine"),))
    assert rpc.rpc_sync("first", whoami) and held() == [["second"]]
    try:
        rpc.rpc_sync("second", die)
    except PeerLost as error:
        print("lost", error.rank, flush=True)
    while held():
        threading.Event().wait(0.02)
    print("released", flush=True)
    rpc.rpc_sync("first", finish)
else:
    over.wait(30)
rpc.shutdown(timeout=10)
print("left", flush=True)
"""


def test_workers_of_two_hosts_join_call_die_and_leave(tmp_path, key):  # noqa: F811
    script, url = write(tmp_path, WORKER), f"tcp://{ADDRESSES[0]}:29500"
    stranger = tmp_path / "stranger.key"
    stranger.write_bytes(b"x" * 64)
    stranger.chmod(0o600)

    with two_hosts() as hosts:

        def start(host, name, *rank, secret=key):
            command = [sys.executable, script, name, url, *rank]
            return hosts.start(host, *command, DTRAIN_SECRET_FILE=str(secret))

        first = start(0, "first", 0)
        assert read_until(first, lambda line: line.startswith("here")) == "here 0\n"
        second = start(1, "second")
        assert read_until(second, lambda line: line.startswith("here")) == "here 1\n"
        outsider = start(1, "outsider", secret=stranger)
        visitor = start(1, "visitor")
        (code, out, err), (_, firsts, _), (killed, _, _) = ended(visitor, first, second)
        assert code == 0, err
        assert out.splitlines() == [
            "here 2",
            "first node0 second node1",
            "lost 1",
            "released",
            "left",
        ]
        assert firsts == "left\n"
        assert killed == -9
        (refused, nothing, why) = ended(outsider)[0]
        assert refused == 1
        assert nothing == ""
        assert "secret" in why
