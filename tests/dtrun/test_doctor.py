"""dtrun doctor: every check passes where nothing is wrong, and sees a fault that is put in."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys

import pytest

from dtrun import doctor, findings
from dtrun.cli import main
from dtrun.findings import FAILED, OK, WARNING, Finding

FACTS = {
    "dtrain": "1.0",
    "zmq": "4.3",
    "zmq_curve": True,
    "packages": {"numpy": "2.0"},
    "blas": [{"internal_api": "openblas", "version": "0.3", "architecture": "Zen"}],
    "products_exact": True,
    "variables": {},
    "unknown_variables": {},
    "processor": "some",
    "cores_usable": 4,
    "processor_quota": None,
    "memory_available": 3 << 30,
    "memory_limit": None,
}


def raises(number):
    def probe(*arguments):
        raise OSError(number, os.strerror(number))

    return probe


def raises_this(error):
    def probe(*arguments, **options):
        raise error

    return probe


def addresses(**known):
    return lambda name: known[name]


class Slow:
    """A resolver that takes 2 s a name, on a clock of its own."""

    now = 0.0

    def __call__(self, name):
        Slow.now += 2.0
        return "10.0.0.1" if name == "vm" else "127.0.0.1"


# What is broken: (the check, with what, how bad it is, what is said).
HOST_FAULTS = [
    (findings.python, {"version": (3, 10)}, FAILED, "3.10"),
    (findings.loopback, {"host": "192.0.2.1"}, FAILED, "192.0.2.1 cannot be used"),
    (findings.names, {"name": "vm", "resolve": raises(2)}, WARNING, "vm, this host's name, is not"),
    (
        findings.names,
        {"name": "vm", "resolve": addresses(localhost="127.0.0.1", vm="127.0.1.1")},
        WARNING,
        "vm, this host's name, is 127.0.1.1",
    ),
    (
        findings.names,
        {"name": "vm", "resolve": addresses(localhost="10.1.1.1", vm="10.0.0.1")},
        FAILED,
        "localhost is 10.1.1.1",
    ),
    (findings.names, {"name": "vm", "resolve": Slow()}, WARNING, "4.0 s to resolve"),
    (findings.shared_memory, {"size": 1 << 62}, FAILED, "cannot be had"),
    (findings.open_files, {"limit": 100}, WARNING, "enough for 10 ranks"),
    (findings.open_files, {"limit": 30}, FAILED, "enough for 0 ranks"),
    (findings.processes, {"limit": 100}, WARNING, "100 threads"),
    (findings.children, {"watch": raises(1)}, FAILED, "Operation not permitted"),
    (findings.clock, {"read": lambda: (False, 16.0)}, WARNING, "not synchronised"),
    (findings.clock, {"read": raises(1)}, WARNING, "its state cannot be read"),
    (findings.clock, {"now": lambda: 0.0}, WARNING, "it says 1970-01-01"),
    (findings.compiler, {"environ": {"CC": "no-such-cc", "PATH": "/"}}, WARNING, "no-such-cc"),
    (findings.secret_file, {"environ": {"DTRAIN_SECRET_FILE": "/none"}}, FAILED, "/none: No such"),
]
# These need a fault of their own making; see the tests below.
ELSEWHERE = {findings.meeting_port, findings.run_directory}

LIBRARY_FAULTS = [
    (doctor.library, {"error": "No module named 'numpy'"}, FAILED, "No module named 'numpy'"),
    (doctor.library, {"zmq_curve": False}, WARNING, "without CURVE"),
    (doctor.blas, {"products_exact": False}, FAILED, "products are wrong (openblas 0.3)"),
    (doctor.blas, {"blas": []}, WARNING, "NumPy uses none"),
    (doctor.blas, {"variables": {"OPENBLAS_CORETYPE": "Core2"}}, WARNING, "held to the kernels"),
    (doctor.processors, {"processor_quota": 1.5}, WARNING, "4 cores, but a limit to the time of 1"),
    (doctor.memory, {"memory_available": 1 << 20, "memory_limit": 1 << 30}, WARNING, "1.0 GiB"),
    (doctor.memory, {"memory_available": None}, WARNING, "cannot be read"),
]


@pytest.mark.parametrize(("check", "broken", "state", "said"), HOST_FAULTS)
def test_a_fault_of_the_host_is_seen(check, broken, state, said, monkeypatch):
    monkeypatch.setattr(findings.time, "monotonic", lambda: Slow.now)
    found = check(**broken)
    assert (found.state, said in found.what) == (state, True), found
    assert found.remedy


@pytest.mark.parametrize(("check", "broken", "state", "said"), LIBRARY_FAULTS)
def test_a_fault_of_the_library_is_seen(check, broken, state, said):
    found = check(FACTS | broken)
    assert (found.state, said in found.what) == (state, True), found
    assert found.remedy
    assert check(FACTS).state == OK


def test_a_misspelt_variable_is_seen():
    environ = {"PET_NPROC_PER_NOD": "2", "PET_NNODES": "1", "PET_RUN_PATH": ""}
    found = doctor.variables(FACTS | {"unknown_variables": {"DTRAIN_X": ""}}, environ)
    assert (found.state, found.what) == (WARNING, "nothing reads DTRAIN_X, PET_NPROC_PER_NOD")
    assert found.remedy == "did you mean PET_NPROC_PER_NODE instead of PET_NPROC_PER_NOD?"
    assert doctor.variables(FACTS, {"PET_NNODES": "1"}).state == OK


def test_every_check_has_a_fault():
    assert {check for check, *_ in HOST_FAULTS} | ELSEWHERE == set(findings.HOST)


def test_checks_pass_where_nothing_is_wrong(tmp_path, monkeypatch):
    known = addresses(localhost="127.0.0.1", vm="10.0.0.1")
    assert findings.names("vm", known) == Finding("names", OK, "vm is 10.0.0.1")
    assert findings.clock(lambda: (True, 0.25)).what.startswith("synchronised, within 0.250 s")
    assert findings.open_files(1024).what == "1024 a process, enough for 164 ranks on this host"
    assert findings.processes(4096).state == OK
    key = tmp_path / "job.key"
    key.write_text("a" * 32)
    key.chmod(0o600)
    assert findings.secret_file({"DTRAIN_SECRET_FILE": str(key)}).state == OK
    key.chmod(0o644)
    assert "DTRAIN_SECRET_FILE" in findings.secret_file({"DTRAIN_SECRET_FILE": str(key)}).what


def test_the_kernel_is_asked_for_its_clock():
    synchronised, bound = findings.kernel_clock()
    assert synchronised in (True, False)
    assert 0 <= bound <= 3600


def test_a_port_in_use_is_seen():
    with socket.socket() as busy:  # SO_REUSEADDR is not set: the port is this socket's alone
        busy.bind(("127.0.0.1", 0))
        port = busy.getsockname()[1]
        found = findings.meeting_port(port)
    assert found.state == WARNING
    assert found.what == f"{port}, where several nodes meet by default, is in use here"
    assert findings.meeting_port(port).state == OK


def test_the_way_to_node_0_is_looked_at(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as head:
        port = head.getsockname()[1]
        found = findings.endpoint("127.0.0.1", port)
        there = f"127.0.0.1:{port} is 127.0.0.1 and answers"
        assert found.what == f"{there}; the way there starts at 127.0.0.1"
    found = findings.endpoint("127.0.0.1", port)
    assert (found.state, found.what) == (OK, f"127.0.0.1:{port} is there; nobody listens yet")
    for error, said in (
        (socket.gaierror(-2, "Name or service not known"), "node0 is not resolved: Name or"),
        (TimeoutError("timed out"), "node0:1 cannot be reached from here: timed out"),
        (OSError(113, "No route to host"), "No route to host"),
    ):
        monkeypatch.setattr(findings.socket, "create_connection", raises_this(error))
        found = findings.endpoint("node0", 1)
        assert (found.state, said in found.what) == (FAILED, True), found
        assert found.remedy


@pytest.mark.parametrize(
    ("text", "asked"),
    [("n0:81", ("n0", 81)), ("n0", ("n0", 29500)), ("[::1]:82", ("::1", 82))],
)
def test_the_endpoint_is_asked_for_when_it_is_named(monkeypatch, text, asked):
    monkeypatch.setattr(findings, "HOST", ())
    monkeypatch.setattr(doctor, "library_facts", lambda environ: {"error": "-"})
    monkeypatch.setattr(findings, "endpoint", lambda host, port: (host, port))
    assert next(doctor.examine({}, text)) == asked
    assert [found.check for found in doctor.examine({})] == ["library"]


def test_somebody_who_answers_at_our_port_is_seen(monkeypatch):
    class Proxy:
        def close(self):
            pass

    monkeypatch.setattr(findings.socket, "create_connection", lambda *_, **__: Proxy())
    assert "somebody else answers" in findings.loopback().what
    monkeypatch.undo()
    assert findings.loopback().state == OK


def test_a_run_directory_that_cannot_be_used_is_seen(tmp_path, monkeypatch):
    environ = {"XDG_RUNTIME_DIR": str(tmp_path)} if len(str(tmp_path)) <= 60 else {}
    assert findings.run_directory(environ).state == OK
    monkeypatch.setattr(findings.os, "posix_fallocate", raises(28))
    assert "No space left" in findings.run_directory(environ).what
    monkeypatch.undo()

    def open_to_all(environ):
        os.mkdir(tmp_path / "run")
        (tmp_path / "run").chmod(0o755)
        return str(tmp_path / "run")

    monkeypatch.setattr(findings, "make_run_dir", open_to_all)
    found = findings.run_directory(environ)
    assert (found.state, "mode 0755, not 0700" in found.what) == (FAILED, True)
    assert list(tmp_path.iterdir()) == []


def test_a_compiler_is_judged_by_what_it_makes(tmp_path):
    liar = tmp_path / "cc"
    liar.write_text("#!/bin/sh\necho no licence >&2\nexit 3\n")
    liar.chmod(0o755)
    found = findings.compiler({"CC": str(liar), "PATH": os.environ["PATH"]})
    assert (found.state, found.what) == (WARNING, f"{liar} does not work: no licence")
    liar.write_text("#!/bin/sh\nexit 0\n")
    assert "does not work" in findings.compiler({"CC": str(liar), "PATH": os.environ["PATH"]}).what


def limited():
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))  # no 16 MiB of shared memory
    resource.setrlimit(resource.RLIMIT_NOFILE, (120, 120))


@pytest.mark.timeout(180)
def test_the_command_looks_prints_and_judges(tmp_path):
    """Twice for real: as things are, and with limits and a NumPy that does not load."""
    broken = tmp_path / "broken" / "numpy"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('numpy is broken')\n")
    command = [sys.executable, "-m", "dtrun", "doctor"]
    plain = {k: v for k, v in os.environ.items() if k != "DTRAIN_SECRET_FILE"}
    runs = [
        subprocess.run(
            command, env=plain | extra, preexec_fn=limit, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=120, check=False,
        )
        for extra, limit in (({}, None), ({"PYTHONPATH": str(broken.parent)}, limited))
    ]  # fmt: skip
    well, ill = (run.stdout for run in runs)
    assert [run.returncode for run in runs] == [0, 1], (well, ill)
    assert "0 failed" in well.splitlines()[-1]
    assert "two ranks" in well
    assert "2 ranks work together" in well
    failed = [line.split()[1] for line in ill.splitlines() if line.startswith("failed")]
    assert failed == ["run", "shared", "library"], ill
    assert "ImportError: numpy is broken" in ill
    assert "warning  open files     120 a process" in ill
    assert all(len(line) <= doctor.WIDTH for line in (well + ill).splitlines())


def test_ranks_that_do_not_meet_are_reported(monkeypatch):
    err = "x\ndtrain.errors.PeerLost: rank 1 is gone\nlast\n"
    monkeypatch.setattr(doctor, "_run", lambda *_: (1, "", err))
    found = doctor.two_ranks({})
    assert (found.state, found.what) == (FAILED, "dtrain.errors.PeerLost: rank 1 is gone")


def test_a_process_that_does_not_end_or_start_is_said_to_be_so(monkeypatch):
    monkeypatch.setattr(doctor, "PATIENCE_SECONDS", 0.1)
    code, _, err = doctor._run(["sleep", "30"], os.environ)
    assert (code, err) == (126, "no end after 0 s: sleep 30")
    facts = doctor.library_facts(os.environ | {"PYTHON_EXEC": "/no/python"})
    assert "/no/python" in facts["error"]


def test_the_summary_counts_and_the_exit_code_follows(monkeypatch, capsys):
    found = [Finding("a", OK, "x"), Finding("b", WARNING, "y", "do this")]
    monkeypatch.setattr(doctor, "examine", lambda *_: iter(found))
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "ok       a              x",
        "warning  b              y",
        "                        -> do this",
        "2 checks: 1 ok, 1 warning, 0 failed",
    ]
    found.append(Finding("c", FAILED, "z", "do that"))
    assert main(["doctor"]) == 1
