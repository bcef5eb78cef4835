"""Flags to a launch: spellings, defaults from PET_<NAME>, and every refusal in one line."""

from __future__ import annotations

import os
import signal

import pytest

from dtrun import options
from dtrun.cli import make_parser, parse
from dtrun.membership import Terms
from dtrun.spec import MODULE, PROGRAM, SCRIPT, cores
from tests.recorded import load_json


@pytest.fixture(autouse=True)
def script(tmp_path, monkeypatch):
    """A directory with `train.py` to stand in, and no variable that changes a default."""
    for name in [name for name in os.environ if name.startswith("PET_")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE", raising=False)
    (tmp_path / "train.py").write_text("")
    monkeypatch.chdir(tmp_path)


def refusal(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(argv)
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert err.startswith("dtrun: error: ")
    assert err.count("\n") == 1
    return err


def test_defaults():
    spec = parse(["train.py"])
    assert (spec.target, spec.args, spec.kind) == ("train.py", (), SCRIPT)
    assert (spec.nproc, spec.nnodes, spec.node_rank, spec.world_size) == (1, 1, 0, 1)
    assert (spec.master_addr, spec.master_port) == ("127.0.0.1", 0)
    assert (spec.role, spec.max_restarts, spec.log_dir, spec.prefix) == ("default", 0, None, "")


@pytest.mark.parametrize("flag", ["--nproc-per-node", "--nproc_per_node"])
@pytest.mark.parametrize("joined", [True, False])
def test_dashes_and_underscores(flag, joined):
    given = [f"{flag}=3"] if joined else [flag, "3"]
    spec = parse([*given, "train.py"])
    assert (spec.nproc, spec.prefix) == (3, "[rank${rank}]: ")


def test_what_follows_the_script_is_untouched():
    rest = ["--nproc-per-node", "9", "-m", "--", "-x", "--lr=1", ""]
    spec = parse(["--nproc-per-node", "2", "train.py", *rest])
    assert spec.nproc == 2
    assert spec.args == tuple(rest)


def test_everyday_flags():
    spec = parse(
        [
            *("--nnodes", "2", "--nproc-per-node", "2", "--node-rank", "1", "--role", "r"),
            *("--master-addr", "10.0.0.1", "--master-port", "4711", "--rdzv-id", "job"),
            *("-r", "1", "-t", "0:2,1:3", "--log-dir", "logs", "--local-ranks-filter", "1"),
            *("-m", "pkg.mod"),
        ]
    )
    assert (spec.kind, spec.target, spec.world_size, spec.rank(1)) == (MODULE, "pkg.mod", 4, 3)
    assert (spec.master_addr, spec.master_port, spec.run_id) == ("10.0.0.1", 4711, "job")
    assert (spec.redirects, spec.tee) == ((1, 1), (2, 3))
    assert (spec.log_dir, spec.shown, spec.role) == ("logs", {1}, "r")


@pytest.mark.parametrize("name", ["node0", "localhost", "127.0.0.1", "::1", "nowhere"])
def test_a_name_that_only_this_node_understands_is_refused(name, monkeypatch, capsys):
    known = {"node0": "127.0.1.1", "node1": "10.0.0.1", "localhost": "127.0.0.1"}

    def look_up(name):
        if name not in known:
            raise OSError("unknown")
        return known[name]

    monkeypatch.setattr(options.socket, "gethostbyname", look_up)
    flags = ["--nnodes", "2", "--master-addr"]
    assert parse([*flags, "node1", "train.py"]).master_addr == "node1"
    if name == "node0":
        assert "rank 0's address node0 is 127.0.1.1" in refusal([*flags, name, "train.py"], capsys)
    else:
        assert parse([*flags, name, "train.py"]).master_addr == name


def test_several_nodes_meet_at_torchs_ports():
    assert parse(["--nnodes", "2:2", "train.py"]).master_port == 29500
    c10d = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1"]
    assert parse(["--nnodes", "2", *c10d, "train.py"]).master_port == 29400


def test_nodes_meet_only_where_there_is_something_to_decide():
    assert parse(["train.py"]).terms is None
    assert parse(["--nnodes", "2", "train.py"]).terms is None
    fixed = parse(["--nnodes", "2", "--max-restarts", "3", "--node-rank", "1", "train.py"])
    assert (fixed.terms[:4], fixed.is_head) == ((2, 2, 3, True), False)
    meeting = ["--rdzv-endpoint", "127.0.0.1", "--rdzv-conf"]
    given = "timeout=9, last_call_timeout=2,keep_alive_interval=0.5,keep_alive_max_attempt=4"
    free = parse(["--nnodes", "2:4", *meeting, given, "train.py"])
    assert (free.terms, free.is_head) == (Terms(2, 4, 0, False, 9.0, 2.0, 0.5, 2.0), None)
    host = parse(["--nnodes", "2:4", *meeting, "is_host=true", "train.py"])
    assert host.is_head is True


@pytest.mark.parametrize("flags", [[], ["--standalone"], ["--standalone", "--rdzv-id", "job"]])
def test_a_node_alone_makes_up_a_run_id(flags):
    one, other = (parse([*flags, "train.py"]).run_id for _ in range(2))
    assert one != other
    assert len(one) == 16


def test_a_given_run_id_is_kept_and_several_nodes_share_torchs_default():
    assert parse(["--rdzv-id", "job", "train.py"]).run_id == "job"
    assert parse(["--nnodes", "2", "train.py"]).run_id == "none"


@pytest.mark.parametrize(
    ("endpoint", "expected"),
    [
        ("localhost:0", ("localhost", 0)),
        ("localhost", ("localhost", 0)),
        ("[::1]:80", ("::1", 80)),
    ],
)
def test_c10d_on_one_node_is_honoured(endpoint, expected):
    spec = parse(["--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "train.py"])
    assert (spec.master_addr, spec.master_port) == expected


@pytest.mark.parametrize("text", ["auto", "cpu"])
def test_one_rank_per_core(text):
    assert parse(["--nproc-per-node", text, "train.py"]).nproc == cores()


def test_defaults_come_from_the_environment(monkeypatch):
    for name, value in {
        "NPROC_PER_NODE": "4",
        "STANDALONE": "1",
        "MAX_RESTARTS": "2",
        "MODULE": "0",
    }.items():
        monkeypatch.setenv(f"PET_{name}", value)
    spec = parse(["train.py"])
    assert (spec.nproc, spec.max_restarts, spec.kind) == (4, 2, SCRIPT)
    assert len(spec.run_id) == 16
    assert parse(["--nproc-per-node", "2", "train.py"]).nproc == 2


def test_a_bad_default_from_the_environment_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("PET_NPROC_PER_NODE", "many")
    assert "--nproc-per-node must be a number" in refusal(["train.py"], capsys)
    monkeypatch.setenv("PET_NPROC_PER_NODE", "1")
    monkeypatch.setenv("PET_STANDALONE", "yes")
    assert "PET_STANDALONE must be 0 or 1, got 'yes'" in refusal(["train.py"], capsys)


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        ("--nproc-per-node 0 train.py", "--nproc-per-node must be a number from 1, auto or cpu"),
        ("--nproc-per-node -1 train.py", "got '-1'"),
        ("--nproc-per-node foo train.py", "got 'foo'"),
        ("--nproc-per-node gpu train.py", "dtrain computes on CPUs"),
        ("--nproc-per-node", "expected one argument"),
        ("", "no training script given"),
        ("nothing.py", "no such script: nothing.py"),
        (".", ". is a directory, a Python script is needed"),
        ("--no-python no-such-program", "no such program: no-such-program"),
        ("--no-python ./train.py", "./train.py is not executable: run chmod +x ./train.py"),
        ("-m --no-python train.py", "exclude each other"),
        ("--nproc 2 train.py", "unknown flag --nproc; did you mean --nproc-per-node?"),
        ("--max_restart 2 train.py", "did you mean --max-restarts?"),
        ("--zzz train.py", "unknown flag --zzz; see dtrun --help"),
        ("--max-restarts -1 train.py", "--max-restarts must be at least 0, got -1"),
        ("--max-restarts x train.py", "invalid int value: 'x'"),
        ("--nnodes 0 train.py", "--nnodes must be a number from 1, or MIN:MAX, got '0'"),
        ("--nnodes 1: train.py", "or MIN:MAX, got '1:'"),
        ("--nnodes 4:2 train.py", "at least 4 and at most 2 nodes is no range"),
        ("--nnodes 1:4 train.py", "nodes need --rdzv-endpoint HOST[:PORT] to meet"),
        ("--nnodes 2 --node-rank 2 train.py", "--node-rank must be in 0..1, got 2"),
        ("--standalone --nnodes 2 train.py", "--standalone is for one node"),
        ("--rdzv-backend etcd train.py", "--rdzv-backend etcd is not supported"),
        ("--rdzv-backend c10d --nnodes 2 train.py", "nodes need --rdzv-endpoint"),
        ("--rdzv-conf timeout train.py", "expected name=value,name=value, got 'timeout'"),
        ("--rdzv-conf colour=3 train.py", "--rdzv-conf: colour is not known, expected one of join"),
        ("--rdzv-conf timeout=0 --nnodes 1:2 --rdzv-endpoint h train.py", "a number above 0"),
        ("--rdzv-conf is_host=x --nnodes 1:2 --rdzv-endpoint h train.py", "true or false"),
        ("--rdzv-endpoint host:x train.py", "--rdzv-endpoint: a port is a number"),
        ("--master-port 65536 train.py", "--master-port: a port is a number in 0..65535"),
        ("-r 4 train.py", "--redirects must be 0, 1, 2 or 3, or like 0:1,1:3, got '4'"),
        ("-t 0:1,3 train.py", "--tee must be 0, 1, 2 or 3"),
        ("-t 1:3 train.py", "--tee: local ranks are 0..0, got '1'"),
        ("--local-ranks-filter 0,x train.py", "--local-ranks-filter: local ranks are 0..0"),
        ("--log-dir train.py train.py", "--log-dir train.py is not a directory"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(argv, complaint, capsys):
    assert complaint in refusal(argv.split(), capsys)


def test_torchruns_flags_are_all_known():
    """Each spelling, with the default, unless that has a meaning of its own here."""
    defaults = {action: action.default for action in make_parser()._actions}
    known = {name: default for a, default in defaults.items() for name in a.option_strings}
    for flag in load_json("torchrun_flags"):
        for name in flag["names"]:
            assert name in known, name
    other = {"--nnodes", "--rdzv-conf", "--master-port", "--local-addr", "--logs-specs", "--help",
             "--duplicate-stdout-filters", "--duplicate-stderr-filters",
             "--shutdown-timeout"}  # fmt: skip
    for flag in load_json("torchrun_flags"):
        name = flag["names"][-1]
        if not other & set(flag["names"]):
            assert (known[name] or None) == (flag["default"] or None), name


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        ("--logs-specs mine train.py", "only default is supported"),
        ("--signals-to-handle SIGTERM,SIGKILL train.py", "'SIGKILL' is no signal that can be"),
        ("--signals-to-handle TERM train.py", "'TERM' is no signal that can be handled"),
        ("--numa-binding all train.py", "invalid choice: 'all'"),
        ("--numa-binding exclusive --nproc-per-node 9999 train.py", "exclusive: 9999 ranks on a"),
    ],
)
def test_what_the_newer_flags_refuse(argv, complaint, capsys):
    assert complaint in refusal(argv.split(), capsys)


def test_the_newer_flags(monkeypatch):
    spec = parse(["--signals-to-handle=SIGUSR1,SIGTERM", "--duplicate-stdout-filters=a,b,,c",
                  "--virtual-local-rank", "--run-path", "--no-python", "train.py"])  # fmt: skip
    assert spec.stop_signals == (signal.SIGUSR1, signal.SIGTERM)
    assert spec.filters == (("a", "b,c"), ())
    assert spec.is_virtual
    assert spec.kind == SCRIPT
    monkeypatch.setenv("PET_NUMA_BINDING", "everywhere")
    with pytest.raises(SystemExit):
        parse(["train.py"])


def test_a_program_is_found_on_the_path():
    assert parse(["--no-python", "sh", "-c", "true"]).kind == PROGRAM


def test_the_prefix_template(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE", "<${rank}>")
    assert parse(["train.py"]).prefix == "<${rank}>"
    assert parse(["--log-line-prefix-template", "x", "train.py"]).prefix == "x"


def test_kept_streams_need_a_place(monkeypatch):
    monkeypatch.setenv("TMPDIR", "/var/tmp")
    assert parse(["-t", "3", "train.py"]).log_dir == f"/var/tmp/{options.TEMPORARY_LOGS}"
