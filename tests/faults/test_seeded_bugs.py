"""Checkers are tested with something wrong that they must catch: bugs seeded into the product.

Each bug takes away what a promise stands on; the check that claims to keep the promise must fail.
"""

from __future__ import annotations

import os
import re
import tempfile

import pytest

from dtrain.comm import algorithms, collectives as c, reduce
from dtrain.comm.transports import futex, window
from dtrain.comm.transports.zmq import ZmqTransport
from dtrain.testing.conformance import TRANSPORT_CHECKS, check_group
from dtrain.testing.trials import Trial, run_trial
from dtrain.testing.world import run_world
from tests.comm.test_failures import _misfit
from tests.faults import bugs


@pytest.fixture
def own_folder(monkeypatch):
    """Sockets in a folder where no other process of this machine removes what dead ones left."""
    with tempfile.TemporaryDirectory(prefix="bugs", dir="/tmp") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield


@pytest.mark.parametrize(
    ("program", "trial", "why"),
    [
        (bugs.leaving, Trial("SIGKILL", "barrier", "zmq", 2, "before"), "left behind: .*dtrain-"),
        (bugs.silent, Trial("exception", "barrier", "zmq", 0, "before"), "expected GroupAborted"),
        (bugs.unaware, Trial("SIGKILL", "barrier", "zmq", 2, "before"), "expected PeerLost"),
    ],
)
def test_the_matrix_catches(program, trial, why, own_folder):
    sound = run_trial(trial)
    assert sound.result == "passed", sound.why
    verdict = run_trial(trial, program)
    assert verdict.result == "failed", verdict
    assert re.search(why, verdict.why)


def test_a_fingerprint_without_the_dtype_is_caught(monkeypatch):
    signature = c.AllReduce.signature.fget
    monkeypatch.setattr(
        c.AllReduce,
        "signature",
        property(lambda self: re.sub("(float|int)32", "x", signature(self))),
    )
    with pytest.raises(AssertionError, match="did not notice"):
        run_world(2, _misfit, "dtype", 1, 0)


def test_a_goodbye_that_is_not_said_is_caught(monkeypatch):
    monkeypatch.setattr(ZmqTransport, "_say_goodbye", lambda self, peer: None)
    with pytest.raises(AssertionError):
        run_world(
            2, lambda group: TRANSPORT_CHECKS["says goodbye"](group.transport), transport="zmq"
        )


def test_sums_in_another_order_are_caught(monkeypatch):
    monkeypatch.setattr(
        algorithms, "combine", lambda op, parts, out: reduce.combine(op, list(parts)[::-1], out)
    )
    with pytest.raises(AssertionError):
        check_group("local", [3], ["all_reduce"], [1000])


def allocated():
    """The share of a window's own memory that has pages of its own."""
    segment = window.Segment()
    try:
        return os.fstat(segment.descriptor).st_blocks * 512 / segment.needed
    finally:
        segment.close()


@pytest.mark.skipif(not futex.AVAILABLE, reason="windows need x86-64 Linux")
def test_memory_that_is_only_promised_is_caught(monkeypatch):
    assert allocated() >= 1
    monkeypatch.setattr(os, "posix_fallocate", lambda fd, start, size: None)
    assert allocated() < 1
