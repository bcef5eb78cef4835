"""Batch systems: what their environments say of a node, what wins over it, and real runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dtrun import placement, secret
from dtrun.cli import parse
from dtrun.placement import Place, find, hosts, outward
from dtrun.rendezvous import reserve_port
from tests.dtrun.launch import DEADLINE

SLURM = {
    "SLURM_JOB_ID": "42",
    "SLURM_STEP_ID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_STEP_NODELIST": "node[07-09,12]",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "prterun-a-1@1",
    "PMIX_RANK": "1",
}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALNRANKS": "2"}
POD = {"JOB_COMPLETION_INDEX": "2"}
MPIEXEC = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH')}")
WORD = "2 ranks work together"


@pytest.fixture
def node(tmp_path, monkeypatch):
    """The parsed flags of a dtrun that is started with these variables, and no others like it."""
    (tmp_path / "train.py").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("DTRAIN_SECRET_FILE", raising=False)
    for name in os.environ:
        if name.startswith(("PET_", "SLURM_", "OMPI_", "PMI", "MASTER_", "TORCHELASTIC_")):
            monkeypatch.delenv(name)

    def start(environ, *flags):
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        return parse([*flags, "train.py"])

    return start


@pytest.mark.parametrize(
    ("nodes", "names"),
    [
        ("node01", "node01"),
        ("a,b", "a b"),
        ("node[07-10,12]", "node07 node08 node09 node10 node12"),
        ("rack[1-2]n[03,7],login", "rack1n03 rack1n7 rack2n03 rack2n7 login"),
        ("gpu[5]-ib,x", "gpu5-ib x"),
        ("", ""),
    ],
)
def test_slurms_list_of_hosts(nodes, names):
    assert list(hosts(nodes)) == names.split()


def test_each_batch_system_is_read():
    assert find(SLURM, "") == Place("Slurm", 3, 4, "node07", "42.1.0", "node08")
    assert find(SLURM | {"SLURM_RESTART_COUNT": "2"}, "").job == "42.1.2"
    assert find(OPEN_MPI, "") == Place("MPI", 1, 4, "", "prterun-a-1@1")
    assert find(MPICH, "") == Place("MPI", 1, 2, "127.0.0.1")
    assert find(POD, "train-2.svc.ns") == Place("Kubernetes", 2, None, "train-0.svc.ns", "train")
    assert find(POD, "train-2") == Place("Kubernetes", 2, None, "")
    assert find({"PMIX_RANK": "1"}, "") == Place("MPI", 1, None, "")
    assert find({}, "host-0.domain") is None


def test_mpi_inside_of_an_allocation_finds_its_first_host(tmp_path):
    """mpiexec of a Slurm job: the step is that of its own helpers, the ranks are MPI's."""
    place = find(SLURM | OPEN_MPI, "")
    assert place == Place("MPI", 1, 4, "node07", "prterun-a-1@1", "node08")
    (tmp_path / "nodes").write_text("first\nfirst\nsecond\n")
    place = find(OPEN_MPI | {"PBS_NODEFILE": str(tmp_path / "nodes")}, "")
    assert (place.host, place.other) == ("first", "second")


def test_a_name_that_means_this_host_alone_is_replaced(monkeypatch):
    known = {"node0": "127.0.1.1", "node1": "10.0.0.1", "self": "127.0.0.1"}
    monkeypatch.setattr(placement.socket, "gethostbyname", known.__getitem__)
    assert outward("node1", "node0") == "node1"
    assert outward("node0", "127.0.0.1") == "node0"  # the other one is here, too
    assert outward("node0", "::1") == "node0"  # no such address of IPv4


def test_a_batch_script_and_a_rank_are_no_node():
    script = {name: value for name, value in SLURM.items() if "STEP" not in name}
    assert find(script | {"SLURM_NNODES": "4"}, "") is None
    assert find(SLURM | {"TORCHELASTIC_RUN_ID": "x"}, "") is None


def test_srun_needs_no_flags(node, capsys):
    spec = node(SLURM)
    assert (spec.nnodes, spec.node_rank, spec.master_addr) == (4, 3, "node07")
    assert (spec.run_id, spec.nproc) == ("42.1.0", 1)
    assert spec.master_port in placement.PORTS
    assert spec.master_port == node(SLURM | {"SLURM_PROCID": "0"}).master_port
    assert spec.master_port != node(SLURM | {"SLURM_JOB_ID": "43"}).master_port
    told = capsys.readouterr().err.splitlines()
    assert told == [
        f"dtrun: 4 nodes by Slurm (job 42.1.0), meeting at node07:{spec.master_port}",
    ] + [line for line in told if "job 43" in line]


