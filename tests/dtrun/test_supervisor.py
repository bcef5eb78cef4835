"""The state machine of a worker group, without a process or a clock."""

from __future__ import annotations

import signal

import pytest
from hypothesis import given, strategies as st

from dtrun.supervisor import (
    ABANDONED,
    GIVE_UP_SECONDS,
    GRACE,
    GRACE_SECONDS,
    KILLED,
    RUNNING,
    STOP_SECONDS,
    STOPPING,
    Supervisor,
)


def test_success_needs_no_action():
    group = Supervisor(range(2))
    group.exited(0, 0, now=1.0)
    assert (group.state, group.deadline, group.tick(99.0)) == (RUNNING, None, None)
    group.exited(1, 0, now=2.0)
    assert not group.living


def test_a_failure_is_followed_by_grace_sigterm_and_sigkill():
    group = Supervisor(range(3))
    group.exited(1, 7, now=10.0)
    assert (group.state, group.deadline) == (GRACE, 10.0 + GRACE_SECONDS)
    assert group.tick(group.deadline - 0.01) is None
    assert group.tick(group.deadline) == signal.SIGTERM
    assert group.state == STOPPING
    assert group.tick(group.deadline) == signal.SIGKILL
    assert (group.state, group.tick(group.deadline - 0.01)) == (KILLED, None)


def test_a_later_failure_does_not_extend_the_grace():
    group = Supervisor(range(3))
    group.exited(1, 7, now=10.0)
    group.exited(2, 1, now=10.5)
    assert group.deadline == 10.0 + GRACE_SECONDS


def test_everything_is_over_within_two_seconds():
    assert GRACE_SECONDS + STOP_SECONDS < 2.0
    assert STOP_SECONDS < 1.0


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_is_passed_on_and_the_second_kills(signum):
    group = Supervisor(range(2))
    assert group.signalled(signum, now=0.0) == signum
    assert (group.state, group.received) == (STOPPING, signum)
    assert group.signalled(signal.SIGINT, now=0.1) == signal.SIGKILL
    assert group.signalled(signal.SIGINT, now=0.2) is None
    assert group.received == signum


def test_a_signal_cuts_the_grace_short():
    group = Supervisor(range(2))
    group.exited(0, 1, now=0.0)
    assert group.signalled(signal.SIGINT, now=0.1) == signal.SIGINT
    assert group.deadline == 0.1 + STOP_SECONDS


def test_a_signal_while_workers_are_being_stopped_starts_nothing_new():
    group = Supervisor(range(2))
    group.exited(0, 1, now=0.0)
    assert group.tick(GRACE_SECONDS) == signal.SIGTERM
    assert group.signalled(signal.SIGINT, now=GRACE_SECONDS) is None
    assert group.received == signal.SIGINT


@given(st.lists(st.sampled_from(["exit", "fail", "signal", "tick"]), max_size=20))
def test_whatever_happens_it_ends_by_sigkill_or_by_itself(events):
    group, now = Supervisor(range(4)), 0.0
    for event in events:
        now += 0.3
        if event in ("exit", "fail") and group.living:
            group.exited(min(group.living), int(event == "fail"), now)
        elif event == "signal":
            group.signalled(signal.SIGTERM, now)
        else:
            group.tick(now)
    troubled = "signal" in events or (group.state != RUNNING)
    while troubled and group.deadline is not None:
        group.tick(group.deadline)
    assert group.state == (ABANDONED if troubled else RUNNING)


def test_what_cannot_be_killed_is_left_behind_after_a_while():
    group = Supervisor(range(2))
    group.exited(0, 1, now=0.0)
    assert group.tick(GRACE_SECONDS) == signal.SIGTERM
    killed = GRACE_SECONDS + STOP_SECONDS
    assert group.tick(killed) == signal.SIGKILL
    assert group.deadline == killed + GIVE_UP_SECONDS
    assert group.tick(killed + GIVE_UP_SECONDS) is None
    assert (group.state, group.deadline, group.living) == (ABANDONED, None, {1})
    assert group.signalled(signal.SIGINT, now=killed + GIVE_UP_SECONDS) is None
    assert group.signalled(signal.SIGINT, now=killed + GIVE_UP_SECONDS) is None
