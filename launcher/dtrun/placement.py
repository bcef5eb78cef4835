"""Where this node stands, by the batch system that started dtrun on each: Slurm, MPI, Kubernetes.

Owns: reading their environments (`find`), and filling in the flags that the command line, or a PET_
variable, does not say (`settle`). Rules: 1. what is said wins; `--standalone`, `--nnodes 1` and a
dtrun inside of a rank ask nobody. 2. A node is one dtrun that the batch system started, also where
several share a host. 3. Several jobs can share a host: the port follows from the job's number.
"""

from __future__ import annotations

import argparse
import re
import socket
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from dtrun import secret

# Flags that are asked of the batch system. None stands for "not said".
ASKED = ("nnodes", "node_rank", "rdzv_endpoint", "rdzv_id", "master_addr", "master_port")
PORTS = range(15000, 30000)  # below those that the kernel hands out
Environ = Mapping[str, str]


class Place(NamedTuple):
    """What a batch system says of this node."""

    scheduler: str
    node_rank: int
    nnodes: int | None  # None: it does not say
    host: str  # of node 0; "" where it does not say
    job: str = ""  # what no other job has; "" likewise
    other: str = ""  # another host of the job; "" likewise, or if there is none


def blank(environ: Environ) -> argparse.Namespace:
    """For argparse, which keeps what is there: None for what of ASKED no PET_ variable says."""
    presets = {name: f"PET_{name.upper()}" for name in ASKED}
    return argparse.Namespace(**{n: None for n, preset in presets.items() if preset not in environ})


def settle(
    given: argparse.Namespace, default: Callable[[str], Any], environ: Environ
) -> Place | None:
    """Fill in what `given` does not say, by the batch system if there is one, else by default.

    Returns the place that was taken over. ValueError when the batch system's word is no place.
    """
    place = None if given.standalone or given.nnodes == "1" else find(environ, socket.getfqdn())
    if place is not None and place.nnodes is None and given.nnodes is None:
        place = None  # pods or processes that have nothing to do with each other
    if place is not None and (place.nnodes != 1 or given.nnodes is not None):
        _fill(given, place, environ)
    else:
        place = None
    for name in ASKED:
        if getattr(given, name) is None:
            setattr(given, name, default(name))
    return place


def _fill(given: argparse.Namespace, place: Place, environ: Environ) -> None:
    if given.nnodes is None:
        given.nnodes = str(place.nnodes)
    if given.node_rank is None:
        given.node_rank = place.node_rank
    if given.rdzv_id is None and place.job:
        given.rdzv_id = place.job
    if given.rdzv_endpoint is None and given.master_addr is None:
        host = environ.get("MASTER_ADDR") or place.host
        if not host:
            raise ValueError(
                f"{place.scheduler} does not say on which host node 0 is: give its address with "
                "--rdzv-endpoint HOST:PORT, or in MASTER_ADDR"
            )
        host = outward(host, place.other) if place.node_rank == 0 and place.other else host
        port = given.master_port or environ.get("MASTER_PORT") or _port(place)
        given.rdzv_endpoint = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    if not given.secret_file and place.scheduler != KUBERNETES:
        given.secret_file = secret.of_home(environ)


def line(place: Place, nnodes: str, addr: str, port: int) -> str:
    """What node 0 says of it."""
    job = f" (job {place.job})" if place.job else ""
    return f"{nnodes} nodes by {place.scheduler}{job}, meeting at {addr}:{port}"


def _port(place: Place) -> int:
    """A port that follows from the job's number; 0, which means torchrun's, where it has none."""
    return PORTS[zlib.crc32(place.job.encode()) % len(PORTS)] if place.job else 0


SLURM, MPI, KUBERNETES = "Slurm", "MPI", "Kubernetes"


def find(environ: Environ, own_name: str) -> Place | None:
    """The place of this node; None without a batch system. `own_name`: of this host, in full.

    MPI's launcher is asked first: under Slurm it may itself be what Slurm has started.
    """
    if "TORCHELASTIC_RUN_ID" in environ:  # inside of a rank
        return None
    return _mpi(environ) or _slurm(environ) or _kubernetes(environ, own_name)


