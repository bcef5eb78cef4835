"""A job under fire: every socket it listens on is sent rubbish, and it computes as if nothing were.

The job is real: two ranks under dtrun over TCP. Strangers send mutated handshakes and frames to
the store's port and to both inboxes; a process of the same user sends messages that are none to a
unix inbox; rank 0, which is authenticated, does so over TCP; a client that knows the secret sends
requests that are none to the store.
"""

from __future__ import annotations

import json
import random
import socket

import pytest
import zmq

from dtrain.comm import security
from dtrain.comm.security.addresses import split
from dtrain.comm.security.keys import store_keys
from dtrain.comm.store.tcp import TcpStore
from dtrun.secret import fresh
from tests.dtrun.launch import read_lines
from tests.end_to_end import fuzz

JOB = """
import json, random
import dtrain as torch
from dtrain.comm.transports import zmq as transports
from tests.end_to_end import fuzz
dist = torch.distributed
dist.init_process_group("tcp")
rank, world = dist.get_rank(), dist.group.WORLD
transport, store = world.arrays.transport, world.get_group_store()
rng = random.Random(rank)

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

def rubbish(count):
    for _ in range(count):
        with transport._out_lock:
            transport._connect(1)
            transport._outbox.send(b"r1", transports._MORE)
            transport._outbox.send_multipart(fuzz.message(rng, 2))

def report(**more):
    print(json.dumps({
        "rank": rank, "inbox": transport._network.address_of(rank), "memory": resident(),
        "unix": transport._peers[rank].address, "ignored": transport.ignored,
        "refused": transport._network.refused, "strangers": transport._network._gate.refused,
        **more,
    }), flush=True)

report(store=os.environ["MASTER_PORT"], run=os.environ["TORCHELASTIC_RUN_ID"])
steps = sent = 0
while True:
    x = torch.tensor([1.0, float(rank == 0 and store.check(["stop"]))])
    dist.all_reduce(x)
    assert x[0].item() == 2.0
    steps += 1
    if rank == 0 and sent < 20_000:
        rubbish(100)
        sent += 100
    if steps == 50:
        before = resident()
    if steps > 250 and x[1].item():
        break
report(steps=steps, sent=sent, before=before)
dist.destroy_process_group()
"""


def reports(lines):
    """What the two ranks said, by rank."""
    told = [json.loads(line.partition("]: ")[2]) for line in lines if "]: {" in line]
    return {one["rank"]: one for one in told}


@pytest.mark.timeout(120)
def test_a_job_under_fire_goes_on(dtrun, monkeypatch, tmp_path):
    key = tmp_path / "job.key"
    key.write_text(fresh())
    key.chmod(0o600)
    script = dtrun.script(JOB)
    root = str(fuzz.__file__).partition("/tests/")[0]
    flags = ("--nproc-per-node", "2", "--secret-file", str(key))
    job = dtrun.start(*flags, script, env={"PYTHONPATH": root})
    ranks = reports(read_lines(job, 2))
    rng, frames = random.Random(1), 0

    # 1. Strangers, on every TCP port; some of them stay on the line in the middle of a handshake.
    ports = [("127.0.0.1", int(ranks[0]["store"]))]
    ports += [(host, int(port)) for host, port in (split(one["inbox"]) for one in ranks.values())]
    held = [socket.create_connection(port, timeout=5) for port in ports for _ in range(30)]
    for sock in held:
        sock.sendall(fuzz.greeting(b"CURVE")[: rng.randrange(64)])
    try:
        for port in ports:
            frames += sum(fuzz.strangers(rng, port, 600))
    except OSError as error:
        pytest.fail(f"{error} at {port}: the job said {job.communicate(timeout=20)}")

    # 2. The same user, on a unix inbox; and who knows the secret, at the store.
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", ranks[0]["run"])
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    keys = store_keys(key.read_bytes())
    context = security.context()
    neighbour = security.open_socket(context, zmq.DEALER)
    security.connect(neighbour, ranks[1]["unix"])
    member = security.open_socket(context, zmq.DEALER)
    security.connect(
        member, f"tcp://127.0.0.1:{ranks[0]['store']}", keys.client, keys.server.public
    )
    try:
        for number in range(40_000):
            neighbour.send_multipart(fuzz.message(rng, 2), zmq.DONTWAIT)
            if number % 4 == 0:
                member.send(fuzz.request(rng, number), zmq.DONTWAIT)
                while member.poll(0):  # who reads no answers is not heard for long either
                    member.recv()
    except zmq.Again:
        context.destroy(linger=0)
        job.terminate()
        pytest.fail(f"a connection of the job broke; it said {job.communicate(timeout=20)}")
    frames += 40_000 + 10_000
    context.destroy(linger=20_000)  # until all is taken

    # 3. A real client is served, the job goes on to its end, and no memory has been eaten.
    monkeypatch.setenv("DTRAIN_SECRET_FILE", str(key))
    with TcpStore("127.0.0.1", int(ranks[0]["store"]), timeout=10) as client:
        client.set("default/stop", b"")
    out, err = job.communicate(timeout=60)
    for sock in held:
        sock.close()
    assert job.returncode == 0, out + err
    after = reports(out.splitlines())
    frames += after[0]["sent"]
    assert frames >= 100_000
    assert all(one["strangers"] == 0 for one in after.values())  # nobody got as far as a gate
    assert after[0]["ignored"] == after[0]["refused"] == 0  # strangers alone have met rank 0
    assert after[1]["refused"] > 5_000
    assert after[1]["ignored"] > 40_000
    for one in after.values():
        assert one["memory"] - one["before"] < 32 << 20, after
    assert err.count("rank 1 ignored a message") == err.count("rank 1 refused a message") == 1
