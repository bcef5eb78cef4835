"""The two ends of a reference's life: asked for before its owner has heard of it, and at shutdown.

Who calls `remote` may pass the reference on at once; the third worker may ask the owner before the
call of the first has come there. At the end, values let go of each other across workers.
"""

from __future__ import annotations

import gc
import logging
import re

import pytest

import dtrain as torch
from dtrain.distributed import rpc
from dtrain.distributed.rpc.ledger import Name
from dtrain.distributed.rpc.pool import Pool
from dtrain.distributed.rpc.references import References
from dtrain.errors import DistError
from dtrain.testing.distributed import run_distributed
from tests.distributed.rpc.worlds import world

EARLY = Name(2, 0, 0)


class Books(References):
    """Those of worker 0, without an agent: `sent` has what it tells the others."""

    def __init__(self):
        self.sent = []
        super().__init__(None, 0, Pool(1, "test"), lambda to, letter: self.sent.append(to))


@pytest.fixture
def books():
    made = Books()
    made.hear(1, "add", list(EARLY), 2)
    return made


def test_who_asks_early_waits_for_the_value(books):
    cell = books.values[EARLY]
    books.collect()
    books.create(EARLY, 2, "there")
    books.hear(2, "told", list(EARLY), 0)
    books.collect()
    assert books.values[EARLY] is cell
    assert not cell.done()


def test_a_value_that_will_not_come_is_an_error(books):
    cell = books.values[EARLY]
    books.hear(2, "told", list(EARLY), 0)
    assert not books.values
    with pytest.raises(DistError, match=r"the value of 2\.0 is gone"):
        cell.wait(5)


def test_the_death_of_its_creator_is_the_end_of_it(books):
    cell = books.values[EARLY]
    books.lose(2)
    assert not books.values
    with pytest.raises(DistError, match="gone"):
        cell.wait(5)


class Link:
    """Holds a reference to the next of a chain, on the other worker."""

    def __init__(self, behind):
        self.behind = behind


def chain(length):
    held = rpc.RRef("end")
    for i in range(length):
        held = rpc.remote(f"w{1 - i % 2}", Link, (held,))


def test_what_is_let_go_of_link_by_link_is_no_leak(caplog):
    with caplog.at_level(logging.WARNING, "dtrain.rpc"):
        world(2, chain, 12)
    assert not caplog.records


def refuse(reference):
    raise LookupError("no")


def caught(reference):
    """Its frame holds the reference, a caught error its frame, and the frame the error."""
    try:
        rpc.rpc_sync("w1", refuse, (reference,))
    except LookupError as error:
        cycle = error  # noqa: F841


def test_a_reference_in_a_cycle_of_garbage_is_no_leak(caplog):
    gc.disable()
    try:
        with caplog.at_level(logging.WARNING, "dtrain.rpc"):
            world(2, lambda: caught(rpc.remote("w1", Link, (None,))))
    finally:
        gc.enable()
    assert not caplog.records


kept = []


def keep(reference):
    kept.append(reference)


def test_what_others_hold_at_shutdown_is_named_with_its_place(caplog):
    def main():
        rpc.init_rpc(f"w{torch.distributed.get_rank()}")
        if torch.distributed.get_rank() == 0:
            rpc.rpc_sync("w1", keep, (rpc.RRef(1),))
        rpc.shutdown()

    with caplog.at_level(logging.WARNING, "dtrain.rpc"):
        run_distributed(2, main)
    kept.clear()
    (record,) = caplog.records
    message = r"reference 0\.0, made at .*test_references.py:\d+, is still held by \['w1'\]"
    assert re.match(message, record.getMessage())
