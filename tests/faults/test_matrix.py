"""The fault matrix: every fault, before and amid every kind of call, first and last rank.

No survivor may hang, all must blame the victim, nobody may leave anything behind. The table of what
was run, not run and failed is printed after the tests.
"""

from __future__ import annotations

import itertools
import re

import pytest

from dtrain.comm.transports import futex
from dtrain.testing.faults import CALLS, FAULTS, MOMENTS
from dtrain.testing.trials import Trial, Verdict, judge, run_trial, table
from dtrain.testing.world import Outcome

SIZE = 3
# Both victims, both moments; over TCP, whose way into the kernel alone differs, a half of them.
MOST = list(
    itertools.product(("zmq", "shm") if futex.AVAILABLE else ("zmq",), (0, SIZE - 1), MOMENTS)
)
PLACES = [*MOST, ("tcp", 0, "before"), ("tcp", SIZE - 1, "amid")]
EVERYWHERE = ("SIGKILL", "SIGSTOP", "exception", "socket close")


def trials(fault, call):
    """All trials of one cell of the table."""
    return [Trial(fault, call, *place, SIZE) for place in PLACES]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("fault", EVERYWHERE)
def test_the_survivors_know(carry_out, fault, call):
    carry_out(trials(fault, call), at_once=6 if fault == "SIGSTOP" else 3)  # most of it is silence


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault not in EVERYWHERE])
def test_however_a_rank_ends(carry_out, fault):
    carry_out(trials(fault, "all_reduce 4 B"))


# ---- the checker is tested with what it must catch


TRIAL = Trial("SIGKILL", "barrier", "zmq", 2, "amid")
GOOD = ["PeerLost", [2], "group 'x' #3 barrier(): rank 2 is lost", 0.1]


def verdict(first=GOOD, second=GOOD, status=-9, left=(), trial=TRIAL):
    ends = [Outcome(0, first), Outcome(1, second)]
    return judge(trial, ends, Outcome(2, status=status), left)


def test_a_good_trial_passes_with_the_time_of_the_slowest():
    slow = [*GOOD[:3], 0.4]
    assert verdict(second=slow) == Verdict(TRIAL, "passed", "", 0.4)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"first": ["CollectiveTimeout", [2], "", 0.1]}, "rank 0 raised CollectiveTimeout"),
        ({"first": ["NoneType", [None], "", 0.1]}, "rank 0 raised NoneType"),
        ({"second": ["PeerLost", [0], GOOD[2], 0.1]}, r"rank 1 blames \[0\]"),
        ({"second": [*GOOD[:3], 1.2]}, "rank 1 raised after 1.20 s, expected 1.0 s"),
        ({"second": ["PeerLost", [2], "group 'x': else", 0.1]}, "say different things"),
        ({"status": 0}, "the victim ended with status 0, expected -9"),
        ({"left": ["/tmp/dtrain-1-x"]}, "left behind: /tmp/dtrain-1-x"),
    ],
)
def test_the_judge_sees_what_is_wrong(wrong, why):
    assert verdict(**wrong).result == "failed"
    assert re.search(why, verdict(**wrong).why)


def test_a_fault_that_was_not_injected_did_not_pass():
    done = [*GOOD[:3], None]
    assert verdict(done, done).result == "not run"
    never = run_trial(Trial("SIGKILL", "barrier", "zmq", 2, "never"))
    assert (never.result, never.why) == ("not run", "that moment was not reached")


def test_the_table_counts():
    other = Trial("SIGSTOP", "objects", "shm", 0, "before")
    verdicts = [Verdict(TRIAL, "passed"), Verdict(TRIAL, "failed"), Verdict(other, "not run")]
    rows = [line.split("  ") for line in table(verdicts).splitlines()]
    assert [[cell.strip() for cell in row if cell] for row in rows] == [
        ["run / not run / failed", "SIGKILL", "SIGSTOP"],
        ["barrier", "2 / 0 / 1", "-"],
        ["objects", "-", "0 / 1 / 0"],
    ]
