"""dtrun k8s and dtrun slurm: held against the schemas, given back to dtrun, and one really run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dtrun import manifests, placement, secret
from dtrun.cli import main, parse
from tests.tree import ROOT

WHY = "not run: install the extra 'test'"
jsonschema = pytest.importorskip("jsonschema", reason=WHY)
yaml = pytest.importorskip("yaml", reason=WHY)

K8S = ["k8s", "--nnodes", "4", "--nproc-per-node", "8", "train.py", "--lr", "0.1", "a b", "1e3: #"]
# Of sbatch(1): those that a manifest may use.
SBATCH = {"job-name", "nodes", "ntasks-per-node", "cpus-per-task", "mem", "time", "output"}
SBATCH |= {"partition", "signal"}
SCHEMAS = ROOT / "tests" / "recorded" / "kubernetes" / "schemas.json"


@pytest.fixture(autouse=True)
def nothing_preset(monkeypatch):
    for name in os.environ:
        if name.startswith(("PET_", "SLURM_", "OMPI_", "PMI", "MASTER_", "TORCHELASTIC_")):
            monkeypatch.delenv(name)


def printed(capsys, *argv):
    assert main(argv) == 0
    return capsys.readouterr().out


def check(document):
    """ValidationError unless the schema of its kind allows a document."""
    recorded = json.loads(SCHEMAS.read_text(encoding="utf-8"))
    schema = {"$ref": f"#/$defs/{document['kind']}", "$defs": recorded["$defs"]}
    jsonschema.Draft202012Validator(schema).validate(document)


def pod_of(document):
    spec = document["spec"]
    if document["kind"] == "JobSet":
        spec = spec["replicatedJobs"][0]["template"]["spec"]
    return spec["template"]["spec"]


VARIANTS = [
    K8S,
    ["k8s", "--jobset", "--name", "gpt", *K8S[1:]],
    ["k8s", "--claim", "ck", "--image=r/i:1", "--nnodes=2:4", "--max-restarts", "3", "-m", "a.b"],
]


@pytest.mark.parametrize("argv", VARIANTS, ids=["job", "jobset", "elastic"])
def test_manifests_keep_kubernetes_schemas(argv, capsys):
    documents = list(yaml.safe_load_all(printed(capsys, *argv)))
    kinds = [document["kind"] for document in documents]
    assert kinds == (["JobSet"] if "--jobset" in argv else ["Service", "Job"])
    for document in documents:
        check(document)


def test_the_schemas_see_what_is_wrong(capsys):
    _, job = yaml.safe_load_all(printed(capsys, *K8S))
    container = pod_of(job)["containers"][0]
    for place, name, value in (
        (job["spec"], "completion", 4),
        (job["spec"], "completions", "4"),
        (pod_of(job), "subDomain", "x"),
        (container, "name", None),
        (container["securityContext"], "readOnlyRoot", True),
    ):
        before = dict(place)
        place[name] = value
        with pytest.raises(jsonschema.ValidationError):
            check(job)
        place.clear()
        place.update(before)
    check(job)


@pytest.mark.parametrize("argv", VARIANTS[:2], ids=["job", "jobset"])
def test_a_pod_finds_its_place(argv, capsys, tmp_path, monkeypatch):
    """The command of a manifest, given to dtrun where Kubernetes would run it."""
    *_, job = yaml.safe_load_all(printed(capsys, *argv))
    words = pod_of(job)["containers"][0]["command"]
    key = tmp_path / "job.key"
    key.write_text(secret.fresh())
    key.chmod(0o600)
    here = [str(key) if word == "/run/secrets/dtrun/job.key" else word for word in words[1:]]
    (tmp_path / "train.py").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "2")
    spec = parse(here)
    assert (spec.nnodes, spec.node_rank, spec.nproc) == (4, 2, 8)
    head = {"Job": "dtrain-0.dtrain", "JobSet": "gpt-nodes-0-0.gpt"}[job["kind"]]
    assert (spec.master_addr, spec.master_port) == (head, 29500)
    assert spec.args == ("--lr", "0.1", "a b", "1e3: #")
    assert placement.find({"JOB_COMPLETION_INDEX": "2"}, "x").node_rank == 2


def test_pods_are_confined_and_hold_no_secret(capsys):
    text = printed(capsys, *K8S)
    service, job = yaml.safe_load_all(text)
    pod = pod_of(job)
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["containers"][0]["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod["containers"][0]["resources"]["limits"] == {"cpu": "4", "memory": "8Gi"}
    assert pod["subdomain"] == service["metadata"]["name"]
    # Mounted with the pod's group: dtrun takes such a file from root if others cannot read it.
    mounted = pod["volumes"][0]["secret"]
    assert mounted == {"secretName": "dtrain", "defaultMode": 0o440}
    status = os.stat_result((0o100440, 0, 0, 1, 0, 1000, 64, 0, 0, 0))
    secret.check("job.key", status) if os.geteuid() else None
    assert "kubectl create secret generic dtrain --from-file=job.key" in text


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["k8s", "train.py"], "--nnodes is needed"),
        (["k8s", "--nnodes", "2"], "no training script given"),
        (["k8s", "--nnodes", "0", "x.py"], "--nnodes must be a number"),
        (["k8s", "--name", "A_b", "--nnodes", "2", "x.py"], "--name A_b: at most 40"),
        (["k8s", "--memory", "8", "--nnodes", "2", "x.py"], "--memory must be a number with Mi"),
        (["k8s", "--cpus", "0", "--nnodes", "2", "x.py"], "--cpus must be at least 1"),
        (["slurm", "--nnodes", "2", "--node-rank", "1", "x.py"], "--node-rank is what the manif"),
        (["slurm", "--nnodes", "2", "--standalone", "x.py"], "--standalone is for one node"),
        (["slurm", "--nnodes", "2", "--nnode", "x.py"], "unknown flag --nnode; did you mean"),
        (["slurm", "--nnodes", "2", "--nproc-per-node", "x", "x.py"], "--nproc-per-node must be"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(argv, said, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1


def test_options_of_the_manifest_stand_anywhere_before_the_script(capsys):
    text = printed(capsys, "slurm", "--nnodes", "2", "-m", "--time=9", "pkg", "--time", "8")
    assert "#SBATCH --time=9\n" in text
    assert text.endswith("--nnodes 2 -m pkg --time 8\n")


@pytest.mark.parametrize(
    ("argv", "own", "rest"),
    [
        (["--a", "1", "x", "--a", "2"], ["--a", "1"], ["x", "--a", "2"]),
        (["--t", "1", "--a=1", "x"], ["--a=1"], ["--t", "1", "x"]),
        (["-s", "--b", "x", "--b"], ["--b"], ["-s", "x", "--b"]),
        (["-s", "--t=-1", "--t", "--a", "--a", "3"], ["--a", "3"], ["-s", "--t=-1", "--t", "--a"]),
        (["--unknown", "--a"], ["--a"], ["--unknown"]),
        ([], [], []),
    ],
)
def test_own_options_are_told_from_dtruns(argv, own, rest):
    mine, theirs = {"--a": True, "--b": False}, {"--t": True, "-s": False}
    assert manifests.split(argv, mine, theirs) == (own, rest)


def test_sbatch_knows_the_directives(capsys):
    text = printed(capsys, "slurm", "--partition", "p", "--nnodes", "2:4", "x.py")
    names = [line[10:].partition("=")[0] for line in text.splitlines() if "#SBATCH" in line]
    assert set(names) == SBATCH
    assert "#SBATCH --nodes=2-4\n" in text
    assert "--kill-on-bad-exit=0" in text
    assert "--kill-on-bad-exit=1" in printed(capsys, "slurm", "--nnodes", "2", "x.py")


SRUN = """#!/bin/sh
# What srun does, on this host alone: two tasks, each told its place.
while case "$1" in -*) true;; *) false;; esac; do shift; done
export SLURM_STEP_NUM_TASKS=2 SLURM_STEP_ID=0 SLURM_STEP_NODELIST=localhost
SLURM_PROCID=0 "$@" & first=$!
SLURM_PROCID=1 "$@" & second=$!
wait $first && wait $second
"""


def test_a_batch_script_runs(tmp_path, capsys):
    """sbatch's part is played by bash, srun's by two tasks on this host."""
    (tmp_path / "train.py").write_text("from dtrain.distributed.selftest import main; main()\n")
    script = printed(capsys, "slurm", "--nnodes", "2", "train.py", "it's", "$HOME")
    (tmp_path / "job.sh").write_text(script)
    (tmp_path / "srun").write_text(SRUN)
    (tmp_path / "srun").chmod(0o755)
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_CPUS_PER_TASK": "4", "PATH": path}
    run = subprocess.run(
        ["bash", "job.sh"],
        cwd=tmp_path, env=os.environ | job, capture_output=True, text=True, timeout=50, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "2 ranks work together" in run.stdout
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".key")]
