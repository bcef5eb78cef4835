"""The environment a launcher gives to its workers, parsed once: `LaunchEnv` and `rendezvous`.

The names are torchrun's; dtrun adds `DTRAIN_RUN_DIR`. Nothing is read on import.

How ranks meet under `env://`: rank 0 hosts the store and binds (MASTER_ADDR, MASTER_PORT); the
others connect and retry until it is there. On one node dtrun keeps the port for the whole run: it
holds a bound socket with SO_REUSEADDR that never listens, so the kernel gives the port to nobody
else while rank 0, whose socket sets SO_REUSEADDR too (ZeroMQ's always do), may bind and listen.
Nothing is handed over, and the same two lines work under any launcher:

    meeting = rendezvous(rank, world_size)      # explicit arguments win over the environment
    store = TCPStore(meeting.master_addr, meeting.master_port, meeting.world_size, meeting.is_host)

`run_dir` is empty when the ranks start, of mode 0700, shared by the ranks of one host in one
attempt (a restart gets another) and removed at the end by dtrun: the place for unix sockets. Its
path is shorter than 90 bytes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = [
    "LaunchEnv",
    "Rendezvous",
    "data_plane",
    "is_launched",
    "local_addr",
    "rendezvous",
    "run_identity",
    "stall_warning",
    "trace_folder",
]


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """Who meets where: what `init_process_group` needs to open the store."""

    rank: int
    world_size: int
    master_addr: str
    master_port: int

    @property
    def is_host(self) -> bool:
        """Whether this rank binds the address; the others connect to it."""
        return self.rank == 0


@dataclass(frozen=True, slots=True)
class LaunchEnv:
    """What a launcher told this worker. Without dtrun or torchrun the optional fields are None."""

    rank: int
    world_size: int
    master_addr: str
    master_port: int
    local_rank: int | None = None
    local_world_size: int | None = None
    group_rank: int | None = None  # of this node
    group_world_size: int | None = None  # nodes
    role_name: str | None = None
    run_id: str | None = None
    restart_count: int = 0
    run_dir: str | None = None

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] = os.environ) -> LaunchEnv:
        """Parse `environ`; ValueError names the variable that is missing or is not a number."""
        meeting = rendezvous(environ=environ)
        return cls(
            rank=meeting.rank,
            world_size=meeting.world_size,
            master_addr=meeting.master_addr,
            master_port=meeting.master_port,
            local_rank=local_rank(environ),
            local_world_size=_optional_integer(environ, "LOCAL_WORLD_SIZE"),
            group_rank=_optional_integer(environ, "GROUP_RANK"),
            group_world_size=_optional_integer(environ, "GROUP_WORLD_SIZE"),
            role_name=environ.get("ROLE_NAME"),
            run_id=environ.get("TORCHELASTIC_RUN_ID"),
            restart_count=_optional_integer(environ, "TORCHELASTIC_RESTART_COUNT") or 0,
            run_dir=environ.get("DTRAIN_RUN_DIR"),
        )


def is_launched(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether dtrun or torchrun started this process. Source: `dist.is_torchelastic_launched`."""
    return "TORCHELASTIC_RUN_ID" in environ


def local_rank(environ: Mapping[str, str] = os.environ) -> int | None:
    """Which rank of its host this is, also where LOCAL_RANK is 0 for all (--virtual-local-rank)."""
    name = "DTRAIN_LOCAL_RANK" if "DTRAIN_LOCAL_RANK" in environ else "LOCAL_RANK"
    return _optional_integer(environ, name)


def local_world_size(environ: Mapping[str, str] = os.environ) -> int | None:
    """How many ranks this host has, when a launcher said so."""
    return _optional_integer(environ, "LOCAL_WORLD_SIZE")


def stall_warning(environ: Mapping[str, str] = os.environ) -> float:
    """After how many seconds a call that waits warns: DTRAIN_STALL_WARNING, else 5; 0: never.

    ValueError for what is not a number of seconds.
    """
    text = environ.get("DTRAIN_STALL_WARNING") or "5"
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not seconds >= 0:
        raise ValueError(f"DTRAIN_STALL_WARNING must be a number of seconds, got {text!r}")
    return seconds or float("inf")


def run_identity(environ: Mapping[str, str] = os.environ) -> str:
    """What tells this attempt of this run from others; "" without a launcher."""
    if not is_launched(environ):
        return ""
    return f"{environ['TORCHELASTIC_RUN_ID']}.{environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def local_addr(environ: Mapping[str, str] = os.environ) -> str | None:
    """DTRAIN_LOCAL_ADDR: the address at which ranks on other hosts reach this one."""
    return environ.get("DTRAIN_LOCAL_ADDR") or None


def data_plane(environ: Mapping[str, str] = os.environ) -> str:
    """DTRAIN_DATA_PLANE, between ranks over TCP: "curve" (encrypted; the default), "plaintext"."""
    chosen = environ.get("DTRAIN_DATA_PLANE") or "curve"
    if chosen not in ("curve", "plaintext"):
        raise ValueError(f"DTRAIN_DATA_PLANE must be curve or plaintext, got {chosen!r}")
    return chosen


def trace_folder(environ: Mapping[str, str] = os.environ) -> str | None:
    """DTRAIN_TRACE: the folder for a timeline of the run; None: none is recorded."""
    return environ.get("DTRAIN_TRACE") or None


def rendezvous(
    rank: int | None = None,
    world_size: int | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Rendezvous:
    """Resolve `env://`: rank and world size from the arguments, else RANK and WORLD_SIZE.

    ValueError, in torch's words, for a variable that is not set; also for one that is not a number
    and for a rank outside the world.
    """
    rank = _integer(environ, "RANK") if rank is None else rank
    world_size = _integer(environ, "WORLD_SIZE") if world_size is None else world_size
    addr, port = _required(environ, "MASTER_ADDR"), _integer(environ, "MASTER_PORT")
    if not 0 <= rank < world_size:
        raise ValueError(f"RANK must be in 0..WORLD_SIZE-1, got {rank} of {world_size}")
    if not 0 < port < 65536:
        raise ValueError(f"environment variable MASTER_PORT must be in 1..65535, got {port}")
    return Rendezvous(rank, world_size, addr, port)


def _required(environ: Mapping[str, str], name: str) -> str:
    value = environ.get(name)
    if not value:  # torch, too, takes an empty variable for one that is not set
        raise ValueError(
            "Error initializing torch.distributed using env:// rendezvous: "
            f"environment variable {name} expected, but not set. "
            "Start the script with dtrun, or set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT."
        )
    return value


def _integer(environ: Mapping[str, str], name: str) -> int:
    value = _required(environ, name)
    try:
        return int(value)
    except ValueError:
        raise ValueError(f"environment variable {name} must be an integer, got {value!r}") from None


def _optional_integer(environ: Mapping[str, str], name: str) -> int | None:
    return _integer(environ, name) if environ.get(name) else None
