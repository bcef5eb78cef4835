"""`dtrun k8s` and `dtrun slurm`: a job of several nodes as a manifest, printed and nothing else.

Owns: the two commands and what they print: an Indexed Job or a JobSet with what it needs, and a
batch script. Rules: 1. the flags and the script behind the manifest's own options are dtrun's, are
checked here, and are what each node runs. 2. No secret is in a manifest. 3. Pods run as nobody
special, on a root they cannot write.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from dtrun import meeting, options

NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")  # with its suffixes at most 63, as a label
SECRET_FOLDER, KEY = "/run/secrets/dtrun", "job.key"
USER = 1000
GRACE_SECONDS = 60  # more than what dtrun gives its ranks (--shutdown-timeout)
DEFAULT_PORT = options.DEFAULT_PORT

Parse = Callable[[Sequence[str]], argparse.Namespace]


def main(kind: str, argv: Sequence[str], dtrun: argparse.ArgumentParser, parse: Parse) -> str:
    """The manifest of `kind` ("k8s" or "slurm"); ValueError says what is wrong with `argv`.

    `parse` reads the flags of `dtrun`, and ends the program for what it does not have.
    """
    parser = _parser(kind)
    mine, flags = split(argv, takes_value(parser), takes_value(dtrun))
    job = parser.parse_args(mine)
    given = parse(flags)
    _check(job, given)
    describe = kubernetes if kind == "k8s" else slurm
    return describe(job, given, flags)


def _parser(kind: str) -> argparse.ArgumentParser:
    """The manifest's own options."""
    parser = argparse.ArgumentParser(prog=f"dtrun {kind}", allow_abbrev=False)
    parser.usage = f"dtrun {kind} [options] [dtrun's flags] script [arguments] > file"
    parser.add_argument("--name", default="dtrain", help="of the job")
    parser.add_argument("--cpus", type=int, default=4, help="processors of each node (default 4)")
    parser.add_argument("--memory", default="8Gi", help="of each node (default 8Gi)")
    if kind == "k8s":
        parser.add_argument("--image", default="dtrain", help="of the container (default dtrain)")
        parser.add_argument("--jobset", action="store_true", help="a JobSet, not an Indexed Job")
        parser.add_argument("--claim", help="a volume claim for /checkpoints, shared by all nodes")
    else:
        parser.add_argument("--time", default="01:00:00", help="limit (default 01:00:00)")
        parser.add_argument("--partition", help="where to run")
    return parser


def takes_value(parser: argparse.ArgumentParser) -> dict[str, bool]:
    """{option: whether a value follows it}."""
    options = [(name, one) for one in parser._actions for name in one.option_strings]
    return {name: action.nargs != 0 for name, action in options}


def split(
    argv: Sequence[str], mine: Mapping[str, bool], theirs: Mapping[str, bool]
) -> tuple[list[str], list[str]]:
    """The manifest's own options, wherever they stand before the script; and all the rest."""
    own: list[str] = []
    rest = list(argv)
    at = 0
    while at < len(rest) and rest[at].startswith("-"):
        name, joined, _ = rest[at].partition("=")
        width = 2 if not joined and (mine.get(name) or theirs.get(name)) else 1
        if name in mine:
            own += rest[at : at + width]
            del rest[at : at + width]
        else:
            at += width
    return own, rest


def _check(mine: argparse.Namespace, given: argparse.Namespace) -> None:
    """ValueError unless the job can be described."""
    if not NAME.fullmatch(mine.name):
        raise ValueError(f"--name {mine.name}: at most 40 of a-z, 0-9 and -, a letter first")
    if mine.cpus < 1:
        raise ValueError(f"--cpus must be at least 1, got {mine.cpus}")
    if not re.fullmatch(r"[1-9][0-9]*(Mi|Gi|Ti)", mine.memory):
        raise ValueError(f"--memory must be a number with Mi, Gi or Ti, got {mine.memory!r}")
    if given.training_script is None:
        raise ValueError("no training script given")
    if given.standalone:
        raise ValueError("--standalone is for one node: start it without a manifest")
    for name in ("node_rank", "rdzv_endpoint", "master_addr", "master_port", "secret_file"):
        if getattr(given, name):
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag} is what the manifest says by itself: leave it out")
    if given.nnodes is None:
        raise ValueError("--nnodes is needed: how many nodes")
    meeting.nodes(given.nnodes)
    options.ranks_per_node(given.nproc_per_node)


# --- Kubernetes ----------------------------------------------------------------------------------


def kubernetes(mine: argparse.Namespace, given: argparse.Namespace, flags: Sequence[str]) -> str:
    """A headless service and an Indexed Job, or a JobSet, which makes the service itself."""
    head = (
        f"# (umask 077; dtrun keygen > {KEY})\n"
        f"# kubectl create secret generic {mine.name} --from-file={KEY}\n"
        "# kubectl apply -f this-file\n"
    )
    objects = [job_set(mine, given, flags)] if mine.jobset else indexed(mine, given, flags)
    return head + "---\n".join("".join(f"{line}\n" for line in yaml(one)) for one in objects)


