"""Future and Work by themselves, without a group."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from dtrain.comm.work import Future, Work
from dtrain.errors import CollectiveTimeout, PeerLost


def test_a_future_is_completed_once_and_runs_its_callbacks():
    future: Future[int] = Future()
    seen: list[int] = []
    future.add_done_callback(lambda f: seen.append(f.value()))
    assert not future.done()
    with pytest.raises(RuntimeError, match="before the future is complete"):
        future.value()
    future.set_result(3)
    future.add_done_callback(lambda f: seen.append(-f.value()))
    assert (seen, future.wait(), future.done(), future.exception()) == ([3, -3], 3, True, None)
    with pytest.raises(RuntimeError, match="already complete"):
        future.set_exception(ValueError())


def test_then_chains_values_and_errors():
    future: Future[int] = Future()
    doubled = future.then(lambda f: 2 * f.value())
    failed = doubled.then(lambda f: f.value() // 0)
    after = failed.then(lambda f: f.value())
    future.set_result(4)
    assert doubled.value() == 8
    for broken in (failed, after):
        with pytest.raises(ZeroDivisionError):
            broken.wait()


def test_waiting_wakes_up_or_times_out():
    future: Future[str] = Future()
    with pytest.raises(TimeoutError, match=r"not complete after 0\.01 s"):
        future.wait(0.01)
    threading.Timer(0.01, future.set_result, ("x",)).start()
    assert future.wait(10) == "x"
    failed: Future[str] = Future()
    failed.set_exception(KeyError("k"))
    with pytest.raises(KeyError):
        failed.wait()


def test_a_callback_that_fails_is_logged_and_hurts_nobody(caplog):
    future: Future[int] = Future()
    future.add_done_callback(lambda f: 1 // 0)
    seen: list[int] = []
    future.add_done_callback(lambda f: seen.append(f.value()))
    future.set_result(1)
    assert seen == [1]
    assert "ZeroDivisionError" in caplog.text


def test_a_driven_future_moves_while_somebody_waits():
    pushes: list[float | None] = []

    def drive(timeout: float | None) -> None:
        pushes.append(timeout)
        if len(pushes) == 3:
            future.set_result(1)

    future: Future[int] = Future(drive)
    assert not future.done()
    with pytest.raises(TimeoutError):
        future.wait(0.5)
    assert future.wait(7) == 1
    assert pushes == [0.0, 0.5, 7]


def test_work_tells_how_it_ended():
    out = np.zeros(2)
    work = Work("call", out)
    assert not work.is_completed()
    assert not work.is_success()
    with pytest.raises(CollectiveTimeout, match=r"call is still running after a wait of 0\.01 s"):
        work.wait(0.01)
    work.finish(source=3)
    assert work.wait()
    assert work.is_success()
    assert work.result() is out
    assert work.source_rank() == 3
    assert work.get_future().value() is out


def test_failed_work_raises_its_error_each_time():
    work = Work("call", None)
    work.finish(PeerLost(2))
    assert work.is_completed()
    assert not work.is_success()
    assert isinstance(work.exception(), PeerLost)
    for _ in range(2):
        with pytest.raises(PeerLost, match="rank 2 is lost"):
            work.wait()


def test_only_a_receive_has_a_source():
    work = Work("send", None)
    work.finish()
    with pytest.raises(RuntimeError, match="send has no source rank"):
        work.source_rank()
