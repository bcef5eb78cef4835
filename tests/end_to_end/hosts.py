"""Hosts that are network namespaces of this machine: each with its own network and host name.

Owns: making and removing them (root only; `why_not` says what is missing), and running commands on
one. They are connected by a cable (veth) that can be cut. Nothing of the machine's own network is
touched.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.end_to_end.launch import ENVIRONMENT
from tests.end_to_end.wire import Wire

ADDRESSES = ("10.77.0.1", "10.77.0.2")
DEADLINE = 40.0

# Its arguments: the host's name, and the command to become.
_BECOME = 'echo "$0" > /proc/sys/kernel/hostname; exec "$@"'


def why_not() -> str:
    """Why namespaces cannot be made here; "" when they can."""
    if os.geteuid() != 0:
        return "not run: network namespaces need root"
    missing = [tool for tool in ("ip", "unshare") if shutil.which(tool) is None]
    return f"not run: no {' and '.join(missing)}" if missing else _try()


def _try() -> str:
    made = subprocess.run(["unshare", "--net", "--uts", "true"], capture_output=True, text=True)
    return f"not run: {made.stderr.strip()}" if made.returncode else ""


class Hosts:
    """Two hosts, `node0` and `node1`, at ADDRESSES."""

    def __init__(self) -> None:
        self.names = [f"dtrain-{os.getpid()}-{i}" for i in range(2)]
        self._started: list[subprocess.Popen[str]] = []

    def start(self, host: int, *command: object, **environment: str) -> subprocess.Popen[str]:
        """Start a command on a host, with pipes for its output."""
        become = ["unshare", "--uts", "sh", "-c", _BECOME, f"node{host}"]
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.names[host], *become, *map(str, command)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**ENVIRONMENT, **environment},
        )
        self._started.append(process)
        return process

    def dtrun(
        self,
        host: int,
        key: Path,
        script: Path,
        *flags: object,
        args: Sequence[str] = (),
        **environment: str,
    ) -> subprocess.Popen[str]:
        """Start this host's part of a job of two nodes."""
        meeting = ["--nnodes", 2, "--node-rank", host, "--rdzv-endpoint", f"{ADDRESSES[0]}:29500"]
        head = [sys.executable, "-m", "dtrun", *meeting, "--secret-file", key]
        return self.start(host, *head, *flags, script, *args, **environment)

    def cut(self) -> None:
        """Cut the cable."""
        _ip("-n", self.names[0], "link", "set", "cable0", "down")

    def join(self) -> None:
        """Mend it."""
        _ip("-n", self.names[0], "link", "set", "cable0", "up")

    def slow(self, rate: str) -> None:
        """Let the cable carry no more than `rate`, as in "100mbit", both ways."""
        for host, name in enumerate(self.names):
            limit = ("tbf", "rate", rate, "burst", "64k", "latency", "50ms")
            device = ("dev", f"cable{host}", "root")
            made = ["tc", "-n", name, "qdisc", "add", *device, *limit]
            subprocess.run(made, check=True, capture_output=True)

    def kill(self, host: int) -> None:
        """Kill all processes of a host at once, as when its power fails; its sockets are closed."""
        pids = subprocess.run(
            ["ip", "netns", "pids", self.names[host]], check=True, capture_output=True, text=True
        )
        for pid in pids.stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def close(self) -> None:
        """End what still runs, and remove the hosts."""
        for process in self._started:
            if process.poll() is None:
                process.terminate()
                process.wait(DEADLINE)
            for pipe in (process.stdout, process.stderr):
                assert pipe is not None
                pipe.close()
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


@contextmanager
def two_hosts(wire: Wire | None = None) -> Iterator[Hosts]:
    """Two connected hosts, removed at the end; `wire` is the cable between them, and is closed."""
    hosts = Hosts()
    try:
        for name in hosts.names:
            _ip("netns", "add", name)
        if wire is None:
            # Made inside the first namespace: the names never meet those of the machine.
            peer = ["peer", "name", "cable1", "netns", hosts.names[1]]
            _ip("-n", hosts.names[0], "link", "add", "cable0", "type", "veth", *peer)
        else:
            for host, name in enumerate(hosts.names):
                _ip("link", "set", wire.names[host], "netns", name, "name", f"cable{host}")
        for host, name in enumerate(hosts.names):
            _ip("-n", name, "address", "add", f"{ADDRESSES[host]}/24", "dev", f"cable{host}")
            for device in ("lo", f"cable{host}"):
                _ip("-n", name, "link", "set", device, "up")
        yield hosts
    finally:
        if wire is not None:
            wire.close()
        hosts.close()


def ended(*processes: subprocess.Popen[str]) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of each, once all have ended."""
    told = [process.communicate(timeout=DEADLINE) for process in processes]
    return [(p.returncode, *texts) for p, texts in zip(processes, told, strict=True)]


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
