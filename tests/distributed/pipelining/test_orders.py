"""Orders, all small ones: complete, without a deadlock, with the memory and bubble of closed forms.

The judge (`play`) is itself tested with orders that are wrong.
"""

from __future__ import annotations

import itertools

import pytest

from dtrain.distributed.pipelining import orders
from dtrain.distributed.pipelining.orders import BACKWARD, FORWARD, Action, play

SINGLE = [(s, m) for s in range(1, 7) for m in range(1, 13)]
INTERLEAVED = [(r, v, m) for r in range(1, 5) for v in range(1, 4) for m in range(1, 13)
               if m % max(1, m // r) == 0]  # fmt: skip
# Backward takes twice the time of forward.
COST = {FORWARD: 1.0, BACKWARD: 2.0}


def takes(action):
    return COST[action.kind]


@pytest.mark.parametrize(("stages", "microbatches"), SINGLE)
def test_gpipe(stages, microbatches):
    played = play(orders.gpipe(stages, stages, microbatches), stages, microbatches, takes)
    assert played.in_flight == [microbatches] * stages
    assert played.length == 3 * (microbatches + stages - 1)
    assert played.bubble == pytest.approx((stages - 1) / (microbatches + stages - 1))


@pytest.mark.parametrize(("stages", "microbatches"), SINGLE)
def test_one_forward_one_backward(stages, microbatches):
    order = orders.one_forward_one_backward(stages, stages, microbatches)
    played = play(order, stages, microbatches, takes)
    assert played.in_flight == [min(microbatches, stages - s) for s in range(stages)]
    assert played.length == 3 * (microbatches + stages - 1)
    assert played.bubble == pytest.approx((stages - 1) / (microbatches + stages - 1))


@pytest.mark.parametrize(("ranks", "local", "microbatches"), INTERLEAVED)
def test_interleaved(ranks, local, microbatches):
    stages = ranks * local
    order = orders.interleaved(ranks, stages, microbatches)
    played = play(order, stages, microbatches, takes)
    assert played.in_flight == [
        orders.in_flight_interleaved(r, ranks, stages, microbatches) for r in range(ranks)
    ]
    if microbatches % ranks == 0:
        bubble = (ranks - 1) / (local * microbatches + ranks - 1)
        assert played.bubble == pytest.approx(bubble)


@pytest.mark.parametrize(("ranks", "local"), list(itertools.product(range(1, 5), range(1, 4))))
def test_breadth_first_and_forward_only(ranks, local):
    stages = ranks * local
    for microbatches in range(1, 9):
        played = play(orders.looped_bfs(ranks, stages, microbatches), stages, microbatches)
        assert played.in_flight == [local * microbatches] * ranks
        if microbatches >= ranks:
            bubble = (ranks - 1) / (local * microbatches + ranks - 1)
            assert played.bubble == pytest.approx(bubble)
        play(orders.forward_only(ranks, stages, microbatches), stages, microbatches)


def test_a_schedule_as_text():
    order = orders.one_forward_one_backward(2, 2, 3)
    assert [" ".join(map(str, actions)) for actions in order] == [
        "0F0 0F1 0B0 0F2 0B1 0B2",
        "1F0 1B0 1F1 1B1 1F2 1B2",
    ]


def text(*ranks):
    return [[Action(int(a[0]), a[1], int(a[2])) for a in actions.split()] for actions in ranks]


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        (["0F0 0B0", "1F0"], "missing, not wanted or twice: 1B0"),
        (["0F0 0B0", "1F0 1F0 1B0"], "twice: 1F0"),
        (["0F0 0B0 0F1", "1F0 1B0"], "not wanted or twice: 0F1"),
        (["0F0 0B0 1F0", "1B0"], "stage 1 is on rank 0, not 1"),
        (["0B0 0F0", "1F0 1B0"], "never ends: 0B0, 1F0 wait for each other"),
        (["0F0 0B0", "1B0 1F0"], "never ends: 0B0, 1B0 wait for each other"),
    ],
)
def test_wrong_orders_are_refused(ranks, message):
    with pytest.raises(ValueError, match=message):
        play(text(*ranks), 2, 1)


def test_microbatches_out_of_turn_are_refused():
    with pytest.raises(ValueError, match="0F1 is out of turn"):
        play(text("0F1 0F0 0B0 0B1"), 1, 2)


def test_numbers_that_no_order_has():
    with pytest.raises(ValueError, match="multiple of the number of rounds"):
        orders.interleaved(2, 4, 5)
    with pytest.raises(ValueError, match="5 stages do not go on 2 ranks"):
        orders.interleaved(2, 5, 4)
    with pytest.raises(ValueError, match="there are 4 stages on 2 ranks"):
        orders.gpipe(2, 4, 4)
