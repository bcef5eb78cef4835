"""What to launch: the checked command line, and what each worker is given because of it.

Everything here is a pure function of its arguments. The environment is torchrun's, name for name,
plus `DTRAIN_RUN_DIR`, a directory of mode 0700 that only this attempt of this run uses.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from dtrun.membership import Terms
from dtrun.secret import Secret

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)  # torchrun's
STDOUT, STDERR = 1, 2  # bits of a redirection, as in torchrun's -r and -t
SCRIPT, MODULE, PROGRAM = "script", "module", "program"
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
BOOTSTRAP = os.path.join(os.path.dirname(os.path.abspath(__file__)), "worker.py")


class Spec(NamedTuple):
    """One launch. `redirects` and `tee` hold a bit set of STDOUT and STDERR per local rank."""

    target: str
    args: tuple[str, ...] = ()
    kind: str = SCRIPT
    nproc: int = 1
    nnodes: int = 1
    node_rank: int = 0
    master_addr: str = "127.0.0.1"
    master_port: int = 0  # 0: a free one, reserved by the launcher
    run_id: str = "none"
    role: str = "default"
    max_restarts: int = 0
    log_dir: str | None = None
    redirects: tuple[int, ...] = (0,)
    tee: tuple[int, ...] = (0,)
    shown: frozenset[int] | None = None  # local ranks seen on the console; None: all
    prefix: str = ""  # template of the console prefix, "" for none
    secret: Secret | None = None  # content of --secret-file
    local_addr: str = ""  # of this node, for ranks on others; "": the one that reaches rank 0
    data_plane: str = "curve"
    shutdown_timeout: float = 30.0  # seconds for ranks that end by themselves when told
    terms: Terms | None = None  # of nodes that meet; None: a node knows its place without
    is_head: bool | None = None  # of the meeting; None: if its address is this node's
    first_rank: int | None = None  # of this node, where nodes have different numbers of ranks
    ranks: int | None = None  # on all nodes
    stop_signals: tuple[int, ...] = STOP_SIGNALS  # what ends the run in order
    is_virtual: bool = False  # LOCAL_RANK is 0 for all
    numa_binding: str | None = None  # see `numa`
    filters: tuple[tuple[str, ...], ...] = ((), ())  # words of lines to keep, of stdout and stderr

    @property
    def world_size(self) -> int:
        """Ranks on all nodes."""
        return self.nnodes * self.nproc if self.ranks is None else self.ranks

    def rank(self, local_rank: int) -> int:
        """The global rank: nodes in the order of their node rank."""
        first = self.node_rank * self.nproc if self.first_rank is None else self.first_rank
        return first + local_rank


class Attempt(NamedTuple):
    """One start of the worker group: what differs between restarts."""

    number: int
    master_addr: str
    master_port: int
    run_dir: str
    error_dir: str
    restarts: int = 0  # failures so far; a change of nodes is another attempt, but no failure


def error_file(attempt: Attempt, local_rank: int) -> str:
    """Where a worker writes its uncaught exception, as JSON."""
    return os.path.join(attempt.error_dir, str(local_rank), "error.json")


def fault_file(attempt: Attempt, local_rank: int) -> str:
    """Where the interpreter of a worker dumps its stacks when it crashes."""
    return os.path.join(attempt.run_dir, f"fault-{local_rank}.log")


def exit_file(attempt: Attempt, rank: int) -> str:
    """Where dtrun tells the other ranks of this node how a rank ended, as JSON."""
    return os.path.join(attempt.run_dir, f"exit-{rank}")


def heeds(attempt: Attempt, local_rank: int) -> bool:
    """Whether a worker has said that it ends by itself when it is told to stop."""
    return os.path.exists(os.path.join(attempt.run_dir, f"heeds-{local_rank}"))


def any_heeds(run_dir: str) -> bool:
    """Whether a worker of any attempt has said so."""
    return any(Path(run_dir).glob("*/heeds-*"))


def environment(
    spec: Spec, attempt: Attempt, local_rank: int, base: Mapping[str, str]
) -> dict[str, str]:
    """The environment of one worker: `base` with torchrun's variables on top."""
    own = {
        "RANK": spec.rank(local_rank),
        "LOCAL_RANK": 0 if spec.is_virtual else local_rank,
        "WORLD_SIZE": spec.world_size,
        "LOCAL_WORLD_SIZE": spec.nproc,
        "GROUP_RANK": spec.node_rank,
        "GROUP_WORLD_SIZE": spec.nnodes,
        "ROLE_RANK": spec.rank(local_rank),
        "ROLE_NAME": spec.role,
        "ROLE_WORLD_SIZE": spec.world_size,
        "MASTER_ADDR": attempt.master_addr,
        "MASTER_PORT": attempt.master_port,
        "TORCHELASTIC_RESTART_COUNT": attempt.restarts,
        "TORCHELASTIC_MAX_RESTARTS": spec.max_restarts,
        "TORCHELASTIC_RUN_ID": spec.run_id,
        # Rank 0 hosts the store: the launcher only keeps its port free.
        "TORCHELASTIC_USE_AGENT_STORE": False,
        "TORCHELASTIC_ERROR_FILE": error_file(attempt, local_rank),
        "DTRAIN_RUN_DIR": attempt.run_dir,
    }
    if spec.local_addr:
        own["DTRAIN_LOCAL_ADDR"] = spec.local_addr
    if spec.is_virtual:
        own["DTRAIN_LOCAL_RANK"] = local_rank
    if spec.data_plane != "curve":
        own["DTRAIN_DATA_PLANE"] = spec.data_plane
    threads = threads_per_rank(spec.nproc, base)
    if threads is not None:
        own |= dict.fromkeys(THREAD_VARIABLES, threads)
    defaults = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "1", "PYTHONUNBUFFERED": "1"}
    return {**defaults, **base, **{name: str(value) for name, value in own.items()}}


