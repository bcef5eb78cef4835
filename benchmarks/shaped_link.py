"""A link of 1 Gbit/s between two hosts, made of network namespaces; needs root, `ip` and `tc`.

Owns: `shaped_link` and `run_over`. Everything it makes has the process id in its name and is gone
when the block ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess

RATE = "1gbit"
# TCP's share of 1 Gbit/s on Ethernet: 1448 bytes of payload in 1538 on the wire.
BYTES_PER_SECOND = 117e6
ADDRESSES = ("10.77.0.1", "10.77.0.2")
PORT = "29411"  # in a namespace of our own nobody else has it


def why_not():
    """Why such a link cannot be made here, or None."""
    if os.geteuid() != 0:
        return "needs root"
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    return f"{' and '.join(missing)} not found" if missing else None


def _run(text):
    done = subprocess.run(text.split(), capture_output=True, text=True, timeout=10, check=False)
    if done.returncode:
        raise OSError(f"{text}: {done.stderr.strip()}")


@contextlib.contextmanager
def shaped_link():
    """Two namespaces and the link between them: a list of their names. OSError if refused."""
    names = [f"dtrain{side}{os.getpid()}" for side in "ab"]
    made = []
    try:
        for name in names:
            _run(f"ip netns add {name}")
            made.append(name)
        _run(f"ip link add eth0 netns {names[0]} type veth peer name eth0 netns {names[1]}")
        for name, address in zip(names, ADDRESSES, strict=True):
            inside = f"ip netns exec {name}"
            _run(f"{inside} ip address add {address}/24 dev eth0")
            _run(f"{inside} tc qdisc add dev eth0 root tbf rate {RATE} burst 128kb latency 50ms")
            _run(f"{inside} ip link set eth0 up")
            _run(f"{inside} ip link set lo up")
        yield names
    finally:
        for name in made:
            _run(f"ip netns del {name}")


def run_over(names, command, env, timeout=120):
    """Run `command` as one rank in each namespace; the JSON that rank 0 prints."""
    ranks = []
    for rank, name in enumerate(names):
        told = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
        told |= {"MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": PORT, "GLOO_SOCKET_IFNAME": "eth0"}
        inside = ["ip", "netns", "exec", name, *command]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        ranks.append(subprocess.Popen(inside, env={**env, **told}, **pipes))
    try:
        said = [rank.communicate(timeout=timeout) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    if any(rank.returncode for rank in ranks):
        raise OSError(f"{' '.join(command)} failed:\n" + "\n".join(err for _, err in said))
    return json.loads(next(line for line in said[0][0].splitlines() if line.startswith("{")))