def indexed(
    mine: argparse.Namespace, given: argparse.Namespace, flags: Sequence[str]
) -> list[dict[str, Any]]:
    """The pods are reached as NAME-INDEX.NAME: the job's hostnames in the service's domain."""
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": mine.name},
        "spec": {
            "clusterIP": "None",
            "selector": {"job-name": mine.name},
            "publishNotReadyAddresses": True,
        },
    }
    spec = _job_spec(mine, given, flags, f"{mine.name}-0.{mine.name}")
    spec["template"]["spec"]["subdomain"] = mine.name
    metadata = {"name": mine.name}
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": spec}
    return [service, job]


def job_set(
    mine: argparse.Namespace, given: argparse.Namespace, flags: Sequence[str]
) -> dict[str, Any]:
    """One job, restarted as a whole; its pods are NAME-nodes-0-INDEX.NAME."""
    spec = _job_spec(mine, given, flags, f"{mine.name}-nodes-0-0.{mine.name}")
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": mine.name},
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {"maxRestarts": given.max_restarts},
            "replicatedJobs": [{"name": "nodes", "replicas": 1, "template": {"spec": spec}}],
        },
    }


def _job_spec(
    mine: argparse.Namespace, given: argparse.Namespace, flags: Sequence[str], head: str
) -> dict[str, Any]:
    """As many pods as nodes, all at once; one that is evicted is replaced and joins again."""
    most = meeting.nodes(given.nnodes)[1]
    place = ["--rdzv-endpoint", f"{head}:{DEFAULT_PORT}", "--rdzv-id", mine.name]
    command = ["dtrun", *place, "--secret-file", f"{SECRET_FOLDER}/{KEY}", *flags]
    evicted = {
        "action": "Ignore",
        "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
    }
    return {
        "completionMode": "Indexed",
        "completions": most,
        "parallelism": most,
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [evicted]},
        "template": {"spec": _pod_spec(mine, command)},
    }


def _pod_spec(mine: argparse.Namespace, command: list[str]) -> dict[str, Any]:
    amount = {"cpu": str(mine.cpus), "memory": mine.memory}
    volumes: list[dict[str, Any]] = [
        # Owned by root, read through the group: dtrun takes no secret that others can read.
        {"name": "secret", "secret": {"secretName": mine.name, "defaultMode": 0o440}},
        {"name": "tmp", "emptyDir": {}},
    ]
    mounts = [
        {"name": "secret", "mountPath": SECRET_FOLDER, "readOnly": True},
        {"name": "tmp", "mountPath": "/tmp"},
    ]
    if mine.claim:
        volumes.append({"name": "checkpoints", "persistentVolumeClaim": {"claimName": mine.claim}})
        mounts.append({"name": "checkpoints", "mountPath": "/checkpoints"})
    container = {
        "name": "dtrun",
        "image": mine.image,
        "command": command,
        "env": [{"name": "HOME", "value": "/tmp"}],
        "resources": {"requests": amount, "limits": amount},
        "volumeMounts": mounts,
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
    }
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "fsGroup": USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": volumes,
    }


def yaml(value: Any, indent: str = "") -> Iterator[str]:
    """The lines of a mapping or a list; scalars as JSON has them, which YAML reads the same way."""
    items = value.items() if isinstance(value, dict) else (("-", one) for one in value)
    for key, one in items:
        name = key if key == "-" else f"{key}:"
        if not isinstance(one, dict | list) or not one or _flat(one):
            yield f"{indent}{name} {json.dumps(one)}"
        elif key == "-":
            first, *others = yaml(one, f"{indent}  ")
            yield f"{indent}- {first.strip()}"
            yield from others
        else:
            yield f"{indent}{name}"
            yield from yaml(one, f"{indent}  ")


def _flat(value: Any) -> bool:
    """Whether it fits into a line: a short list of scalars."""
    return isinstance(value, list) and not any(isinstance(one, dict | list) for one in value)


# --- Slurm ---------------------------------------------------------------------------------------


def slurm(mine: argparse.Namespace, given: argparse.Namespace, flags: Sequence[str]) -> str:
    """A script for sbatch; the nodes are one task of srun each, which dtrun asks for its place."""
    least, most = meeting.nodes(given.nnodes)
    amount, unit = mine.memory[:-2], mine.memory[-2]
    settings = {
        "job-name": mine.name,
        "nodes": str(most) if least == most else f"{least}-{most}",
        "ntasks-per-node": "1",
        "cpus-per-task": str(mine.cpus),
        "mem": f"{amount}{unit}",
        "time": mine.time,
        "output": "%x-%j.out",
        # A minute before the limit: ranks that ask should_stop() write their checkpoint.
        "signal": "TERM@60",
    }
    if mine.partition:
        settings["partition"] = mine.partition
    # One node's end is all nodes' end, unless the others go on without it or wait for it.
    kill = int(least == most and given.max_restarts == 0)
    directives = "".join(f"#SBATCH --{name}={value}\n" for name, value in settings.items())
    return (
        f"#!/bin/bash\n{directives}\nset -euo pipefail\n\n"
        "# The job's own secret, in a folder that the nodes share; it ends with the job.\n"
        'key="$PWD/.dtrun-$SLURM_JOB_ID.key"\n'
        "trap 'rm -f \"$key\"' EXIT\n"
        '(umask 077; dtrun keygen > "$key")\n\n'
        "# Which node is which, and where they meet, dtrun reads from Slurm.\n"
        f'srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit={kill} \\\n'
        f'  dtrun --secret-file "$key" {shlex.join(flags)}\n'
    )