def threads_per_rank(nproc: int, environ: Mapping[str, str]) -> int | None:
    """Compute threads each rank should use; None when alone or when the user has decided."""
    if nproc == 1 or any(name in environ for name in THREAD_VARIABLES):
        return None
    return max(1, cores() // nproc)


def cores() -> int:
    """Processors this process may run on: less than the machine's inside a container."""
    return len(os.sched_getaffinity(0))


def threads_line(nproc: int, environ: Mapping[str, str]) -> str:
    """What to tell the user about `threads_per_rank`; "" when it is left alone."""
    threads = threads_per_rank(nproc, environ)
    if threads is None:
        return ""
    return (
        f"OMP_NUM_THREADS={threads} for each rank ({cores()} cores, {nproc} ranks); "
        "set it yourself to change that"
    )


def command(spec: Spec, local_rank: int, environ: Mapping[str, str]) -> list[str]:
    """The argument vector of one worker; `${local_rank}` in an argument is its local rank."""
    python = environ.get("PYTHON_EXEC", sys.executable)
    args = [arg.replace("${local_rank}", str(local_rank)) for arg in spec.args]
    if spec.kind == PROGRAM:
        return [spec.target, *args]
    return [python, *interpreter_flags(), BOOTSTRAP, spec.kind, spec.target, *args]


def interpreter_flags() -> list[str]:
    """Flags of this interpreter (-I, -X ..., -W ...) that its workers must run with too."""
    # Private, but what multiprocessing itself hands to its children.
    flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    return flags


def prefix(spec: Spec, local_rank: int, hostname: str) -> bytes:
    """What stands before each console line of a worker; torchrun's four macros are replaced."""
    text = spec.prefix
    for name, value in (
        ("role_name", spec.role),
        ("local_rank", str(local_rank)),
        ("rank", str(spec.rank(local_rank))),
        ("hostname", hostname),
    ):
        text = text.replace(f"${{{name}}}", value)
    return text.encode()
