"""The world runner: results, first failures, deadlines, contexts.

Ranks as threads and processes.
"""

from __future__ import annotations

import contextvars
import os
import threading

import numpy as np
import pytest

from dtrain.comm import collectives as c
from dtrain.errors import GroupAborted
from dtrain.testing.world import RankFailed, run_ranks, run_world


def total(group, start):
    buf = np.array([start + group.rank])
    group.submit(c.AllReduce(buf))
    print("this does not disturb the report")
    return [group.rank, int(buf[0]), os.getpid()]


@pytest.mark.parametrize("processes", [False, True])
def test_results_come_in_rank_order(processes, capfd):
    results = run_world(3, total, 10, transport="zmq", processes=processes)
    assert [r[:2] for r in results] == [[0, 33], [1, 33], [2, 33]]
    assert len({pid for *_, pid in results}) == (3 if processes else 1)
    assert "does not disturb" in "".join(capfd.readouterr())


def fail_on_one(group):
    if group.rank == 1:
        raise KeyError("mine")
    group.submit(c.Barrier())


def test_the_first_failure_in_a_process_comes_with_its_traceback():
    with pytest.raises(RankFailed, match=r"fail_on_one[\s\S]*KeyError: 'mine'") as caught:
        run_world(2, fail_on_one, transport="zmq", processes=True)
    assert "raised on rank 1 of 2" in caught.value.__notes__[-1]
    outcomes = run_ranks(2, fail_on_one, transport="zmq", processes=True)
    assert isinstance(outcomes[0].error, GroupAborted)
    assert [o.order for o in outcomes] == [1, 0]


def test_a_process_that_ends_without_a_word_is_reported():
    outcomes = run_ranks(2, leave, transport="zmq", processes=True)
    assert str(outcomes[1].error) == "rank 1 ended with exit code 7"
    assert outcomes[1].status == 7


def leave(group):
    if group.rank == 1:
        os._exit(7)


def test_the_deadline_shows_all_stacks_and_ends_the_ranks():
    release = threading.Event()

    def stuck_here(group):
        if group.rank:
            release.wait(0.5)
        else:
            group.submit(c.Barrier(), timeout=20)

    with pytest.raises(TimeoutError, match=r"2 of 2 ranks still run after 0\.2 s") as caught:
        run_world(2, stuck_here, timeout=0.2)
    assert "stuck_here" in str(caught.value)
    assert "rank 0:" in str(caught.value)
    assert "rank 1:" in str(caught.value)


def test_each_thread_rank_has_its_own_context():
    variable = contextvars.ContextVar("variable", default="default")
    variable.set("caller")

    def change(group):
        before = variable.get()
        variable.set(f"rank {group.rank}")
        group.submit(c.Barrier())
        return before, variable.get()

    assert run_world(2, change) == [("caller", "rank 0"), ("caller", "rank 1")]
    assert variable.get() == "caller"


def test_process_ranks_take_only_names_of_transports():
    with pytest.raises(TypeError, match="name of a transport"):
        run_world(2, total, 0, transport=lambda *args: None, processes=True)
