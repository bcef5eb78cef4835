"""What every store must do: checks that run against any kind of it.

Owns: `STORE_CHECKS`, so that a test can be parametrised by one check, and `check_store` for all of
them. Each check gets `connect`, which returns one more client of one and the same fresh store. A
failed check raises AssertionError.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

from dtrain.comm.store.base import Store
from dtrain.errors import DistStoreError, QueueEmptyError, StoreTimeout

__all__ = ["STORE_CHECKS", "Connect", "check_store", "expect"]

Connect = Callable[[], Store]


def expect(kind: type[BaseException], call: Callable[[], Any]) -> BaseException:
    """The error of class `kind` that `call` raises; AssertionError when it raises none."""
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"expected {kind.__name__}, nothing was raised")


def _store_keeps_values(connect: Connect) -> None:
    one, two = connect(), connect()
    one.set("key", b"\0value")
    one.set("text", "words")
    assert two.get("key") == b"\0value"
    assert two.get("text") == b"words"
    two.set("key", b"")
    assert one.get("key") == b""
    assert one.num_keys() == 2
    assert two.delete_key("key")
    assert not one.delete_key("key")
    assert not one.check(["key"])
    assert one.check(["text"])
    assert one.check([])


def _store_counts(connect: Connect) -> None:
    one, two = connect(), connect()
    assert one.add("n", 3) == 3
    assert two.add("n", -5) == -2
    assert one.get("n") == b"-2"
    one.set("word", "x")
    expect(DistStoreError, lambda: two.add("word", 1))


def _store_compares_and_sets(connect: Connect) -> None:
    store = connect()
    assert store.compare_set("key", "other", "new") == b"other"
    assert not store.check(["key"])
    assert store.compare_set("key", "", "new") == b"new"
    assert store.compare_set("key", "wrong", "newer") == b"new"
    assert store.compare_set("key", "new", "newer") == b"newer"


def _store_handles_many_keys(connect: Connect) -> None:
    one, two = connect(), connect()
    one.multi_set(["a", "b"], [b"1", "2"])
    assert two.multi_get(["b", "a"]) == [b"2", b"1"]
    two.append("a", "x")
    two.append("new", b"y")
    assert one.multi_get(["a", "new"]) == [b"1x", b"y"]
    assert sorted(one.list_keys()) == ["a", "b", "new"]
    assert one.has_extended_api()
    expect(ValueError, lambda: one.multi_set(["a"], []))
    one.set_timeout(0.01)
    error = expect(StoreTimeout, lambda: one.multi_get(["a", "none"]))
    assert isinstance(error, StoreTimeout)
    assert [key.rpartition("/")[2] for key in error.keys] == ["none"]


def _store_queues(connect: Connect) -> None:
    """Values come out in the order they went in, each to one taker; a taker can wait."""
    one, two = connect(), connect()
    assert one.queue_len("jobs") == 0
    expect(QueueEmptyError, lambda: one.queue_pop("jobs", block=False))
    for value in (b"1", "2", b""):
        one.queue_push("jobs", value)
    assert two.queue_len("jobs") == 3
    assert two.check(["jobs"])
    two.wait(["jobs"], 5)
    assert [two.queue_pop("jobs"), one.queue_pop("jobs", False), two.queue_pop("jobs")] == [
        *(b"1", b"2", b""),
    ]
    assert not one.check(["jobs"])
    with ThreadPoolExecutor(2) as pool:
        takers = [pool.submit(store.queue_pop, "late") for store in (one, two)]
        one.queue_push("late", "a")
        two.queue_push("late", "b")
        assert {taker.result(10) for taker in takers} == {b"a", b"b"}
    one.set_timeout(timedelta(milliseconds=10))
    error = expect(StoreTimeout, lambda: one.queue_pop("late"))
    assert isinstance(error, StoreTimeout)
    assert [key.rpartition("/")[2] for key in error.keys] == ["late"]


def _store_barrier(connect: Connect) -> None:
    stores = [connect() for _ in range(3)]
    expect(StoreTimeout, lambda: stores[0].barrier("alone", 2, 0.01))
    with ThreadPoolExecutor(3) as pool:
        for turn in range(2):
            list(pool.map(lambda store: store.barrier("all", 3, 10.0), stores))
            assert stores[0].get("all/arrived") == b"%d" % (3 * turn + 3)


def _store_clones(connect: Connect) -> None:
    one = connect()
    with one.clone() as two:
        assert type(two) is type(one)
        one.set("key", "value")
        assert two.get("key") == b"value"
        before = one.timeout
        two.set_timeout(timedelta(seconds=7))
        assert (one.timeout, two.timeout) == (before, timedelta(seconds=7))
    assert one.get("key") == b"value"


def _store_wakes_who_waits(connect: Connect) -> None:
    one, two = connect(), connect()
    with ThreadPoolExecutor(2) as pool:
        value = pool.submit(one.get, "late", 10.0)
        keys = pool.submit(one.wait, ["late", "later"], 10.0)
        two.set("late", b"1")
        two.set("later", b"2")
        assert value.result(10) == b"1"
        assert keys.result(10) is None


def _store_times_out(connect: Connect) -> None:
    store = connect()
    store.set("here", b"")
    started = time.monotonic()
    error = expect(StoreTimeout, lambda: store.wait(["here", "a", "b"], 0.05))
    assert isinstance(error, StoreTimeout)
    assert 0.04 < time.monotonic() - started < 2.0
    assert [key.rpartition("/")[2] for key in error.keys] == ["a", "b"]
    assert "after 0.1 s" in str(error) or "after 0.0 s" in str(error)
    expect(StoreTimeout, lambda: store.get("a", 0.0))
    assert store.get("here") == b""  # the store is as good as before


def _store_gathers(connect: Connect) -> None:
    stores = [connect() for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for turn in range(3):
            results = pool.map(
                lambda r, turn=turn: stores[r].gather("all", r, 4, b"%d %d" % (turn, r), 10.0),
                range(4),
            )
            expected = [b"%d %d" % (turn, r) for r in range(4)]
            assert list(results) == [expected] * 4
    assert stores[0].gather("alone", 0, 1, b"me") == [b"me"]


def _store_gather_names_the_missing(connect: Connect) -> None:
    one, two = connect(), connect()
    error = expect(StoreTimeout, lambda: one.gather("some", 1, 3, b"", 0.05))
    assert isinstance(error, StoreTimeout)
    assert error.ranks == [0, 2]
    error = expect(DistStoreError, lambda: two.gather("some", 1, 3, b"", 5.0))
    assert "rank 1 has already joined" in str(error)
    error = expect(DistStoreError, lambda: two.gather("some", 0, 2, b"", 5.0))
    assert "expects 2 ranks, others expect 3" in str(error)
    expect(ValueError, lambda: two.gather("some", 3, 3, b""))


def _store_serves_threads(connect: Connect) -> None:
    store = connect()
    with ThreadPoolExecutor(8) as pool:
        totals = sorted(pool.map(lambda _: store.add("n", 1), range(80)))
    assert totals == list(range(1, 81))


STORE_CHECKS: dict[str, Callable[[Connect], None]] = {
    "keeps values": _store_keeps_values,
    "counts": _store_counts,
    "compares and sets": _store_compares_and_sets,
    "handles many keys": _store_handles_many_keys,
    "queues": _store_queues,
    "clones": _store_clones,
    "barrier": _store_barrier,
    "wakes who waits": _store_wakes_who_waits,
    "times out": _store_times_out,
    "gathers": _store_gathers,
    "gather names the missing": _store_gather_names_the_missing,
    "serves threads": _store_serves_threads,
}


def check_store(connect: Connect) -> None:
    """Run every check against one store.

    `connect` must give a client of a store without keys to each check.
    """
    for check in STORE_CHECKS.values():
        check(connect)
