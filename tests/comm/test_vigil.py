"""A call that waits long: one warning, which says for whom, what he does and where."""

from __future__ import annotations

import logging
import threading

import numpy as np
import pytest

from dtrain import env
from dtrain.comm import collectives as c
from dtrain.comm.point_to_point import Recv, Send
from dtrain.errors import CollectiveTimeout
from dtrain.testing.world import run_world

TRANSPORTS = ("local", "shm", "zmq")


def ones():
    return np.ones(4, np.float32)


@pytest.fixture
def warned(monkeypatch, caplog):
    """The warnings about waits, which come after 0.3 s; an event tells the first of each rank."""
    monkeypatch.setenv("DTRAIN_STALL_WARNING", "0.3")
    caplog.set_level(logging.INFO, logger="dtrain.comm")
    handler = _Awaited()
    logging.getLogger("dtrain.comm").addHandler(handler)
    yield handler
    logging.getLogger("dtrain.comm").removeHandler(handler)


class _Awaited(logging.Handler):
    def __init__(self):
        super().__init__()
        self.records: list[logging.LogRecord] = []
        self.changed = threading.Condition()

    def emit(self, record):
        if "has waited" in record.getMessage():
            with self.changed:
                self.records.append(record)
                self.changed.notify_all()

    def come(self, count):
        """Wait until there are `count` of them."""
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.records) >= count, 20)

    def texts(self):
        return sorted(record.getMessage() for record in self.records)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_the_warning_names_the_line_of_the_absent(warned, transport):
    def work(group):
        group.submit(c.Barrier())
        if group.rank == 1:
            warned.come(2)  # what the absent rank does
        group.submit(c.AllReduce(ones()))

    run_world(3, work, transport=transport)
    first, second = warned.texts()
    for text, rank in ((first, 0), (second, 2)):
        lines = [line.strip() for line in text.splitlines()]
        assert lines[0].startswith("group 'world' #1 all_reduce(float32[4], op=SUM) at ")
        assert f"test_vigil.py:62: rank {rank} has waited 0." in lines[0]
        assert " s for rank 1" in lines[0]
        assert lines[1].startswith("rank 1 last completed #0 barrier() at ")
        assert "it is in no call for 0." in lines[1]
        assert "warned.come(2)  # what the absent rank does" in lines
    assert all(record.levelno == logging.WARNING for record in warned.records)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_an_absent_rank_that_waits_in_another_call(warned, transport):
    """Rank 0 waits for rank 1, which waits for a message: one warning each, once."""

    def work(group):
        if group.rank == 1:
            group.submit(Recv(ones(), 2))
        if group.rank == 2:
            warned.come(2)
            group.submit(Send(ones(), 1))
        group.submit(c.Barrier())

    run_world(3, work, transport=transport)
    barrier, message = warned.texts()
    assert "#0 barrier()" in barrier
    assert "rank 0 has waited" in barrier
    assert "rank 1 has completed no call of this group; it is in recv(float32[4], src=2" in barrier
    assert message.startswith("group 'world' recv(float32[4], src=2, tag=0) at ")
    assert "for rank 2\n" in message


def test_no_warning_when_told_so(warned, monkeypatch):
    monkeypatch.setenv("DTRAIN_STALL_WARNING", "0")
    release = threading.Event()

    def work(group):
        if group.rank == 1:
            release.wait(0.6)
        group.submit(c.Barrier())

    run_world(2, work)
    assert not warned.records


class _Patient(c.Barrier):
    patient = True


def test_who_expects_to_wait_does_not_warn(warned):
    def work(group):
        if group.rank == 1:
            warned.come(1)
        group.submit(_Patient())

    run_world(2, work)
    (record,) = warned.records
    assert record.levelno == logging.INFO


@pytest.mark.parametrize("text", ["soon", "-1", "nan"])
def test_a_wrong_number_of_seconds(text):
    with pytest.raises(ValueError, match="DTRAIN_STALL_WARNING must be a number of seconds, got "):
        env.stall_warning({"DTRAIN_STALL_WARNING": text})


def test_the_error_after_the_timeout_says_the_same():
    def work(group):
        if group.rank == 1:
            failed.wait(20)
            return None
        with pytest.raises(CollectiveTimeout) as caught:
            group.submit(c.Barrier(), timeout=0.3)
        if next(leaving) == 1:
            failed.set()
        return str(caught.value)

    failed, leaving = threading.Event(), iter(range(2))
    texts = run_world(3, work)
    assert texts[0] == texts[2]
    assert "rank 1 has completed no call of this group; it is in no call\n" in texts[0]
    assert "failed.wait(20)" in texts[0]