def test_the_nodes_share_the_secret_of_their_home(node, tmp_path):
    path = tmp_path / ".local" / "state" / "dtrain" / "secret"
    assert node(SLURM).secret == path.read_bytes()
    assert len(node(SLURM).secret) == 65
    own = tmp_path / "own"
    own.write_text("x" * 40)
    own.chmod(0o600)
    assert node(SLURM, "--secret-file", str(own)).secret == b"x" * 40
    assert list(path.parent.iterdir()) == [path]


def test_a_home_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / ".local").write_text("a file")
    with pytest.raises(ValueError, match="cannot make a secret for the nodes at"):
        secret.of_home({"HOME": str(tmp_path)})


@pytest.mark.parametrize("flags", [["--standalone"], ["--nnodes", "1"]])
def test_a_node_that_is_to_be_alone_is(node, flags):
    spec = node(SLURM, *flags)
    assert (spec.nnodes, spec.node_rank, spec.master_addr) == (1, 0, "127.0.0.1")


def test_what_is_said_wins(node, monkeypatch):
    spec = node(SLURM, "--rdzv-endpoint", "head:80", "--rdzv-id", "mine", "--node-rank", "1")
    assert (spec.nnodes, spec.node_rank, spec.run_id) == (4, 1, "mine")
    assert (spec.master_addr, spec.master_port) == ("head", 80)
    assert node(SLURM, "--master-port", "81").master_port == 81
    assert node(SLURM | {"MASTER_ADDR": "other", "MASTER_PORT": "82"}).master_port == 82
    assert node({}).master_addr == "other"
    monkeypatch.setenv("PET_NNODES", "8")
    assert node({}).nnodes == 8


def test_a_changing_number_of_nodes_meets_at_the_first(node):
    spec = node(SLURM, "--nnodes", "2:4", "--max-restarts", "3")
    assert (spec.terms is not None, spec.master_addr) == (True, "node07")


def test_pods_and_bare_pmix_are_nodes_only_if_told_how_many(node, monkeypatch):
    monkeypatch.setattr(placement.socket, "getfqdn", lambda: "train-2.train.ns.svc")
    assert node(POD).nnodes == 1
    spec = node(POD, "--nnodes", "4")
    assert (spec.nnodes, spec.node_rank, spec.master_addr) == (4, 2, "train-0.train.ns.svc")
    assert spec.secret is None


def test_one_process_of_mpiexec_is_alone(node):
    assert node(MPICH | {"PMI_SIZE": "1", "PMI_RANK": "0", "MPI_LOCALNRANKS": "1"}).nnodes == 1


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        (SLURM | {"SLURM_PROCID": "two"}, "SLURM_PROCID must be a number, got 'two'"),
        (OPEN_MPI, "MPI does not say on which host node 0 is"),
    ],
)
def test_what_cannot_be_understood_is_said_in_one_line(node, capsys, environ, said):
    with pytest.raises(SystemExit):
        node(environ)
    err = capsys.readouterr().err
    assert err.startswith("dtrun: error: ")
    assert said in err
    assert err.count("\n") == 1


def test_two_tasks_of_srun_train_together(dtrun, tmp_path):
    step = SLURM | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost"}
    step |= {"SLURM_JOB_ID": str(os.getpid()), "HOME": str(tmp_path)}
    selftest = ["-m", "dtrain.distributed.selftest"]
    tasks = [dtrun.start(*selftest, env=step | {"SLURM_PROCID": str(i)}) for i in (0, 1)]
    told = [task.communicate(timeout=2 * DEADLINE) for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], told
    assert WORD in told[0][0]
    assert "2 nodes by Slurm" in told[0][1]
    assert told[1][1] == ""


@pytest.mark.skipif(MPIEXEC is None, reason="not run: no mpiexec (pip install 'dtrain[test]')")
def test_two_processes_of_mpiexec_train_together(tmp_path):
    command = [sys.executable, "-m", "dtrun", "-m", "dtrain.distributed.selftest"]
    with reserve_port("127.0.0.1") as held:
        own = {"HOME": str(tmp_path), "MASTER_PORT": str(held.getsockname()[1])}
        run = subprocess.run(
            [MPIEXEC, "-n", "2", *command],
            env=os.environ | own, capture_output=True, text=True, timeout=50, check=False,
        )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert WORD in run.stdout
    assert "2 nodes by MPI" in run.stderr
