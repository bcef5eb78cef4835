"""Runs that succeed: environment, prefixes, files, restarts, odd standard streams."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.dtrun.launch import DEADLINE, read_lines


def test_two_ranks_get_torchruns_environment_and_prefixed_lines(dtrun):
    script = dtrun.script("import json; print(json.dumps(dict(os.environ)))")
    run = dtrun.run("--standalone", "--nproc-per-node", "2", script)
    assert run.returncode == 0
    assert run.stderr.startswith("dtrun: OMP_NUM_THREADS=")
    assert run.stderr.count("\n") == 1
    lines = dict(line.split(" ", 1) for line in run.stdout.splitlines())
    envs = [json.loads(lines[f"[rank{rank}]:"]) for rank in range(2)]
    assert [env["RANK"] for env in envs] == ["0", "1"]
    assert {env["WORLD_SIZE"] for env in envs} == {"2"}
    for name in ("MASTER_ADDR", "MASTER_PORT", "DTRAIN_RUN_DIR", "TORCHELASTIC_RUN_ID"):
        assert envs[0][name] == envs[1][name] != ""


def test_one_rank_looks_like_plain_python(dtrun):
    script = dtrun.script("print('hi', sys.argv); print('warn', file=sys.stderr)")
    run = dtrun.run(script, "-m", "2")
    assert (run.returncode, run.stderr) == (0, "warn\n")
    assert run.stdout == "hi ['train.py', '-m', '2']\n"


def test_rank_0_binds_the_master_port_and_others_reach_it(dtrun):
    script = dtrun.script(
        """
        import socket
        address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        if rank == 0:
            server = socket.create_server(address)
            server.settimeout(10)
            server.accept()[0].sendall(b"hello")
        else:
            deadline = time.monotonic() + 10
            while True:
                try:
                    client = socket.create_connection(address, 10)
                    break
                except ConnectionRefusedError:
                    assert time.monotonic() < deadline
            print(client.recv(5).decode())
        """
    )
    run = dtrun.run("--nproc-per-node", "2", script)
    assert (run.returncode, run.stdout) == (0, "[rank1]: hello\n")


def test_two_nodes_count_their_ranks_through(dtrun):
    script = dtrun.script("print(rank, os.environ['MASTER_PORT'], os.environ['GROUP_RANK'])")
    flags = ("--nnodes", "2", "--nproc-per-node", "2", "--master-port", "4711", "--node-rank")
    run = dtrun.run(*flags, "1", script)
    assert sorted(run.stdout.splitlines()) == ["[rank2]: 2 4711 1", "[rank3]: 3 4711 1"]


def test_a_module_and_a_program(dtrun):
    (dtrun.folder / "pkg").mkdir()
    dtrun.script("print(__name__, sys.argv[1:], sys.path[0] == os.getcwd())", "pkg/__main__.py")
    run = dtrun.run("-m", "pkg", "--x")
    assert (run.returncode, run.stdout) == (0, "__main__ ['--x'] True\n")
    run = dtrun.run("--no-python", "sh", "-c", "echo $RANK ${local_rank}")
    assert (run.returncode, run.stdout) == (0, "0 0\n")


def test_tee_and_redirect_write_torchruns_files(dtrun):
    script = dtrun.script("print('out', rank); print('err', rank, file=sys.stderr)")
    flags = ("--nproc-per-node", "2", "--log-dir", "logs", "--rdzv-id", "job")
    run = dtrun.run(*flags, "-r", "1", "-t", "1:3", script)
    assert run.stdout == "[rank1]: out 1\n"
    assert "[rank0]: err 0\n" in run.stderr
    (log,) = (dtrun.folder / "logs").glob("job_*/attempt_0")
    files = {str(path.relative_to(log)): path.read_text() for path in log.glob("*/*")}
    assert files == {
        "0/stdout.log": "out 0\n",
        "1/stdout.log": "out 1\n",
        "1/stderr.log": "err 1\n",
    }


def test_a_filter_hides_the_other_ranks(dtrun):
    script = dtrun.script("print('out', rank)")
    run = dtrun.run("--nproc-per-node", "3", "--local-ranks-filter", "1", script)
    assert run.stdout == "[rank1]: out 1\n"


def test_much_output_arrives_complete_and_in_order(dtrun):
    script = dtrun.script("for n in range(20000): print(rank, n)\nsys.stdout.flush(); os._exit(0)")
    lines = dtrun.run("--nproc-per-node", "2", script).stdout.splitlines()
    for rank in range(2):
        mine = [line for line in lines if line.startswith(f"[rank{rank}]: ")]
        assert mine == [f"[rank{rank}]: {rank} {n}" for n in range(20000)]


def test_a_prompt_is_seen_before_its_line_ends(dtrun):
    script = dtrun.script(
        """
        if rank == 0:
            print("name? ", end="", flush=True)
            print("hello", sys.stdin.readline())
        else:
            assert sys.stdin.read() == ""
        """
    )
    process = dtrun.start("--nproc-per-node", "2", script, stdin=subprocess.PIPE)
    prompt = os.read(process.stdout.fileno(), 100)
    assert prompt == b"[rank0]: name? "
    out, _ = process.communicate("you\n", timeout=DEADLINE)
    assert out.startswith("hello you")
    assert process.returncode == 0


def test_a_restart_gives_every_rank_another_try(dtrun):
    script = dtrun.script(
        """
        count = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
        print("try", count, os.listdir(os.environ["DTRAIN_RUN_DIR"]) != [], flush=True)
        if rank == 1 and count < 2:
            raise ValueError(f"attempt {count}")
        """
    )
    run = dtrun.run("--nproc-per-node", "2", "--max-restarts", "3", script)
    assert run.returncode == 0
    assert sorted({line[9:14] for line in run.stdout.splitlines()}) == ["try 0", "try 1", "try 2"]
    assert run.stderr.count("FAILED") == 2
    assert "ValueError: attempt 1" in run.stderr
    assert "dtrun: restart 2 of 3 of all workers" in run.stderr


def test_what_a_worker_leaves_in_the_background_is_ended_and_said(dtrun):
    script = dtrun.script(
        """
        import subprocess
        subprocess.Popen(["sleep", "100"], start_new_session=True)
        """
    )
    run = dtrun.run(script)
    assert run.returncode == 0
    assert "dtrun: ended 1 process(es) that the workers left behind" in run.stderr


@pytest.mark.parametrize("closed", [(0,), (0, 1), (0, 1, 2)])
def test_closed_standard_streams_are_no_trouble(dtrun, closed):
    script = dtrun.script("print('out'); open(f'{rank}.txt', 'w').write(sys.stdin.read())")
    closing = " ".join(f"{fd}{'<' if fd == 0 else '>'}&-" for fd in closed)
    line = f"{sys.executable} -m dtrun --nproc-per-node 2 {script} {closing}"
    run = subprocess.run(["sh", "-c", line], cwd=dtrun.folder, timeout=DEADLINE, check=False)
    assert run.returncode == 0
    assert [(dtrun.folder / f"{rank}.txt").read_text() for rank in range(2)] == ["", ""]


def test_a_reader_that_stops_reading_does_not_stop_the_run(dtrun):
    script = dtrun.script("for n in range(50000): print(n)\nopen(f'{rank}.txt', 'w').close()")
    process = dtrun.start("--nproc-per-node", "2", script)
    read_lines(process, 1)
    process.stdout.close()
    assert process.wait(DEADLINE) == 0
    assert (dtrun.folder / "0.txt").exists()
    assert (dtrun.folder / "1.txt").exists()
    process.stdout = None


def test_the_flags_of_the_interpreter_are_passed_on(dtrun):
    dtrun.script("print(sys.flags.utf8_mode, sys.flags.no_user_site, sys.warnoptions)")
    flags = ["-X", "utf8", "-s", "-W", "ignore::UserWarning"]
    line = [sys.executable, *flags, "-m", "dtrun", "train.py"]
    run = subprocess.run(
        line, cwd=dtrun.folder, capture_output=True, text=True, timeout=DEADLINE, check=True
    )
    assert run.stdout == "1 1 ['ignore::UserWarning']\n"
