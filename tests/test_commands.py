"""The commands a person types: the Makefile's targets, what they say, and what a machine runs.

Nothing is installed here; what `make test` does is running already.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess

import pytest

from tests.tree import ROOT

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["make", "--no-print-directory", "-C", str(ROOT), *arguments]
    # Under `make test` we are a child of make: its flags are not for this one.
    environment = {name: value for name, value in os.environ.items() if "MAKE" not in name}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=30, check=False
    )


@needs_make
def test_help_lists_every_command():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split()
    assert {"train", "test", "check", "bench", "stress"} <= set(phony)
    run = make("help")
    assert run.returncode == 0
    assert [line.split()[0] for line in run.stdout.splitlines()] == phony


@needs_make
def test_an_old_python_is_refused_in_one_line(tmp_path):
    old = tmp_path / "python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    run = make(f"PYTHON={old}", f"VENV={tmp_path}/venv", "test")
    ours = [line for line in run.stderr.splitlines() if not line.startswith("make")]
    assert run.returncode != 0
    assert ours == [
        f"dtrain needs Python 3.11 or newer, and {old} is not: "
        "name one with  make PYTHON=/path/to/python3.11"
    ]
    assert not (tmp_path / "venv").exists()


@needs_make
@pytest.mark.parametrize(
    ("target", "extra", "command"),
    [
        ("train", ".", "dtrun --standalone --nproc-per-node 2 examples/train_gpt.py"),
        ("test", "'.[test]'", "python -m pytest"),
        ("check", "'.[dev]'", "mypy"),
    ],
)
def test_a_fresh_machine_gets_an_environment_first(tmp_path, target, extra, command):
    venv = tmp_path / "venv"
    plan = make("--dry-run", f"VENV={venv}", target).stdout
    assert plan.index(f"-m venv --clear {venv}") < plan.index(f"--editable {extra}\n")
    assert plan.index(f"--editable {extra}\n") < plan.index(f"{venv}/bin/{command}")


@needs_make
def test_nothing_is_installed_twice(tmp_path):
    venv = tmp_path / "venv"
    venv.mkdir()
    for stamp in (".made", ".installed-test"):
        (venv / stamp).touch()
    assert "-m pip" not in make("--dry-run", f"VENV={venv}", "test").stdout


def test_the_machine_runs_the_same_commands():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    commands = script.read_text(encoding="utf-8").splitlines()
    assert commands[0] == "#!/usr/bin/env bash"
    assert "set -euo pipefail" in commands
    assert [line for line in commands if line.startswith("make")] == ["make check", "make test"]
