"""The debug level, and a breakpoint on one rank."""

from __future__ import annotations

import io
import pdb
import threading

import pytest

import dtrain as torch
import dtrain.distributed as dist
from dtrain.distributed import debugging
from dtrain.logs import ROOT
from dtrain.testing.distributed import run_distributed


@pytest.fixture(autouse=True)
def _level():
    before = ROOT.level
    yield
    ROOT.setLevel(before)


@pytest.mark.parametrize("level", dist.DebugLevel)
def test_levels(level, monkeypatch):
    dist.set_debug_level(level)
    assert dist.get_debug_level() is level
    for name in ("DTRAIN_LOG", "LOGLEVEL"):
        monkeypatch.delenv(name, raising=False)
    dist.set_debug_level(dist.DebugLevel.OFF)
    monkeypatch.setenv("TORCH_DISTRIBUTED_DEBUG", level.name)
    dist.set_debug_level_from_env()
    assert dist.get_debug_level() is level


def test_a_wrong_level_in_the_environment(monkeypatch):
    monkeypatch.delenv("DTRAIN_LOG", raising=False)
    monkeypatch.setenv("TORCH_DISTRIBUTED_DEBUG", "LOUD")
    with pytest.raises(ValueError, match="must be OFF, INFO, or DETAIL"):
        dist.set_debug_level_from_env()


def test_our_own_variable_wins(monkeypatch):
    monkeypatch.delenv("DTRAIN_LOG", raising=False)
    monkeypatch.setenv("TORCH_DISTRIBUTED_DEBUG", "OFF")
    monkeypatch.setenv("DTRAIN_DEBUG", "detail")
    dist.set_debug_level_from_env()
    assert dist.get_debug_level() is dist.DebugLevel.DETAIL
    monkeypatch.setenv("DTRAIN_DEBUG", "LOUD")
    with pytest.raises(ValueError, match="The value of DTRAIN_DEBUG must be OFF, INFO, or DETAIL"):
        dist.set_debug_level_from_env()


@pytest.mark.parametrize("transport", ["local", "shm", "zmq"])
def test_statistics_tell_who_made_others_wait(transport):
    def main():
        dist.barrier()
        if dist.get_rank() == 1:
            late.wait(0.2)
        dist.all_reduce(torch.ones(4))
        return dist.statistics()

    late = threading.Event()  # never set
    stats = run_distributed(3, main, transport=transport)
    for rank in (0, 2):
        counted = stats[rank].calls["all_reduce"]
        assert (counted.count, counted.bytes) == (1, 16)
        assert 0.1 < counted.waited <= counted.seconds
        assert sum(stats[rank].waits.values()) >= counted.waited
    assert max(stats[0].waits, key=stats[0].waits.get) == 1


def test_levels_log_groups_and_calls(caplog):
    caplog.set_level("DEBUG", logger="dtrain.comm")
    run_distributed(2, dist.barrier)
    said = "\n".join(record.getMessage() for record in caplog.records)
    assert "group 'world': rank 1 of 2 joins" in said
    assert "group 'world' #0 barrier() took 0.0" in said
    assert "group 'world' is closed: barrier KindStatistics(count=1" in said
    caplog.clear()
    caplog.set_level("INFO", logger="dtrain.comm")
    run_distributed(2, dist.barrier)
    assert "took" not in "\n".join(record.getMessage() for record in caplog.records)


def test_breakpoint_stops_one_rank_and_holds_the_others(monkeypatch):
    """Rank 1's debugger walks up to the caller, reads a variable there and goes on."""
    said, passed = io.StringIO(), threading.Event()

    class Debugger(pdb.Pdb):
        def do_continue(self, arg):
            assert not passed.is_set()
            return super().do_continue(arg)

        do_c = do_continue

    def debugger():
        return Debugger(stdin=io.StringIO("up\np secret\nc\n"), stdout=said, nosigint=True)

    monkeypatch.setattr(debugging, "_debugger", debugger)

    def main():
        secret = 40 + dist.get_rank()
        for _ in range(2):
            dist.breakpoint(rank=1, skip=1, timeout_s=20)
        if dist.get_rank() == 0:
            passed.set()
        return secret

    run_distributed(2, main)
    assert "Type 'up' to get to the frame that called dist.breakpoint(rank=1)" in said.getvalue()
    assert "\n(Pdb) 41\n" in said.getvalue()


def test_no_terminal(monkeypatch):
    def nothing(*args):
        raise OSError("no such device")

    monkeypatch.setattr(debugging.os, "open", nothing)
    monkeypatch.setattr(debugging.sys, "stdin", None)
    with pytest.raises(RuntimeError, match="needs a terminal"):
        debugging._debugger()
