"""From the values of the flags to a `Spec`: what each may be, and how it is refused.

Pure but for a look at the script's path. Every function raises ValueError with the whole complaint:
the flag, what was expected, what was given.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket

from dtrun import meeting, numa, secret
from dtrun.spec import MODULE, PROGRAM, SCRIPT, Spec, cores

# torchrun's, for several nodes; on one node a free port is reserved.
DEFAULT_PORT, MEETING_PORT = 29500, 29400
UNHANDLED = (signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD)  # the last is how ends are seen
NO_RUN_ID = "none"  # torchrun's default
DEFAULT_PREFIX = "[rank${rank}]: "
TEMPORARY_LOGS = "dtrun_logs"


def spec_from(given: argparse.Namespace) -> Spec:
    """The launch that the parsed flags ask for."""
    nproc = ranks_per_node(given.nproc_per_node)
    least, nnodes = meeting.nodes(given.nnodes)
    addr, port = endpoint(given, least, nnodes)
    if not 0 <= given.node_rank < nnodes:
        raise ValueError(f"--node-rank must be in 0..{nnodes - 1}, got {given.node_rank}")
    restarts = at_least_0("--max-restarts", given.max_restarts)
    conf, static = meeting.conf(given.rdzv_conf), least == nnodes and given.rdzv_backend == "static"
    meets = nnodes > 1 and (restarts > 0 or not static)
    redirects = streams("--redirects", given.redirects, nproc)
    tee = streams("--tee", given.tee, nproc)
    kind = kind_of(given)
    numa.check(given.numa_binding, nproc)
    if given.logs_specs != "default":
        raise ValueError(f"--logs-specs {given.logs_specs}: only default is supported")
    filters = given.duplicate_stdout_filters, given.duplicate_stderr_filters
    return Spec(
        target=target(kind, given.training_script),
        args=tuple(given.training_script_args),
        kind=kind,
        nproc=nproc,
        nnodes=nnodes,
        node_rank=given.node_rank,
        master_addr=addr,
        master_port=port,
        run_id=run_id(given, nnodes),
        role=given.role,
        max_restarts=restarts,
        log_dir=log_dir(given.log_dir, any(redirects + tee) or any(filters)),
        redirects=redirects,
        tee=tee,
        shown=shown(given.local_ranks_filter, nproc),
        prefix=prefix(given.log_line_prefix_template, nproc),
        secret=secret.read(given.secret_file) if given.secret_file else None,
        local_addr=given.local_addr,
        data_plane=data_plane(given.data_plane),
        shutdown_timeout=shutdown_timeout(given.shutdown_timeout),
        terms=meeting.terms(conf, least, nnodes, restarts, static=static) if meets else None,
        is_head=meeting.is_host(conf, given.node_rank, static=static),
        stop_signals=stop_signals(given.signals_to_handle),
        is_virtual=given.virtual_local_rank,
        numa_binding=given.numa_binding,
        filters=(words(filters[0]), words(filters[1])),
    )


def ranks_per_node(text: str) -> int:
    """A number, or `auto` or `cpu` for one rank per core."""
    if text in ("auto", "cpu"):
        return cores()
    if text in ("gpu", "xpu"):
        raise ValueError(f"--nproc-per-node {text}: dtrain computes on CPUs; use cpu or a number")
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"--nproc-per-node must be a number from 1, auto or cpu, got {text!r}")
    return int(text)


def run_id(given: argparse.Namespace, nnodes: int) -> str:
    """--rdzv-id; on one node, where nobody else must know it, an id that no other run has."""
    if given.standalone or (nnodes == 1 and given.rdzv_id == NO_RUN_ID):
        return os.urandom(8).hex()
    return str(given.rdzv_id)


def data_plane(text: str) -> str:
    """curve or plaintext."""
    if text not in ("curve", "plaintext"):
        raise ValueError(f"--data-plane must be curve or plaintext, got {text!r}")
    return text


def at_least_0(flag: str, count: int) -> int:
    """A count."""
    if count < 0:
        raise ValueError(f"{flag} must be at least 0, got {count}")
    return count


def shutdown_timeout(seconds: float) -> float:
    """Seconds, more than none."""
    if not seconds > 0:
        raise ValueError(f"--shutdown-timeout must be more than 0 seconds, got {seconds:g}")
    return seconds


def stop_signals(text: str) -> tuple[int, ...]:
    """`SIGTERM,SIGUSR1` as numbers; those that no process can handle are refused."""
    found = []
    for name in filter(None, text.split(",")):
        number = getattr(signal, name, None) if name.startswith("SIG") else None
        if not isinstance(number, signal.Signals) or number in UNHANDLED:
            raise ValueError(f"--signals-to-handle: {name!r} is no signal that can be handled")
        found.append(int(number))
    return tuple(found)


def words(text: str) -> tuple[str, ...]:
    """`a,b,,c` as "a" and "b,c"."""
    parts = text.replace(",,", "\0").split(",")
    return tuple(part.replace("\0", ",") for part in parts if part)


def endpoint(given: argparse.Namespace, least: int, nnodes: int) -> tuple[str, int]:
    """Where nodes meet, or rank 0 is; port 0 asks for a free one, which needs a single node."""
    if given.standalone:
        if nnodes > 1:
            raise ValueError(f"--standalone is for one node, got --nnodes {given.nnodes}")
        return given.master_addr, _port("--master-port", given.master_port)
    backend = given.rdzv_backend
    if backend not in ("static", "c10d"):
        raise ValueError(f"--rdzv-backend {backend} is not supported: use static or c10d")
    addr, port = given.master_addr, _port("--master-port", given.master_port)
    if given.rdzv_endpoint:
        addr, colon, text = given.rdzv_endpoint.rpartition(":")
        addr, text = (addr, text) if colon else (text, "0")
        port = _port("--rdzv-endpoint", text)
    elif nnodes > 1 and (backend == "c10d" or least < nnodes):
        raise ValueError(f"--nnodes {given.nnodes}: nodes need --rdzv-endpoint HOST[:PORT] to meet")
    addr = addr.strip("[]")
    if nnodes > 1:
        check_reachable(addr)
    default = DEFAULT_PORT if backend == "static" else MEETING_PORT
    return addr, port or (default if nnodes > 1 else 0)


def check_reachable(name: str) -> None:
    """Refuse a name that means this node alone, as some /etc/hosts have it for the node's own.

    Digits and localhost are taken as they are, a name that is not known yet may become so.
    """
    if name == "localhost" or ":" in name or name.replace(".", "").isdecimal():
        return
    try:
        found = socket.gethostbyname(name)
    except OSError:
        return
    if found.startswith("127."):
        raise ValueError(
            f"rank 0's address {name} is {found} on this node, which no other node can reach: "
            "give it in digits, or correct /etc/hosts"
        )


def _port(flag: str, text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise ValueError(f"{flag}: a port is a number in 0..65535, got {text!r}")
    return int(text)


def streams(flag: str, text: str, nproc: int) -> tuple[int, ...]:
    """`3`, or `0:1,1:2` by local rank, as the bits of each local rank."""
    parts = [part.rpartition(":") for part in text.split(",")]
    for rank, colon, bits in parts:
        if bits not in ("0", "1", "2", "3") or not (rank.isdecimal() if colon else text == bits):
            raise ValueError(f"{flag} must be 0, 1, 2 or 3, or like 0:1,1:3, got {text!r}")
        _check_local_rank(flag, rank or "0", nproc)
    if parts[0][0] == "":
        return (int(text),) * nproc
    chosen = {int(rank): int(bits) for rank, _, bits in parts}
    return tuple(chosen.get(local_rank, 0) for local_rank in range(nproc))


def shown(text: str, nproc: int) -> frozenset[int] | None:
    """`0,2`: the local ranks seen on the console; None for all."""
    if not text:
        return None
    for rank in text.split(","):
        _check_local_rank("--local-ranks-filter", rank, nproc)
    return frozenset(map(int, text.split(",")))


def _check_local_rank(flag: str, text: str, nproc: int) -> None:
    if not text.isdecimal() or int(text) >= nproc:
        raise ValueError(f"{flag}: local ranks are 0..{nproc - 1}, got {text!r}")


def prefix(template: str | None, nproc: int) -> str:
    """The flag, torchrun's variable, or the default, which one rank alone does not need."""
    if template is None:
        template = os.environ.get("TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE")
    if template is None:
        template = DEFAULT_PREFIX if nproc > 1 else ""
    return template


