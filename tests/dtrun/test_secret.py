"""The secret of a run: made, read, refused, handed to the ranks, and shown nowhere."""

from __future__ import annotations

import base64
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from zmq.utils import z85

from dtrain.comm.security.secret import read_secret
from dtrain.errors import SecretError
from dtrun import secret
from dtrun.cli import parse

RAW = bytes(range(100, 132))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "job.key"
    path.write_text(RAW.hex() + "\n")
    path.chmod(0o600)
    return path


def test_keygen_prints_a_new_secret_that_both_sides_take(tmp_path):
    command = [sys.executable, "-m", "dtrun", "keygen"]
    one, other = (subprocess.run(command, capture_output=True, check=True) for _ in range(2))
    assert (len(one.stdout), one.stderr) == (65, b"")
    assert one.stdout != other.stdout
    path = tmp_path / "job.key"
    path.write_bytes(one.stdout)
    path.chmod(0o600)
    assert secret.read(str(path)) == one.stdout
    assert read_secret(path) == one.stdout


def spoilt(file, how):
    """Make the file unfit."""
    if how == "short":
        file.write_text("x" * 31)
    elif how == "long":
        file.write_text("x" * 5000)
    elif how == "pipe":
        file.unlink()
        os.mkfifo(file, 0o600)
    elif how == "missing":
        file.unlink()
    elif how == "folder":
        file.unlink()
        file.mkdir(mode=0o700)
    else:
        file.chmod(int(how, 8))


@pytest.mark.parametrize("how", ["short", "long", "pipe", "missing", "folder", "0644", "0620"])
def test_launcher_and_library_refuse_the_same_files(file, how):
    secret.read(str(file))
    read_secret(file)
    spoilt(file, how)
    with pytest.raises(ValueError, match=str(file)) as launcher:
        secret.read(str(file))
    with pytest.raises(SecretError, match=str(file)) as library:
        read_secret(file)
    assert ("chmod 600" in str(launcher.value)) == (how in ("0644", "0620"))
    assert ("chmod 600" in str(library.value)) == (how in ("0644", "0620"))


def test_a_refused_file_is_said_in_one_line(file, capsys):
    file.chmod(0o644)
    with pytest.raises(SystemExit) as stop:
        parse(["--secret-file", str(file), "--no-python", "true"])
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.startswith(f"dtrun: error: --secret-file {file} can be read or changed by others")
    assert said.count("\n") == 1


def test_the_path_may_come_from_the_environment(file, monkeypatch):
    monkeypatch.setenv("DTRAIN_SECRET_FILE", str(file))
    spec = parse(["--no-python", "true"])
    assert spec.secret == RAW.hex().encode() + b"\n"
    assert RAW.hex() not in repr(spec)


@pytest.mark.parametrize("text", ["plain", "", "CURVE", "none"])
def test_a_wrong_data_plane_is_refused(text, capsys):
    with pytest.raises(SystemExit):
        parse(["--data-plane", text, "--no-python", "true"])
    assert f"--data-plane must be curve or plaintext, got {text!r}" in capsys.readouterr().err


def test_the_secret_of_an_attempt_is_private_new_and_removed(dtrun):
    script = dtrun.script("""
        path = os.path.join(os.environ["DTRAIN_RUN_DIR"], "secret")
        print(path, open(path).read().strip(), oct(os.stat(path).st_mode & 0o777), flush=True)
        sys.exit(os.environ["TORCHELASTIC_RESTART_COUNT"] == "0")
    """)
    done = dtrun.run("--max-restarts", "1", script)
    first, second = (line.split() for line in done.stdout.splitlines())
    assert (done.returncode, first[2], second[2]) == (0, "0o400", "0o400")
    assert first[1] != second[1]
    assert not Path(first[0]).exists()


def test_several_nodes_have_the_secret_they_are_given_or_none(dtrun, file):
    script = dtrun.script("print(sorted(os.listdir(os.environ['DTRAIN_RUN_DIR'])))")
    nodes = ("--nnodes", "2", "--node-rank", "1")
    assert "'secret'" not in dtrun.run(*nodes, script).stdout
    assert "'secret'" in dtrun.run(*nodes, "--secret-file", str(file), script).stdout


SCAN = """
import base64
import dtrain as torch
from pathlib import Path
from zmq.utils import z85
raw = bytes(range(100, 132))
forms = [raw, raw.hex().encode(), base64.b64encode(raw), z85.encode(raw)]
dist = torch.distributed
dist.init_process_group("tcp")
dist.all_reduce(torch.ones(3))
if rank == 0:
    hits = scanned = 0
    for path in [*Path("/proc").glob("[0-9]*/cmdline"), *Path("/proc").glob("[0-9]*/environ")]:
        try:
            text = path.read_bytes()
        except OSError:  # gone, or not ours
            continue
        scanned += 1
        hits += any(form in text for form in forms)
    print(f"hits {hits}, scanned {scanned}")
dist.barrier()
raise RuntimeError(f"{dist.group.WORLD!r} {dist.group.WORLD.arrays.transport!r}")
"""


@pytest.mark.parametrize("planted", [None, "hex", "base64", "z85"])
def test_the_secret_shows_up_nowhere(dtrun, file, planted):
    """Not in arguments and environments, nor in what is printed, logged and left in error files."""
    forms = {
        "hex": RAW.hex(),
        "base64": base64.b64encode(RAW).decode(),
        "z85": z85.encode(RAW).decode(),
    }
    env = {"DTRAIN_LOG": "DEBUG"} | ({"PLANTED": forms[planted]} if planted else {})
    flags = ("--nproc-per-node", "2", "--secret-file", str(file), "--log-dir", "logs", "--tee", "3")
    done = dtrun.run(*flags, dtrun.script(SCAN), env=env)
    hits, scanned = re.findall(r"hits (\d+), scanned (\d+)", done.stdout)[0]
    assert int(scanned) >= 8, done.stdout + done.stderr  # dtrun twice, two ranks: two files each
    assert (int(hits) > 0) == (planted is not None)
    logs = [p.read_bytes() for p in (dtrun.folder / "logs").rglob("*") if p.is_file()]
    assert len(logs) >= 4
    told = [done.stdout.encode(), done.stderr.encode(), *logs]
    for form in (RAW, *(form.encode() for form in forms.values())):
        assert not any(form in text for text in told)
