"""Kills in phases of a training job: it goes on, with the same bits, and leaves nothing behind.

All eighteen phases, each with two victims, run under `make stress` (tests/faults/soak.py); here are
those that stand for the others, and the checker against what it must see.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests.faults import phases, soak

CHOSEN = (("rdzv.published", 1), ("ar.recv_k", 0), ("ckpt.before_rename", 0), ("rpc.in_flight", 1))
STEPS = 20


@pytest.fixture
def folder():
    with soak._folder() as path:
        yield path


def test_it_goes_on_with_the_same_bits(folder):
    expected = soak.reference(folder, 2, STEPS)
    job = soak.through_phases(folder, 2, CHOSEN, STEPS)
    assert job.digests() == {expected}
    assert job.leftovers() == []
    assert len(soak.recoveries(job.history())) == len(CHOSEN)


def test_every_phase_is_a_place_in_the_code():
    assert len(phases.PHASES) == 18
    assert len(phases.kills(4)) == 36
    for name in phases.PHASES:
        place, attribute = phases.place_of(name)
        assert callable(getattr(place, attribute))


def test_times_are_taken_from_the_strike_before():
    history = [
        {"at": 1.0, "event": "step", "rank": 0},
        {"at": 5.0, "event": "struck", "rank": 1},
        {"at": 5.1, "event": "lost", "rank": 0},
        {"at": 6.0, "event": "step", "rank": 0},
        {"at": 6.5, "event": "step", "rank": 1},
        {"at": 9.0, "event": "struck"},
    ]
    assert soak.recoveries(history) == [1.5]
    assert soak.told(history) == [pytest.approx(0.1)]


def test_time_without_a_core_hardly_counts_as_a_hang(monkeypatch):
    now = iter([10.1, 40.0])
    monkeypatch.setattr(soak, "time", SimpleNamespace(monotonic=lambda: next(now)))
    assert soak._counted(10.0) == pytest.approx(0.1)
    assert soak._counted(10.0) == soak.COUNTS


def test_what_is_left_behind_is_seen(folder):
    job = soak.Job(folder, 1, 1)
    (folder / "checkpoints").mkdir()
    assert job.leftovers() == []
    (job.runs / "dtrun-x").mkdir()
    (folder / "checkpoints" / ".step-1.x.partial").mkdir()
    assert len(job.leftovers()) == 2
