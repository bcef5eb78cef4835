"""A canary pickle at every door of a worker: it would write a file, if anybody unpickled it.

Outsiders knock at all listening sockets of a process; a member sends it in the place of arguments.
An audit hook in the process notes whatever is unpickled.
"""

from __future__ import annotations

import os
import pickle
import socket
import struct
import sys
import tempfile
from pathlib import Path

import msgpack
import pytest

import dtrain as torch
from dtrain.distributed import rpc
from dtrain.distributed.rpc import agent as agents
from dtrain.distributed.rpc.payload import CODE, Packed
from dtrain.testing.distributed import run_distributed
from tests.distributed.rpc.worlds import echo

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

unpickled = []


class Canary:
    def __init__(self, nest):
        self.nest = nest

    def __reduce__(self):
        return os.mkdir, (self.nest,)


def watch():
    def hook(event, arguments):
        if event == "pickle.find_class":
            unpickled.append([str(a) for a in arguments])

    sys.addaudithook(hook)


def heard():
    return list(unpickled)


def doors():
    """The addresses at which this process listens."""
    mine = set()
    for link in Path("/proc/self/fd").iterdir():
        try:
            mine.add(os.readlink(link).removeprefix("socket:[").removesuffix("]"))
        except FileNotFoundError:
            continue
    found = []
    for line in Path("/proc/self/net/tcp").read_text().splitlines()[1:]:
        place, state, inode = (line.split()[i] for i in (1, 3, 9))
        if state == "0A" and inode in mine:
            host, port = place.split(":")
            address = socket.inet_ntoa(struct.pack("<I", int(host, 16)))
            found.append([address, int(port, 16)])
    for line in Path("/proc/self/net/unix").read_text().splitlines()[1:]:
        parts = line.split()
        if int(parts[3], 16) & 0x10000 and parts[6] in mine:
            found.append(parts[7].replace("@", "\0"))
    return found


def knock(door, canary):
    """Send the canary as it is, behind a greeting of ZeroMQ, and as a message of ours."""
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(48)
    envelope = msgpack.packb([1, 0, 0, ["x", None], [], msgpack.ExtType(CODE, canary), []])
    for frame in (canary, greeting + bytes([0, len(canary) % 256]) + canary, b"DTR1" + envelope):
        kind = socket.AF_UNIX if isinstance(door, str) else socket.AF_INET
        with socket.socket(kind, socket.SOCK_STREAM) as stranger:
            stranger.settimeout(0.2)
            stranger.connect(door if isinstance(door, str) else tuple(door))
            try:
                stranger.sendall(frame)
                stranger.recv(1000)
            except (TimeoutError, ConnectionError):
                pass  # it does not answer, or hangs up


def call_with(body):
    """What a member gets that sends these bytes as a call."""
    me = rpc.current.agent()
    packed = Packed(body, [], [])
    return me._start(1, agents.CALL, "canary", 10, packed, ["canary", None]).wait()


def scene(over):
    rank = torch.distributed.get_rank()
    options = rpc.TensorPipeRpcBackendOptions(_transports=[over])
    rpc.init_rpc(f"w{rank}", rpc_backend_options=options)
    if rank == 0:
        rpc.rpc_sync("w1", watch)
        nest = os.path.join(tempfile.mkdtemp(), "nest")
        canary = pickle.dumps(Canary(nest))
        found = rpc.rpc_sync("w1", doors)
        assert found  # those of the process group among them
        for door in [*found, *doors()]:
            knock(door, canary)
        code = msgpack.ExtType(CODE, msgpack.packb(canary))
        for body in (msgpack.packb(code), msgpack.packb([code, [], {}])):
            with pytest.raises(TypeError, match="did not say accept_code=True"):
                call_with(body)
        for body in (canary, b"", b"\xc1", msgpack.packb([canary, [], {}])):
            with pytest.raises((TypeError, ValueError)):
                call_with(body)
        with pytest.raises(TypeError, match="accept_code"):
            rpc.rpc_sync("w1", echo, (Canary(nest),))
        assert rpc.rpc_sync("w1", echo, (1,)) == 1
        assert rpc.rpc_sync("w1", heard) == []
        assert not os.path.exists(nest)
        pickle.loads(canary)  # it can sing
        assert os.path.exists(nest)
    rpc.shutdown(timeout=20)


@pytest.mark.parametrize("over", ["unix", "zmq", "tcp"])
def test_a_canary_pickle_is_opened_at_no_door(over):
    run_distributed(2, scene, over, transport="zmq", processes=True)