def _slurm(environ: Environ) -> Place | None:
    """A task of `srun`. The batch script itself is none: it has no number of tasks of its step."""
    if not environ.get("SLURM_STEP_NUM_TASKS"):
        return None
    count, rank = _number(environ, "SLURM_STEP_NUM_TASKS"), _number(environ, "SLURM_PROCID")
    again = environ.get("SLURM_RESTART_COUNT", "0")
    job = f"{environ.get('SLURM_JOB_ID', '')}.{environ.get('SLURM_STEP_ID', '')}.{again}"
    first, other = _first_two(_slurm_nodes(environ))
    return Place(SLURM, rank, count, first, job, other)


def _slurm_nodes(environ: Environ) -> str:
    return environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or ""


def hosts(nodes: str) -> Iterator[str]:
    """The names in Slurm's list of hosts: `rack[1-2]n[03,7],login` begins with rack1n03."""
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodes):
        yield from _expanded(part)


def _expanded(part: str) -> Iterator[str]:
    found = re.search(r"\[([^\]]*)\]", part)
    if found is None:
        yield part
        return
    for item in found[1].split(","):
        least, _, most = item.partition("-")
        for number in range(int(least), int(most or least) + 1):
            name = str(number).zfill(len(least))
            yield from _expanded(part[: found.start()] + name + part[found.end() :])


def _first_two(nodes: str) -> tuple[str, str]:
    names = hosts(nodes)
    return next(names, ""), next(names, "")


def outward(host: str, other: str) -> str:
    """`host`, which is this one; its address towards `other` if the name means only itself here.

    So it does where a distribution writes 127.0.1.1 and the name into /etc/hosts. Sends nothing.
    """
    try:
        if not socket.gethostbyname(host).startswith("127."):
            return host
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as line:
            line.connect((other, 9))
            own: str = line.getsockname()[0]
    except OSError:
        return host
    return host if own.startswith("127.") else own


def _mpi(environ: Environ) -> Place | None:
    """A process of mpiexec: Open MPI's, MPICH's and its relatives', or any over PMIx."""
    ompi = _mpi_process(
        environ, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"
    )
    mpich = _mpi_process(environ, "PMI_RANK", "PMI_SIZE", "MPI_LOCALNRANKS")
    if ompi or mpich:
        return ompi or mpich
    if environ.get("PMIX_RANK") and "SLURM_STEP_NUM_TASKS" not in environ:
        rank, job = _number(environ, "PMIX_RANK"), environ.get("PMIX_NAMESPACE", "")
        host, other = _mpi_hosts(environ)
        return Place(MPI, rank, None, host, job, other)
    return None


def _mpi_process(environ: Environ, rank: str, size: str, local_size: str) -> Place | None:
    if not environ.get(rank) or not environ.get(size):
        return None
    together = environ.get(local_size) == environ[size]
    host, other = ("127.0.0.1", "") if together else _mpi_hosts(environ)
    job = environ.get("PMIX_NAMESPACE", "")
    return Place(MPI, _number(environ, rank), _number(environ, size), host, job, other)


def _mpi_hosts(environ: Environ) -> tuple[str, str]:
    """The first host of the allocation below mpiexec, on which it starts rank 0, and another."""
    if nodes := _slurm_nodes(environ):
        return _first_two(nodes)
    try:
        with open(environ.get("PBS_NODEFILE", ""), encoding="utf-8") as file:
            names = [*dict.fromkeys(line.strip() for line in file), "", ""]
    except OSError:  # of PBS only the first host has the file
        return "", ""
    return names[0], names[1]


def _kubernetes(environ: Environ, own_name: str) -> Place | None:
    """A pod of an Indexed Job, or of a JobSet of one. How many there are, no variable says."""
    if not environ.get("JOB_COMPLETION_INDEX"):
        return None
    index = _number(environ, "JOB_COMPLETION_INDEX")
    name, dot, domain = own_name.partition(".")
    base = name.removesuffix(f"-{index}")
    host = f"{base}-0.{domain}" if dot and base != name else ""
    return Place(KUBERNETES, index, None, host, base if host else "")


def _number(environ: Environ, name: str) -> int:
    text = environ.get(name, "")
    if not text.isdecimal():
        raise ValueError(f"environment variable {name} must be a number, got {text!r}")
    return int(text)
