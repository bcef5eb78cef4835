"""Where the ranks of a run meet: a TCP port kept for rank 0, and a private directory.

The port is bound here and never listened on. Linux lets a second socket with SO_REUSEADDR bind a
port whose holder does not listen, so rank 0 (any store that sets SO_REUSEADDR, ZeroMQ's and
PyTorch's included) binds MASTER_PORT as if it were free, while the kernel gives the port to nobody
who asks for "a free one", neither by bind(0) nor by connect(). Nothing is probed and let go: no
race. The directory has mode 0700 and is empty at the start of each attempt; one that is left over,
because a whole run was killed at once, goes when the next run starts.
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Mapping
from pathlib import Path

# A unix socket's path holds 107 bytes; leave some for the names below the run directory.
LONGEST_BASE = 60
RUN_FILE = "run-id"  # in a run directory: which run that is


def reserve_port(host: str, port: int = 0) -> socket.socket:
    """Hold `port` (0: a free one) of the local address `host` until the socket is closed.

    Raises OSError when `host` is not an address of this machine or somebody listens there.
    """
    holder = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind((host, port))
    except OSError:
        holder.close()
        raise
    return holder


def end_of(host: str, port: int) -> str:
    """Host and port as one text, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def make_run_dir(environ: Mapping[str, str]) -> str:
    """A new directory only its owner can enter, under XDG_RUNTIME_DIR, TMPDIR or /tmp."""
    wished = [environ[name] for name in ("XDG_RUNTIME_DIR", "TMPDIR") if environ.get(name)]
    fitting = [base for base in map(os.path.abspath, wished) if _fits(base)]
    path = os.path.join([*fitting, "/tmp"][0], f"dtrun-{os.urandom(6).hex()}")
    os.mkdir(path, 0o700)
    return path


def claim(run_dir: str) -> None:
    """Mark a directory as used for as long as this process, or one it forks, is alive.

    The lock goes with the last of them, however it ends. It is taken before anything is in there.
    """
    descriptor = os.open(run_dir, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(descriptor, fcntl.LOCK_SH)


def remove_leftovers(base: str) -> None:
    """Remove the directories of runs whose every process was killed at once, and no others.

    A run's are known by their name and their RUN_FILE: `dtrun-results` may be somebody's own.
    """
    for path in Path(base).glob(f"dtrun-{'[0-9a-f]' * 12}/{RUN_FILE}"):
        folder = path.parent
        try:
            if folder.stat().st_uid != os.geteuid():
                continue
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:  # another one was quicker
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove_run_dir(str(folder))
        except BlockingIOError:
            pass  # somebody lives there
        finally:
            os.close(descriptor)


def _fits(base: str) -> bool:
    return len(base) <= LONGEST_BASE and os.access(base, os.W_OK | os.X_OK)


def remove_run_dir(path: str) -> None:
    """Remove the run directory; whoever of launcher and keeper comes second finds it gone."""
    import shutil

    shutil.rmtree(path, ignore_errors=True)
