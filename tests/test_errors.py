"""Errors survive pickling and the wire with their class, their sentence and their fields."""

from __future__ import annotations

import pickle

import pytest

from dtrain import errors as e
from dtrain.wire import dumps, loads

SAMPLES = [
    e.DistError("plain"),
    e.DistBackendError("backend"),
    e.DistNetworkError("network", address="tcp://127.0.0.1:1"),
    e.SecretError("words"),
    e.StoreTimeout(1.5, ["a", "b"]),
    e.StoreTimeout(0.1, ["key"], [0, 2]),
    e.TransportTimeout(3),
    e.TransportTimeout(None),
    e.PeerLost(2, where="group 'dp' #41 barrier()"),
    e.PeerLost(2, orderly=True),
    e.CollectiveMismatch("words", group="dp", seq=4, calls=[[0, "barrier()", "x.py:1"]]),
    e.CollectiveTimeout("words", group="dp", seq=4, rank=1, timeout=2.0),
    e.GroupAborted("words"),
    e.WrongSize(1, 3, 4),
    e.ForkedProcessError("the store", 17),
]


@pytest.mark.parametrize("error", SAMPLES, ids=lambda error: type(error).__name__)
def test_round_trips(error):
    told = e.from_wire(loads(dumps(e.to_wire(error))))
    for again in (told, pickle.loads(pickle.dumps(error)), error.copy()):
        assert again is not error
        assert type(again) is type(error)
        assert str(again) == str(error)
        assert again.__dict__ == error.__dict__


def test_foreign_errors_are_told_by_name():
    told = e.from_wire(e.to_wire(KeyError("k")))
    assert type(told) is e.DistBackendError
    assert str(told) == "KeyError: 'k'"


def test_an_unknown_class_is_still_an_error():
    assert type(e.from_wire(["FutureError", "words", {"rank": 1}])) is e.DistBackendError


def test_notes_do_not_travel():
    error = e.DistError("words", rank=1)
    error.add_note("seen here")
    assert e.to_wire(error) == ["DistError", "words", {"rank": 1}]


def test_sentences():
    assert str(e.StoreTimeout(1.5, ["a", "b"])) == "wait timeout after 1.5 s, missing keys: a, b"
    assert str(e.StoreTimeout(2, ["k"], [0, 2])) == (
        "wait timeout after 2.0 s, no value from ranks [0, 2] for keys: k"
    )
    assert str(e.PeerLost(2).at("group 'dp' #1 barrier()")).startswith(
        "group 'dp' #1 barrier(): rank 2 is lost"
    )


def test_the_tree_is_torchs():
    assert issubclass(e.DistError, RuntimeError)
    for base in (e.DistBackendError, e.DistNetworkError, e.DistStoreError):
        assert base.__bases__ == (e.DistError,)
