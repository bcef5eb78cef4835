"""What a worker is given: environment, argument vector, prefix; and where the ranks meet."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys

import pytest

from dtrun import spec as specs
from dtrun.rendezvous import (
    LONGEST_BASE,
    RUN_FILE,
    make_run_dir,
    remove_leftovers,
    remove_run_dir,
    reserve_port,
)
from dtrun.spec import MODULE, PROGRAM, Attempt, Spec

ATTEMPT = Attempt(
    number=5,
    master_addr="127.0.0.1",
    master_port=4711,
    run_dir="/r/2",
    error_dir="/e",
    restarts=2,
)
TWO_NODES = Spec(
    "t.py", nproc=2, nnodes=2, node_rank=1, role="trainer", run_id="id", max_restarts=3
)


def test_the_environment_is_torchruns():
    found = specs.environment(TWO_NODES, ATTEMPT, local_rank=1, base={"PATH": "/bin"})
    threads = {name: found.pop(name) for name in specs.THREAD_VARIABLES}
    assert set(threads.values()) == {str(max(1, specs.cores() // 2))}
    assert found == {
        "PATH": "/bin",
        "RANK": "3",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "4",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "1",
        "GROUP_WORLD_SIZE": "2",
        "ROLE_RANK": "3",
        "ROLE_NAME": "trainer",
        "ROLE_WORLD_SIZE": "4",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "4711",
        "TORCHELASTIC_RESTART_COUNT": "2",
        "TORCHELASTIC_MAX_RESTARTS": "3",
        "TORCHELASTIC_RUN_ID": "id",
        "TORCHELASTIC_USE_AGENT_STORE": "False",
        "TORCHELASTIC_ERROR_FILE": "/e/1/error.json",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        "PYTHONUNBUFFERED": "1",
        "DTRAIN_RUN_DIR": "/r/2",
    }


def test_a_stale_rank_is_replaced_and_a_choice_of_the_user_kept():
    base = {"RANK": "77", "MASTER_PORT": "1", "PYTHONUNBUFFERED": ""}
    found = specs.environment(TWO_NODES, ATTEMPT, 0, base)
    assert (found["RANK"], found["MASTER_PORT"], found["PYTHONUNBUFFERED"]) == ("2", "4711", "")


@pytest.mark.parametrize(
    ("nproc", "cores", "environ", "threads"),
    [
        (1, 8, {}, None),
        (2, 8, {}, 4),
        (3, 8, {}, 2),
        (9, 8, {}, 1),
        (2, 8, {"OMP_NUM_THREADS": "3"}, None),
        (2, 8, {"MKL_NUM_THREADS": "3"}, None),
    ],
)
def test_threads_are_shared_unless_the_user_has_decided(
    nproc, cores, environ, threads, monkeypatch
):
    monkeypatch.setattr(specs, "cores", lambda: cores)
    assert specs.threads_per_rank(nproc, environ) == threads
    line = specs.threads_line(nproc, environ)
    assert line.startswith(f"OMP_NUM_THREADS={threads} for each rank") if threads else not line


def test_cores_respect_the_affinity():
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert specs.cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)


def test_commands():
    args = ("--rank", "${local_rank}", "$HOME")
    script = specs.command(Spec("t.py", args), 1, {})
    assert script[0] == sys.executable
    assert script[-6:] == [specs.BOOTSTRAP, "script", "t.py", "--rank", "1", "$HOME"]
    other = specs.command(Spec("pkg", kind=MODULE), 0, {"PYTHON_EXEC": "/opt/python"})
    assert (other[0], other[-2:]) == ("/opt/python", ["module", "pkg"])
    assert specs.command(Spec("prog", args, kind=PROGRAM), 0, {}) == [
        "prog",
        "--rank",
        "0",
        "$HOME",
    ]


def test_the_prefix_knows_torchruns_macros():
    spec = TWO_NODES._replace(prefix="${role_name}/${local_rank}/${rank}/${hostname}/${else}: ")
    assert specs.prefix(spec, 1, "h") == b"trainer/1/3/h/${else}: "


def test_a_reserved_port_is_free_for_rank_0_alone():
    with reserve_port("127.0.0.1") as holder, socket.socket() as rank0, socket.socket() as stranger:
        address = holder.getsockname()
        with pytest.raises(OSError, match="in use"):
            stranger.bind(address)
        with pytest.raises(ConnectionRefusedError):  # nobody listens before rank 0 does
            socket.create_connection(address, timeout=5)
        rank0.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        rank0.bind(address)
        rank0.listen()
        socket.create_connection(address, timeout=5).close()


def test_a_port_that_somebody_listens_on_cannot_be_reserved():
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        pytest.raises(OSError, match="in use"),
    ):
        reserve_port(*server.getsockname())


@pytest.mark.parametrize("variable", ["XDG_RUNTIME_DIR", "TMPDIR"])
def test_the_run_dir_is_private(variable):
    base = f"/tmp/dtrun-test-{os.getpid()}"
    os.mkdir(base)
    try:
        path = make_run_dir({variable: base})
        assert os.path.dirname(path) == base
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o700
        assert os.listdir(path) == []
        open(os.path.join(path, "left"), "w").close()
        remove_run_dir(path)
        remove_run_dir(path)  # launcher and keeper both may
        assert os.listdir(base) == []
    finally:
        os.rmdir(base)


def test_only_what_a_killed_run_has_left_is_removed(tmp_path):
    """A folder of the user's own with a name like a run's stays, and so does one in use."""
    script = f"from dtrun.rendezvous import claim; claim({str(tmp_path)!r} + '/dtrun-{'b' * 12}')\n"
    for name in ("a" * 12, "b" * 12, "results", "test-1", "0123456789AB"):
        (tmp_path / f"dtrun-{name}" / "0").mkdir(parents=True)
        (tmp_path / f"dtrun-{name}" / RUN_FILE).write_text("x")
    (tmp_path / f"dtrun-{'c' * 12}" / "0").mkdir(parents=True)  # no run: it has no file of one
    command = [sys.executable, "-c", f"{script}print(flush=True); input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as living:
        assert living.stdout.readline() == b"\n"
        remove_leftovers(str(tmp_path))
        left = {path.name.removeprefix("dtrun-") for path in tmp_path.iterdir()}
        living.stdin.write(b"\n")
    assert left == {"b" * 12, "c" * 12, "results", "test-1", "0123456789AB"}
    remove_leftovers(str(tmp_path))
    assert not (tmp_path / f"dtrun-{'b' * 12}").exists()


def test_a_base_too_long_for_unix_sockets_is_not_used(tmp_path):
    long = tmp_path / ("x" * LONGEST_BASE)
    long.mkdir()
    path = make_run_dir({"XDG_RUNTIME_DIR": str(long)})
    assert os.path.dirname(path) == "/tmp"
    remove_run_dir(path)
