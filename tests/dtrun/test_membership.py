"""The head's decisions, without a process or a clock; then many random lives of a job."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from dtrun.membership import GATHERING, LOST_NODE, OVER, RUNNING, STOPPING, Meeting, Terms

ELASTIC = Terms(2, 3, max_restarts=1, join_timeout=60.0, last_call=5.0)


class Job:
    """A meeting with named nodes, and what each was told."""

    def __init__(self, terms=ELASTIC):
        secrets = (f"secret {n}" for n in itertools.count())
        self.terms = terms
        self.meeting = Meeting(terms, lambda: next(secrets), 0.0)
        self.told = {}

    def note(self, answers):
        for node, message in answers:
            self.told.setdefault(node, []).append(message)

    def join(self, node, now=0.0, terms=None, head=None, **fields):
        join = {"say": "join", "host": f"host {node}", "nproc": 2, "addr": f"10.0.0.{node}"}
        join |= {"port": 4000, "wanted": -1, "head": node == "a" if head is None else head}
        join |= {"terms": list((terms or self.terms)[:4])}
        self.note(self.meeting.heard(node, join | fields, now))

    def says(self, node, say, now=0.0, **fields):
        self.note(self.meeting.heard(node, {"say": say, **fields}, now))

    def ended(self, node, *failures, now=0.0):
        self.says(node, "ended", now, epoch=self.meeting.number, failures=list(failures))

    def tick(self, now):
        self.note(self.meeting.tick(now))

    def last(self, node):
        return self.told[node][-1]


def failure(code=1, **fields):
    return {"consequence": False, "stopped_by": None, "code": code} | fields


def running(terms=ELASTIC):
    job = Job(terms)
    for node in "abc"[: terms.most]:
        job.join(node)
    assert job.meeting.state == RUNNING
    return job


def test_it_starts_at_once_when_all_are_there():
    job = running()
    starts = [job.last(node) for node in "abc"]
    assert [s["say"] for s in starts] == ["start"] * 3
    assert [(s["node_rank"], s["first"], s["size"], s["nnodes"]) for s in starts] == [
        (0, 0, 6, 3),
        (1, 2, 6, 3),
        (2, 4, 6, 3),
    ]
    assert {(s["addr"], s["port"], s["secret"], s["epoch"]) for s in starts} == {
        ("10.0.0.a", 4000, "secret 0", 0)
    }


def test_nodes_may_have_different_numbers_of_ranks():
    job = Job()
    for node, ranks in zip("abc", (1, 4, 2), strict=True):
        job.join(node, nproc=ranks)
    assert [(job.last(n)["first"], job.last(n)["size"]) for n in "abc"] == [(0, 7), (1, 7), (5, 7)]


def test_enough_nodes_wait_for_a_last_call_and_too_few_for_the_rest():
    job = Job()
    job.join("b", now=1.0)
    assert job.meeting.deadline == 61.0
    job.join("a", now=2.0)
    assert (job.meeting.state, job.meeting.deadline) == (GATHERING, 7.0)
    job.says("a", "alive", 6.0)
    job.says("b", "alive", 6.0)
    job.tick(7.0)
    assert job.last("a")["node_rank"] == 0  # the head, though it came second


def test_nobody_waits_for_ever():
    job = Job()
    job.join("a")
    for now in range(60):
        job.says("a", "alive", float(now))
    job.tick(60.0)
    assert job.last("a") == {
        "say": "over",
        "code": LOST_NODE,
        "why": "only 1 of 2 nodes came within 60 s",
    }


def test_a_node_that_joins_late_makes_all_start_again_without_using_up_a_restart():
    job = Job()
    job.join("a")
    job.join("b")
    job.says("a", "alive", 5.0)
    job.says("b", "alive", 5.0)
    job.tick(5.0)
    job.join("c", now=9.0)
    assert job.last("a") == job.last("b")
    assert job.last("a")["say"] == "stop"
    assert job.meeting.state == STOPPING
    job.ended("a", failure(consequence=True, stopped_by=15), now=9.0)
    job.ended("b", now=9.0)
    assert job.meeting.state == RUNNING
    assert (job.last("c")["nnodes"], job.last("c")["restarts"], job.last("c")["epoch"]) == (3, 0, 1)
    assert job.last("c")["secret"] == "secret 1"  # the ranks of the epoch before do not know it


def test_more_nodes_than_places_wait_in_reserve_and_take_the_place_of_a_lost_one():
    job = running()
    job.join("d")
    assert "in reserve" in job.last("d")["why"]
    job.says("b", "leave", why="stopped by SIGTERM", code=143)
    assert "node 1 (host b) has left: stopped by SIGTERM" in job.last("a")["why"]
    job.ended("a", failure(consequence=True, lost_peer=True))
    job.ended("c", failure(consequence=True, lost_peer=True))
    assert [job.last(n)["node_rank"] for n in "acd"] == [0, 1, 2]
    assert job.meeting.restarts == 0


def test_a_silent_node_is_lost_whatever_the_others_then_raise():
    job = running()
    job.ended("a", failure(), now=4.0)  # its store has gone: not PeerLost, but no failure either
    job.ended("b", failure(consequence=True), now=4.0)
    assert job.meeting.state == STOPPING
    job.tick(5.0)
    assert job.meeting.state == RUNNING
    assert (job.last("a")["nnodes"], job.last("a")["restarts"]) == (2, 0)


def test_a_node_that_was_taken_for_lost_is_told_so():
    job = running()
    job.says("a", "alive", 5.0)
    job.says("b", "alive", 5.0)
    job.tick(5.0)
    assert "c" not in job.meeting.nodes
    job.says("c", "alive", 6.0)
    assert (job.last("c")["say"], job.last("c")["code"]) == ("over", 75)


def test_a_node_whose_connection_broke_is_lost_at_once():
    job = running()
    job.says("c", "gone", 1.0)
    assert job.meeting.epoch.lost == ["node 2 (host c) is lost: the connection to it broke"]
    job.ended("a", failure(consequence=True), now=1.0)
    job.ended("b", failure(consequence=True), now=1.0)
    assert (job.last("a")["nnodes"], job.last("a")["restarts"]) == (2, 0)
    job.says("c", "gone", 1.1)  # whom nobody knows any more
    assert "c" in job.told
    assert job.last("c")["say"] == "start"


def test_a_connection_that_breaks_after_the_end_or_a_good_bye_changes_nothing():
    job = running()
    job.says("c", "leave", why="-", code=143)
    epoch = job.meeting.epoch
    job.says("c", "gone")
    assert job.meeting.epoch is epoch
    for node in "abab":  # what runs, and then what was started again without c
        job.ended(node)
    assert job.meeting.state == OVER
    for node in "ab":
        job.says(node, "gone")
    assert not job.meeting.nodes
    assert job.last("a")["code"] == 0


def test_failures_use_up_restarts_and_the_last_is_the_jobs_code():
    job = running()
    job.ended("b", failure(code=7, rank=3))
    assert (job.last("a")["say"], job.last("a")["grace"]) == ("stop", True)
    job.ended("a", failure(consequence=True))
    job.ended("c", failure(consequence=True))
    assert job.told["a"][-2]["again"] == "restart 1 of 1"
    assert job.told["a"][-2]["root"]["rank"] == 3
    assert (job.last("a")["say"], job.last("a")["restarts"]) == ("start", 1)
    for node in "abc":
        job.ended(node, failure(code=8 if node == "a" else 9))
    assert [job.last(node)["code"] for node in "abc"] == [8] * 3  # reported first
    assert job.meeting.state == OVER


def test_where_the_number_is_fixed_a_lost_node_is_a_failure():
    job = running(Terms(2, 2, max_restarts=1))
    job.says("b", "leave", why="its launcher has ended", code=1)
    job.ended("a", failure(consequence=True))
    assert job.told["a"][-1]["again"] == "restart 1 of 1"
    assert job.meeting.state == GATHERING
    job.join("b2")
    assert (job.meeting.state, job.last("b2")["restarts"]) == (RUNNING, 1)
    job.says("b2", "leave", why="its launcher has ended", code=1)
    job.ended("a", failure(consequence=True))
    assert job.last("a") == {"say": "over", "code": LOST_NODE, "why": ""}
    assert job.told["a"][-2]["why"] == "node 1 (host b2) has left: its launcher has ended"


def test_all_succeed_and_say_good_bye():
    job = running()
    for node in "abc":
        job.ended(node)
    assert [job.last(node) for node in "abc"] == [{"say": "over", "code": 0, "why": ""}] * 3
    for node in "abc":
        job.says(node, "leave", why="-", code=0)
    assert not job.meeting.nodes
    job.join("d")
    assert job.last("d")["why"] == "the job is over"


def test_a_node_that_goes_after_its_success_is_no_loss():
    job = running()
    job.ended("b")
    job.says("b", "leave", why="-", code=0)
    assert job.meeting.state == RUNNING
    job.ended("a")
    job.ended("c")
    assert job.last("a")["code"] == 0


def test_the_head_takes_the_job_with_it():
    job = running()
    job.says("a", "leave", why="stopped by SIGINT", code=130)
    assert job.last("b")["code"] == 130
    assert job.last("b")["why"] == "node 0 (host a), the head, has left: stopped by SIGINT"


def test_a_node_that_was_started_differently_is_refused():
    job = Job()
    job.join("a", terms=ELASTIC._replace(most=4, max_restarts=0))
    assert job.last("a")["code"] == 2
    assert "most nodes 4 here, 3 at the head; --max-restarts 0" in job.last("a")["why"].replace(
        ", --", "; --"
    )
    assert not job.meeting.nodes


def test_static_nodes_have_the_place_they_ask_for():
    job = Job(Terms(2, 2, static=True))
    job.join("x", wanted=1, head=False)
    job.join("y", wanted=1, head=False)
    job.says("y", "alive")
    assert "y" not in job.told  # is it x that comes back? the next word of x decides
    job.says("x", "alive")
    assert "--node-rank 1 is taken by host x" in job.last("y")["why"]
    job.join("z", wanted=0, head=True)
    assert [job.last(node)["node_rank"] for node in "zx"] == [0, 1]


def test_a_killed_node_that_comes_back_at_once_has_its_place_when_the_old_one_is_lost():
    job = Job(Terms(2, 2, max_restarts=1, static=True))
    job.join("a", wanted=0, head=True)
    job.join("x", wanted=1, head=False)
    job.join("y", now=1.0, wanted=1, head=False)
    for now in (2.0, 3.0, 4.0):
        job.says("a", "alive", now)
        job.says("y", "alive", now)
    job.tick(5.0)
    assert job.meeting.epoch.lost == ["node 1 (host x) is lost: silent for 5 s"]
    job.ended("a", now=5.0)
    assert (job.last("y")["say"], job.last("y")["node_rank"]) == ("start", 1)
    assert job.meeting.restarts == 1


def test_a_killed_node_need_not_wait_for_its_place_where_its_connection_broke():
    job = Job(Terms(2, 2, max_restarts=1, static=True))
    job.join("a", wanted=0, head=True)
    job.join("x", wanted=1, head=False)
    job.join("y", now=1.0, wanted=1, head=False)
    job.join("z", now=1.0, wanted=1, head=False)
    job.says("y", "gone", 1.0)  # it waited for the place, and is gone itself
    job.says("x", "gone", 1.0)
    job.ended("a", now=1.0)
    assert (job.last("z")["say"], job.last("z")["node_rank"]) == ("start", 1)
    assert "y" not in job.told


def test_who_waits_for_a_place_hears_of_the_end_and_may_go():
    job = Job(Terms(2, 2, static=True))
    job.join("a", wanted=0, head=True)
    for rival in "yz":
        job.join(rival, wanted=0, head=False)
    job.says("z", "leave", why="-", code=0)
    job.says("a", "leave", why="stopped", code=130)
    assert job.last("y")["code"] == 130
    assert "z" not in job.told


@pytest.mark.parametrize("block", range(4))
def test_every_life_of_a_job_ends_and_no_epoch_is_mixed(block):
    """Nodes join, leave, fall silent, fail and succeed at random; then all is well for a while."""
    for seed in range(100 * block, 100 * block + 100):
        try:
            live_through(random.Random(seed))
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise


def live_through(dice):
    least = dice.choice((1, 2))
    terms = Terms(least, dice.choice((least, 3)), max_restarts=dice.choice((0, 2)))
    job, now, names = Job(terms), 0.0, itertools.count()
    job.join("a")
    silent = set()
    for _ in range(60):
        now += dice.random() * 3
        here = [node for node in job.meeting.nodes if node not in silent]
        act = dice.choice(("join", "leave", "silence", "break", "fail", "succeed", "nothing"))
        other = [node for node in here if node != "a"]
        if act == "join":
            job.join(f"n{next(names)}", now)
        elif act == "leave" and other:
            job.says(dice.choice(other), "leave", now, why="-", code=1)
        elif act == "silence" and other:
            silent.add(dice.choice(other))
        elif act == "break" and other:
            job.says(dice.choice(other), "gone", now)
        elif act == "fail" and here:
            job.ended(dice.choice(here), failure(), now=now)
        elif act == "succeed" and here:
            job.ended(dice.choice(here), now=now)
        live(job, silent, now)
    for _ in range(400):
        now += 2.0
        for node in [node for node in job.meeting.nodes if node not in silent]:
            job.ended(node, now=now)
        live(job, silent, now)
    assert job.meeting.state == OVER
    check(job)


def live(job, silent, now):
    """Time passes: who is not silent is heard, and obeys when told to stop."""
    for node in [node for node in job.meeting.nodes if node not in silent]:
        job.says(node, "alive", now)
        if job.meeting.state == STOPPING and node in job.meeting.epoch.waiting_for:
            job.ended(node, failure(consequence=True), now=now)
    job.tick(now)
    assert job.meeting.next_tick() > now or job.meeting.next_tick() == math.inf


def check(job):
    """Ranks of an epoch fit together; secrets are never used twice; failures are counted."""
    epochs = {}
    for messages in job.told.values():
        for message in messages:
            if message["say"] == "start":
                epochs.setdefault(message["epoch"], []).append(message)
    secrets = [{start["secret"] for start in starts} for starts in epochs.values()]
    assert [len(found) for found in secrets] == [1] * len(secrets)
    assert len(set.union(set(), *secrets)) == len(secrets)
    for starts in epochs.values():
        assert sorted(s["node_rank"] for s in starts) == list(range(starts[0]["nnodes"]))
        assert job.terms.least <= len(starts) <= job.terms.most
    assert job.meeting.restarts <= job.terms.max_restarts
