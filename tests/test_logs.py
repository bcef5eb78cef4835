"""dtrain.logs: levels from the environment, the rank in front, silence beside other handlers."""

from __future__ import annotations

import json
import logging
import sys

import pytest

from dtrain import logs


@pytest.fixture(autouse=True)
def fresh_logging(monkeypatch):
    """The "dtrain" logger as on import, a root logger without handlers, no variable set."""
    for name in ("DTRAIN_LOG", "TORCH_DISTRIBUTED_DEBUG", "LOGLEVEL", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(logs.ROOT, "handlers", [])
    level = logs.ROOT.level
    logs.ROOT.setLevel(logging.NOTSET)
    yield
    logs.ROOT.setLevel(level)


def without_root_handlers(monkeypatch):
    """Take away the handlers that pytest adds when a test begins."""
    monkeypatch.setattr(logging.getLogger(), "handlers", [])


@pytest.mark.parametrize(
    ("environ", "level"),
    [
        ({}, logging.WARNING),
        ({"LOGLEVEL": "info"}, logging.INFO),
        ({"LOGLEVEL": "15"}, 15),
        ({"TORCH_DISTRIBUTED_DEBUG": "INFO", "LOGLEVEL": "ERROR"}, logging.INFO),
        ({"TORCH_DISTRIBUTED_DEBUG": "DETAIL"}, logging.DEBUG),
        ({"TORCH_DISTRIBUTED_DEBUG": "OFF", "LOGLEVEL": "ERROR"}, logging.ERROR),
        ({"DTRAIN_LOG": "error", "TORCH_DISTRIBUTED_DEBUG": "DETAIL"}, logging.ERROR),
    ],
)
def test_the_level_comes_from_the_environment(environ, level):
    assert logs.level_from_environ(environ) == level


@pytest.mark.parametrize("name", ["DTRAIN_LOG", "TORCH_DISTRIBUTED_DEBUG", "LOGLEVEL"])
def test_a_bad_level_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"{name} must be .*(?i:got) 'loud'"):
        logs.level_from_environ({name: "loud"})


def test_warnings_go_to_stderr_with_the_rank(monkeypatch, capsys):
    without_root_handlers(monkeypatch)
    monkeypatch.setenv("RANK", "3")
    logger = logs.get_logger("dtrain.comm")
    logger.info("quiet")
    logger.warning("no %s", "peer")
    assert capsys.readouterr().err == "[rank3] WARNING dtrain.comm: no peer\n"


def test_without_a_rank_there_is_no_prefix_and_the_handler_is_added_once(capsys, monkeypatch):
    without_root_handlers(monkeypatch)
    logs.get_logger("dtrain.a")
    logs.get_logger("dtrain.b").error("once")
    assert capsys.readouterr().err == "ERROR dtrain.b: once\n"


def test_the_variable_opens_the_logger(monkeypatch, capsys):
    without_root_handlers(monkeypatch)
    monkeypatch.setenv("DTRAIN_LOG", "DEBUG")
    logs.get_logger().debug("seen")
    assert "seen" in capsys.readouterr().err


@pytest.mark.parametrize("owner", ["", "dtrain"])
def test_a_handler_of_the_program_replaces_ours(owner, capsys, monkeypatch):
    without_root_handlers(monkeypatch)
    logs.get_logger()
    logging.getLogger(owner).handlers.append(logging.StreamHandler(sys.stdout))
    logs.get_logger("dtrain.x").warning("told")
    assert capsys.readouterr() == ("told\n", "")


def test_json_lines_stand_beside_stderr(tmp_path, monkeypatch, capsys):
    without_root_handlers(monkeypatch)
    monkeypatch.setenv("RANK", "1")
    handler = logs.add_json_handler(str(tmp_path / "log.jsonl"))
    try:
        raise KeyError("k")
    except KeyError:
        logs.get_logger("dtrain.x").exception("two\nlines")
    handler.close()
    (line,) = (tmp_path / "log.jsonl").read_text().splitlines()
    fields = json.loads(line)
    assert (fields["level"], fields["logger"], fields["rank"]) == ("ERROR", "dtrain.x", 1)
    assert fields["message"] == "two\nlines"
    assert "KeyError: 'k'" in fields["error"]
    assert "ERROR dtrain.x: two" in capsys.readouterr().err


def test_foreign_names_are_refused():
    with pytest.raises(ValueError, match="'numpy'"):
        logs.get_logger("numpy")