def log_dir(path: str | None, needed: bool) -> str | None:
    """Where log files go; a temporary place when streams are to be kept and none is named."""
    if path is not None and os.path.exists(path) and not os.path.isdir(path):
        raise ValueError(f"--log-dir {path} is not a directory")
    if path is None and needed:
        return os.path.join(os.environ.get("TMPDIR", "/tmp"), TEMPORARY_LOGS)
    return path


def kind_of(given: argparse.Namespace) -> str:
    """A script, a module or a program."""
    if given.run_path:
        return SCRIPT
    if given.module and given.no_python:
        raise ValueError("--module and --no-python exclude each other")
    return MODULE if given.module else PROGRAM if given.no_python else SCRIPT


def target(kind: str, name: str | None) -> str:
    """The script, module or program, checked as far as that is possible without running it."""
    if name is None:
        raise ValueError("no training script given; see dtrun --help")
    if kind == PROGRAM:
        import shutil

        if shutil.which(name) is None:
            if os.path.isfile(name) and os.path.dirname(name):
                raise ValueError(f"{name} is not executable: run chmod +x {name}")
            raise ValueError(f"no such program: {name}")
    elif kind == SCRIPT:
        if os.path.isdir(name):
            raise ValueError(f"{name} is a directory, a Python script is needed")
        if not os.path.exists(name):
            raise ValueError(f"no such script: {name}")
        if not os.access(name, os.R_OK):
            raise ValueError(f"cannot read the script {name}")
    return name
