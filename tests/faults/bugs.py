"""Bugs put into the ranks of a trial: each takes away what a promise stands on."""

from __future__ import annotations

from dtrain.comm import agreement, security
from dtrain.comm.transports import zmq
from dtrain.testing import faults


def _leave_sockets():
    security.remove_leftover = lambda address: None


def _tell_nobody():
    agreement.Agreement.tell_failure = lambda self, error: None


def _notice_nothing():
    faults._CALL = 2.0  # the deadline that then ends the call: shorter than that of other trials
    zmq.ZmqTransport._judge = lambda self: None


BUGS = {
    "sockets of the dead stay": _leave_sockets,
    "failures are not told": _tell_nobody,
    "broken connections mean nothing": _notice_nothing,
}


def suffer_with(bug, store, rank, size, *plan):
    """`faults.suffer` in a process that has the bug."""
    BUGS[bug]()
    return faults.suffer(store, rank, size, *plan)


def leaving(*args):
    return suffer_with("sockets of the dead stay", *args)


def silent(*args):
    return suffer_with("failures are not told", *args)


def unaware(*args):
    return suffer_with("broken connections mean nothing", *args)
