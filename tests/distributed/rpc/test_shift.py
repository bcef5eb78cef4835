"""Who moves messages: callers read their own answers, attendants run what is short.

One worker's `Shift` over a line that is a queue: what is put on it is heard by whoever moves it.
"""

from __future__ import annotations

import queue
import threading
import time
from contextlib import contextmanager

import pytest

from dtrain.distributed.rpc.shift import Shift
from dtrain.errors import PeerLost


class Line:
    """Messages are functions: who moves the line runs them."""

    def __init__(self):
        self.messages = queue.SimpleQueue()
        self.failures = []
        self.chores = 0
        self.shift = Shift(self.move, self.do_chores, self.failures.append, "shift")

    def move(self, until, deadline):
        while not until():
            left = deadline - time.monotonic()
            if left <= 0:
                return
            try:
                self.messages.get(timeout=left)()
            except queue.Empty:
                return

    def do_chores(self):
        self.chores += 1


@contextmanager
def line():
    made = Line()
    made.shift.start()
    try:
        yield made
    finally:
        made.shift.stop()
        made.messages.put(lambda: None)
        made.shift.join(10)
        assert not any(thread.is_alive() for thread in made.shift._threads)


def done(event):
    assert event.wait(10)


def test_a_message_is_heard_without_anybody_who_waits():
    with line() as a:
        heard = threading.Event()
        a.messages.put(heard.set)
        done(heard)


def test_a_short_task_that_blocks_holds_nobody_up():
    with line() as a:
        began, after, end = threading.Event(), threading.Event(), threading.Event()
        taken = []

        def task():
            began.set()
            done(end)

        a.messages.put(lambda: taken.append(a.shift.take_on(task)))
        done(began)
        a.messages.put(after.set)
        done(after)  # the other attendant has taken over
        refused = threading.Event()
        a.messages.put(lambda: refused.set() if not a.shift.take_on(task) else None)
        done(refused)  # which has nobody to stand by for it
        end.set()
        assert taken == [True]


def test_what_waits_behind_a_task_that_is_long_is_spilled():
    with line() as a:
        began, after, end, flushed = (threading.Event() for _ in range(4))
        a.shift.spill = lambda task: threading.Thread(target=task).start()
        a.shift.flush = flushed.set

        def long():
            began.set()
            done(end)

        def begin():
            if not a.shift.take_on(long):  # nobody stands by yet
                a.messages.put(begin)
            else:
                assert a.shift.take_on(after.set)

        a.messages.put(begin)
        done(began)
        done(after)  # though the one before it has not ended
        end.set()
        done(flushed)


def test_an_attendant_knows_whether_it_goes_on():
    shift = Line().shift  # which is not started: this thread is the attendant
    shift._attending, shift._ready = threading.get_ident(), [False, True]
    said = []
    for _ in range(3):
        assert shift.take_on(lambda: said.append(shift.goes_on()))
    shift.flush = lambda: said.append("flush")
    shift._run_tasks()
    assert said == [True, True, False, "flush"]
    assert not shift.goes_on()


def test_who_waits_moves_messages_when_an_attendant_stands_aside():
    with line() as a:
        for _ in range(50):
            answer = threading.Event()
            who = []

            def hear(answer=answer, who=who):
                who.append(threading.current_thread())
                answer.set()

            a.messages.put(hear)
            a.shift.lend_a_hand(answer.is_set, time.monotonic() + 10)
            a.shift.blocked.add(answer)
            done(answer)
            a.shift.served(answer)
            a.shift.blocked.discard(answer)
        after = threading.Event()
        a.messages.put(after.set)
        done(after)


def test_what_an_attendant_took_on_is_done_before_it_stands_aside():
    """A caller that has the baton ever after may wait for just that."""
    with line() as a:
        for _ in range(20):
            ran, told = threading.Event(), threading.Event()

            def both(ran=ran, told=told):
                a.shift.take_on(ran.set) or ran.set()
                a.shift.blocked.add(told)
                a.shift.served(told)
                a.shift.blocked.discard(told)
                told.set()

            a.messages.put(both)
            done(told)
            a.shift.lend_a_hand(ran.is_set, time.monotonic() + 10)
            done(ran)


def test_a_line_that_callers_left_is_attended_again():
    with line() as a:
        left = []

        def asleep():  # while this thread has the baton, the attendants have nothing to do
            left.append(all(a.shift._asleep))
            return left[-1]

        while not any(left):
            aside = threading.Event()

            def stand_aside(aside=aside):
                a.shift.blocked.add(aside)
                a.shift.served(aside)
                a.shift.blocked.discard(aside)
                aside.set()

            a.messages.put(stand_aside)
            done(aside)
            a.shift.lend_a_hand(asleep, time.monotonic() + 10)
        heard = threading.Event()
        a.messages.put(heard.set)
        done(heard)


def test_chores_are_done_while_a_caller_waits():
    with line() as a:
        a.shift.lend_a_hand(lambda: a.chores > 3, time.monotonic() + 10)
        end = time.monotonic() + 10
        while a.chores <= 3:
            assert time.monotonic() < end
            threading.Event().wait(0.01)


@pytest.mark.parametrize("stopped", [True, False])
def test_a_line_that_is_lost(stopped):
    def move(until, deadline):
        a.stopped = stopped
        raise PeerLost(0)

    failures = []
    a = Shift(move, lambda: None, failures.append, "lost")
    if stopped:
        a.lend_a_hand(lambda: False, time.monotonic() + 10)
        a.stopped = False
    else:
        with pytest.raises(PeerLost):
            a.lend_a_hand(lambda: False, time.monotonic() + 10)
    a.start()
    a.join(10)
    assert len(failures) == (0 if stopped else 2)
