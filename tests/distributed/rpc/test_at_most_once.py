"""Calls while connections are dropped: each is run at most once, each caller gets its end.

One of a hundred calls finds that somebody has just cut all connections of its worker, without a
goodbye; the worker comes back under its name. Over TCP they are cut on the wire, while both workers
live. `make stress` makes 100,000 calls.
"""

from __future__ import annotations

import contextvars
import os
import random
import threading
from collections import Counter

import pytest

from dtrain.distributed import rpc
from dtrain.errors import PeerLost
from tests.distributed.rpc.test_open import Other, pytestmark as pytestmark, url as url, worker
from tests.distributed.rpc.worlds import cut, inbox_port

CALLS = int(os.environ.get("DTRAIN_TEST_CALLS") or 2000)
NAMES = ("b0", "b1", "b2")
CALLERS, BATCH, DROPPED = 3, 10, 0.01

executed: Counter[int] = Counter()


def count(token):
    executed[token] += 1
    return token


class Callers:
    """Threads that call, each with batches of its own tokens; what became of each call."""

    def __init__(self, where):
        self.where = where
        self.others = {name: Other(where, name) for name in NAMES}
        self.locks = {name: threading.Lock() for name in NAMES}
        self.answered, self.failed, self.wrong = [], Counter(), []

    def drop(self, name):
        if self.locks[name].acquire(blocking=False):  # else: it is being dropped
            try:
                self.cut(self.others[name])
                self.others[name] = Other(self.where, name)
                assert self.others[name].failure is None, self.others[name].failure
            finally:
                self.locks[name].release()

    def cut(self, other):
        if self.where.startswith("tcp:"):
            assert cut(inbox_port(other.agent)) > 0
            other.go()
        else:
            other.go("vanish")

    def call(self, me):
        dice = random.Random(me)
        for start in range(me * BATCH, CALLS, CALLERS * BATCH):
            name = dice.choice(NAMES)
            futures = [(t, self.begin(name, t)) for t in range(start, min(start + BATCH, CALLS))]
            if dice.random() < DROPPED * BATCH:
                self.drop(name)
            for token, future in futures:
                self.end(token, future)

    def begin(self, name, token):
        try:
            return rpc.rpc_async(name, count, (token,), timeout=30)
        except PeerLost as error:
            return error

    def end(self, token, future):
        try:
            if isinstance(future, PeerLost):
                raise future
            if future.wait() != token:
                self.wrong.append(token)
            self.answered.append(token)
        except (PeerLost, rpc.RpcTimeout) as error:
            self.failed[type(error)] += 1

    def run(self):
        run = [contextvars.copy_context().run for _ in range(CALLERS)]
        threads = [
            threading.Thread(target=run[me], args=(self.call, me), daemon=True)
            for me in range(CALLERS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60 + CALLS / 200)
            assert not thread.is_alive(), "a caller waits for ever"
        for other in self.others.values():
            other.go()


@pytest.mark.timeout(90 + CALLS / 100)
def test_each_call_is_run_at_most_once_and_ends(url):
    executed.clear()
    with worker(url, "first"):
        callers = Callers(url)
        callers.run()
        assert rpc.get_debug_info()["calls_waiting"] == 0
    assert callers.wrong == []
    assert len(callers.answered) + callers.failed.total() == CALLS
    assert max(executed.values()) == 1
    assert all(executed[token] == 1 for token in callers.answered)
    assert set(callers.failed) == {PeerLost}  # none waited for its timeout
    assert callers.failed.total() > 0
    assert len(callers.answered) > CALLS / 4  # while a worker comes back, calls of it fail at once
    assert len(executed) <= CALLS
