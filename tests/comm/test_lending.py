"""Arrays in memory that two ranks see: what is lent, used and taken back."""

from __future__ import annotations

import gc
import os

import numpy as np
import pytest

from dtrain.comm.transports import futex, lending
from dtrain.comm.transports.lending import Borrower, Lender
from dtrain.comm.transports.window import NOWHERE

pytestmark = pytest.mark.skipif(not futex.AVAILABLE, reason="needs x86-64 Linux")

MB = 1 << 20


@pytest.fixture
def lender():
    made = Lender()
    yield made
    made.close()


def test_an_array_is_copied_once_and_used_where_it_is(lender):
    borrower = Borrower(lender.descriptor)
    array = np.arange(1000)
    place = lender.lend(array, 1)
    array[:] = 0
    got = borrower.borrow(place, 8000).view(int)
    assert (got == np.arange(1000)).all()
    got += 1
    assert got[-1] == 1000


def test_memory_is_used_again_when_the_last_view_is_gone(lender):
    borrower = Borrower(lender.descriptor)
    places = []
    for _ in range(3):
        places.append(lender.lend(np.ones(MB), 1))
        got = borrower.borrow(places[-1], 8 * MB)
        view = got[5:10]
        del got
        gc.collect()
        assert lender.lend(np.ones(1), 1) > places[-1]  # the view holds it
        del view
        lender.collect()
    assert len(set(places)) == 1
    assert lender.lent == 3 * 128  # which nobody has borrowed


def test_the_dead_hold_nothing(lender):
    lender.lend(np.ones(MB), 1)
    lender.lend(np.ones(MB), 2)
    lender.forget(1)
    lender.collect()
    assert lender.lent == 8 * MB + 64
    lender.forget(2)
    lender.collect()
    assert lender.lent == 0


def test_what_was_allocated_for_many_goes_back_to_the_machine(lender, monkeypatch):
    monkeypatch.setattr(lending, "_KEEP", MB)
    for _ in range(4):
        lender.lend(np.ones(MB), 1)
    assert os.fstat(lender.descriptor).st_blocks * 512 >= 32 * MB
    lender.forget(1)
    lender.collect()
    assert os.fstat(lender.descriptor).st_blocks * 512 <= MB
    place = lender.lend(np.full(MB, 3.0), 1)
    assert (Borrower(lender.descriptor).borrow(place, 8 * MB).view(float) == 3).all()


def test_where_there_is_no_memory_nothing_is_lent(lender):
    lender._heap.take(lender._length - 1000)
    assert lender.lend(np.ones(1000), 1) == NOWHERE


@pytest.mark.parametrize(("place", "nbytes"), [(-64, 1), (1, 1), (0, 1 << 60), (1 << 60, 8)])
def test_places_that_cannot_be_are_refused(lender, place, nbytes):
    with pytest.raises(ValueError, match="nothing can be lent"):
        Borrower(lender.descriptor).borrow(place, nbytes)
