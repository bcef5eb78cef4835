"""What a job listens on, found in the kernel's tables, is what docs/security.md declares."""

from __future__ import annotations

import json

import pytest

from tests.end_to_end.launch import dtrun

LISTENERS = """
import json, os, socket, sys
import dtrain as torch
dist = torch.distributed
dist.init_process_group(sys.argv[1])
dist.all_reduce(torch.ones(3))
mine = {os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if
        os.path.exists(f"/proc/self/fd/{fd}")}
found = []
for table in ("tcp", "tcp6", "udp", "udp6"):
    for row in [line.split() for line in open(f"/proc/net/{table}")][1:]:
        listens = row[3] == "0A" if table.startswith("tcp") else True
        if listens and f"socket:[{row[9]}]" in mine:
            address, port = row[1].split(":")
            address = socket.inet_ntoa(bytes.fromhex(address)[::-1]) if len(address) == 8 else "v6"
            found.append([table, address, int(port, 16)])
print(json.dumps([dist.get_rank(), os.environ["MASTER_PORT"], found]), flush=True)
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.parametrize(("backend", "inboxes"), [("shm", 0), ("zmq", 0), ("tcp", 1)])
def test_a_job_on_one_host_listens_on_its_store_alone(tmp_path, backend, inboxes):
    script = tmp_path / "listeners.py"
    script.write_text(LISTENERS)
    ended = dtrun(2, script, backend)
    assert ended.code == 0, ended.err
    told = [json.loads(line.partition("]: ")[2]) for line in ended.out.splitlines()]
    for rank, store, found in told:
        assert {(table, address) for table, address, _ in found} <= {("tcp", "127.0.0.1")}
        ports = [port for *_, port in found]
        assert (int(store) in ports) == (rank == 0)
        assert len(ports) == inboxes + (rank == 0)
    assert len(told) == 2
