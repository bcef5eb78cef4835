"""The image and the compose file say what they must, and only what dtrun accepts.

No container engine is needed: `make check` holds the compose file against its specification, and
here its commands are given to dtrun's own parser.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath

import pytest

from dtrun.cli import parse
from tests.tree import ROOT

COMPOSE = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def commands(compose: str) -> list[list[str]]:
    """The `command: [...]` lists of a compose file, as words."""
    lists = re.findall(r"^\s*command: \[(.*?)\]", compose, re.MULTILINE | re.DOTALL)
    return [re.findall(r'[^\s,"]+', words) for words in lists]


def test_dtrun_accepts_the_command_of_every_node(tmp_path):
    secret = tmp_path / "job_key"
    secret.write_bytes(bytes(32))  # as `head -c 32 /dev/urandom` might have made it
    secret.chmod(0o600)
    here = COMPOSE.replace("/home/dtrain", str(ROOT)).replace("/run/secrets/job_key", str(secret))
    specs = [parse(words[1:]) for words in commands(here)]
    assert [words[0] for words in commands(COMPOSE)] == ["dtrun", "dtrun"]
    assert [spec.node_rank for spec in specs] == [0, 1]
    assert {spec.secret for spec in specs} == {bytes(32)}
    assert {(spec.nnodes, spec.nproc) for spec in specs} == {(2, 2)}
    assert {(spec.master_addr, spec.master_port) for spec in specs} == {("node0", 29500)}
    assert {(spec.max_restarts, spec.args[-1]) for spec in specs} == {(3, "--resume")}


def test_a_wrong_command_would_be_refused():
    (words,) = commands('    command: [dtrun, --nnodes, "2",\n  --node-rank, "2", x.py]\n')
    assert words == ["dtrun", "--nnodes", "2", "--node-rank", "2", "x.py"]
    with pytest.raises(SystemExit):
        parse(words[1:])


def test_the_script_is_in_the_image_and_here():
    for words in commands(COMPOSE):
        script = PurePosixPath(next(word for word in words if word.endswith(".py")))
        assert script.is_relative_to("/home/dtrain")
        assert (ROOT / script.relative_to("/home/dtrain")).is_file()
    assert re.search(r"^COPY examples /home/dtrain/examples$", DOCKERFILE, re.MULTILINE)


@pytest.mark.parametrize(
    "line",
    [
        "read_only: true",
        "cap_drop: [ALL]",
        'security_opt: ["no-new-privileges:true"]',
        "mem_limit: 2g",
        "memswap_limit: 2g",
        "pids_limit: 256",
        'volumes: ["checkpoints:/checkpoints"]',
        "secrets: [job_key]",
    ],
)
def test_every_node_is_confined(line):
    shared, services = COMPOSE.split("\nservices:\n")
    assert f"\n  {line}\n" in shared
    assert services.count("<<: *node") == len(commands(COMPOSE))


def test_no_secret_is_in_the_environment_or_on_a_command_line():
    for block in re.findall(r"^  environment:\n((?:    .*\n)+)", COMPOSE, re.MULTILINE):
        assert not re.search(r"key|secret|token", block, re.IGNORECASE)
    said = {word for words in commands(COMPOSE) for word in words if "secret" in word}
    assert said == {"--secret-file", "/run/secrets/job_key"}  # a path, which the mount below makes
    assert re.search(r"^secrets:\n  job_key:\n    file: ./job.key$", COMPOSE, re.MULTILINE)
    assert "/job.key" in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()


def test_the_nodes_share_checkpoints_that_any_user_may_write():
    for words in commands(COMPOSE):
        assert words[words.index("--checkpoint") + 1] == "/checkpoints/gpt"
    assert re.search(r"^volumes:\n  checkpoints:$", COMPOSE, re.MULTILINE)
    assert "install --directory --mode 1777 /checkpoints" in DOCKERFILE
    assert DOCKERFILE.index("/checkpoints") < DOCKERFILE.index("USER")


def test_the_image_runs_as_nobody_special():
    users = re.findall(r"^USER (.*)$", DOCKERFILE, re.MULTILINE)
    assert users == ["1000:1000"]
