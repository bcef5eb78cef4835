"""What a key-value store can do, and the one table of commands behind every kind of it.

Owns: `Store` (the public face) and `Table` (the meaning of each command, without any waiting or
I/O). Rules: a `Table` method either returns a value or raises `NotYet`; the kinds of store differ
only in how they reach the table and how they wait. Values are bytes, keys are str, times are
seconds as float. Nothing is ever pickled.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

from dtrain.errors import DistStoreError, QueueEmptyError, StoreTimeout

__all__ = [
    "DEFAULT_TIMEOUT",
    "MUTATING",
    "NotYet",
    "Store",
    "Table",
    "Timeout",
    "as_seconds",
    "timed_out",
]

DEFAULT_TIMEOUT = 300.0

MUTATING = frozenset(
    {"set", "multi_set", "append", "add", "delete_key", "compare_set", "join"}
    | {"queue_push", "queue_pop"}
)

Timeout = float | timedelta


def as_seconds(timeout: Timeout) -> float:
    """A timeout, as a timedelta or a number of seconds, in seconds."""
    return timeout.total_seconds() if isinstance(timeout, timedelta) else float(timeout)


class NotYet(Exception):
    """The command must wait for `keys` (and, in a gather, for `ranks`)."""

    def __init__(self, keys: Iterable[str], ranks: Iterable[int] = ()) -> None:
        super().__init__()
        self.keys, self.ranks = list(keys), list(ranks)


def timed_out(waiting: NotYet, waited: float) -> StoreTimeout:
    """The error of a command that waited in vain."""
    return StoreTimeout(waited, waiting.keys, waiting.ranks)


class _Gather:
    """The rounds of one gather key: `open` is filled by rank, `complete` rounds wait to be
    collected.
    """

    __slots__ = ("complete", "number", "open", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self.number = 0
        self.open: dict[int, bytes] = {}
        self.complete: dict[int, tuple[list[bytes], set[int]]] = {}

    def join(self, rank: int, value: bytes) -> int:
        number = self.number
        self.open[rank] = value
        if len(self.open) == self.size:
            self.complete[number] = ([self.open[r] for r in range(self.size)], set())
            self.open = {}
            self.number += 1
        return number


class Table:
    """The keys of one store. `do(command, args)` is the only door; not thread-safe by itself."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}
        self._queues: dict[str, deque[bytes]] = {}  # an empty queue is dropped
        self._gathers: dict[str, _Gather] = {}

    def do(self, command: str, args: Sequence[Any]) -> Any:
        """Run one command.

        Raises `NotYet` when it has to wait, `DistStoreError` when it is wrong.
        """
        if command not in _COMMANDS:
            raise DistStoreError(f"unknown store command {command!r}")
        return getattr(self, f"_{command}")(*args)

    def _set(self, key: str, value: bytes) -> None:
        self._values[key] = value

    def _get(self, key: str) -> bytes:
        return self._multi_get([key])[0]

    def _multi_get(self, keys: list[str]) -> list[bytes]:
        missing = [key for key in keys if key not in self._values]
        if missing:
            raise NotYet(missing)
        return [self._values[key] for key in keys]

    def _multi_set(self, keys: list[str], values: list[bytes]) -> None:
        self._values.update(zip(keys, values, strict=True))

    def _append(self, key: str, value: bytes) -> None:
        self._values[key] = self._values.get(key, b"") + value

    def _add(self, key: str, amount: int) -> int:
        try:
            total = int(self._values.get(key, b"0")) + amount
        except ValueError:
            raise DistStoreError(f"add: the value of key {key!r} is not a number") from None
        self._values[key] = str(total).encode()
        return total

    def _check(self, keys: list[str]) -> bool:
        return all(self._has(key) for key in keys)

    def _has(self, key: str) -> bool:
        return key in self._values or key in self._queues

    def _wait(self, keys: list[str]) -> None:
        missing = [key for key in keys if not self._has(key)]
        if missing:
            raise NotYet(missing)

    def _delete_key(self, key: str) -> bool:
        return self._values.pop(key, None) is not None

    def _compare_set(self, key: str, expected: bytes, desired: bytes) -> bytes:
        current = self._values.get(key)
        if current == expected or (current is None and not expected):
            self._values[key] = desired
            return desired
        return expected if current is None else current

    def _num_keys(self) -> int:
        return len(self._values)

    def _list_keys(self, prefix: str) -> list[str]:
        return [key for key in self._values if key.startswith(prefix)]

    def _queue_push(self, key: str, value: bytes) -> None:
        self._queues.setdefault(key, deque()).append(value)

    def _queue_pop(self, key: str, block: bool) -> bytes:
        if key not in self._queues:
            if block:
                raise NotYet([key])
            raise QueueEmptyError(f"queue {key!r} is empty")
        queue = self._queues[key]
        value = queue.popleft()
        if not queue:
            del self._queues[key]
        return value

    def _queue_len(self, key: str) -> int:
        return len(self._queues.get(key, ()))

    def _join(self, key: str, rank: int, size: int, value: bytes) -> int:
        """Put one rank's value into the open round of a gather.

        Returns the number of that round.
        """
        gather = self._gathers.setdefault(key, _Gather(size))
        if gather.size != size:
            raise DistStoreError(
                f"gather {key!r}: rank {rank} expects {size} ranks, others expect {gather.size}"
            )
        if rank in gather.open:
            raise DistStoreError(
                f"gather {key!r}: rank {rank} has already joined: two processes have the same rank,"
                " or the store is left over from an earlier run (give each run its own)"
            )
        return gather.join(rank, value)

    def _collect(self, key: str, number: int, rank: int) -> list[bytes]:
        """The values of a complete round; forgotten once every rank has collected them."""
        gather = self._gathers[key]
        if number not in gather.complete:
            raise NotYet([key], [r for r in range(gather.size) if r not in gather.open])
        values, served = gather.complete[number]
        served.add(rank)
        if len(served) == gather.size:
            del gather.complete[number]
        return values


_COMMANDS = MUTATING | {
    *("get", "multi_get", "check", "wait", "num_keys", "list_keys", "queue_len", "collect"),
}


def _as_bytes(value: bytes | str) -> bytes:
    return value.encode() if isinstance(value, str) else bytes(value)


class Store(ABC):
    """A key-value store shared by the ranks of a job; safe to use from several threads.

    Calls that wait (`get`, `multi_get`, `wait`, `queue_pop`, `gather`) do so for the store's own
    `timeout`, or for their argument `timeout` (a timedelta or seconds) where they have one, and
    then raise `StoreTimeout` naming the missing keys (and ranks). All other failures are
    `DistStoreError`. Names and meanings follow torch.distributed.Store.
    """

    def __init__(self, timeout: Timeout = DEFAULT_TIMEOUT) -> None:
        self._patience = as_seconds(timeout)

    @property
    def timeout(self) -> timedelta:
        """How long calls wait that are not told otherwise."""
        return timedelta(seconds=self._patience)

    def set_timeout(self, timeout: Timeout) -> None:
        """Set `timeout` for this object alone; a call that waits already is not affected."""
        self._patience = as_seconds(timeout)

    @abstractmethod
    def _call(self, command: str, args: list[Any], timeout: float) -> Any:
        """Run `command` against the table; wait at most `timeout` seconds until it is possible."""

    @abstractmethod
    def _gather(self, key: str, rank: int, size: int, value: bytes, timeout: float) -> list[bytes]:
        """Join a round of the gather, wait until it is complete, collect it."""

    def set(self, key: str, value: bytes | str) -> None:
        """Store `value` under `key`, replacing what is there."""
        self._call("set", [key, _as_bytes(value)], self._patience)

    def get(self, key: str, timeout: Timeout | None = None) -> bytes:
        """The value of `key`; waits until there is one."""
        return bytes(self._call("get", [key], self._wait_for(timeout)))

    def multi_get(self, keys: Iterable[str]) -> list[bytes]:
        """The values of `keys`, all of one moment; waits until all of them exist."""
        return list(self._call("multi_get", [list(keys)], self._patience))

    def multi_set(self, keys: Iterable[str], values: Iterable[bytes | str]) -> None:
        """Store value i under key i, for all at one moment; ValueError unless equally many."""
        names, contents = list(keys), [_as_bytes(value) for value in values]
        if len(names) != len(contents):
            raise ValueError(f"multi_set: {len(names)} keys, but {len(contents)} values")
        self._call("multi_set", [names, contents], self._patience)

    def append(self, key: str, value: bytes | str) -> None:
        """Put `value` behind what is stored under `key` (nothing when it is new)."""
        self._call("append", [key, _as_bytes(value)], self._patience)

    def add(self, key: str, amount: int) -> int:
        """Add to the counter `key` (0 when it is new) and return its new value.

        Kept as decimal text.
        """
        return int(self._call("add", [key, int(amount)], self._patience))

    def check(self, keys: Iterable[str]) -> bool:
        """Whether all `keys` exist now, or are queues that are not empty."""
        return bool(self._call("check", [list(keys)], self._patience))

    def wait(self, keys: Iterable[str], timeout: Timeout | None = None) -> None:
        """Wait until all `keys` exist, or are queues that are not empty."""
        self._call("wait", [list(keys)], self._wait_for(timeout))

    def delete_key(self, key: str) -> bool:
        """Remove `key`; whether it was there."""
        return bool(self._call("delete_key", [key], self._patience))

    def compare_set(self, key: str, expected: bytes | str, desired: bytes | str) -> bytes:
        """Set `key` to `desired` if its value is `expected` (or it is absent and `expected` is
        empty).

        Returns the value after the call; for an absent key that was not set, `expected`, as torch
        does.
        """
        args = [key, _as_bytes(expected), _as_bytes(desired)]
        return bytes(self._call("compare_set", args, self._patience))

    def num_keys(self) -> int:
        """How many keys there are; gathers are not keys."""
        return int(self._call("num_keys", [], self._patience))

    def list_keys(self) -> list[str]:
        """The keys there are now; queues and gathers are not keys."""
        return list(self._call("list_keys", [""], self._patience))

    def queue_push(self, key: str, value: bytes | str) -> None:
        """Put `value` at the end of the queue `key`. Queues and keys do not share names."""
        self._call("queue_push", [key, _as_bytes(value)], self._patience)

    def queue_pop(self, key: str, block: bool = True) -> bytes:
        """Take the first value of the queue `key`, which nobody else gets.

        An empty queue is waited for, or without `block` raises `QueueEmptyError`.
        """
        return bytes(self._call("queue_pop", [key, bool(block)], self._patience))

    def queue_len(self, key: str) -> int:
        """How many values wait in the queue `key`."""
        return int(self._call("queue_len", [key], self._patience))

    def barrier(self, key: str, world_size: int, timeout: Timeout | None = None) -> None:
        """Wait until this has been called `world_size` times with `key`; counts in rounds."""
        arrived = self.add(f"{key}/arrived", 1)
        gate = f"{key}/round {(arrived - 1) // world_size} of {world_size}"
        if arrived % world_size == 0:
            self.set(gate, b"")
        self.wait([gate], timeout)

    def has_extended_api(self) -> bool:
        """True: every kind of store has `append`, `multi_get` and `multi_set`."""
        return True

    @abstractmethod
    def clone(self) -> Store:
        """Another client of the same keys, with a `timeout` of its own; close it like this one."""

    def network_host(self) -> str | None:
        """The host at which a network reaches the store; None for a store that is not on one."""
        return None

    def gather(
        self, key: str, rank: int, size: int, value: bytes, timeout: Timeout | None = None
    ) -> list[bytes]:
        """Give `value` and get the values of all `size` ranks, in rank order: one round trip per
        rank.

        The n-th call with the same key is the n-th round. Raises `StoreTimeout` whose `ranks` are
        those that did not come, `DistStoreError` when a rank joins a round twice or the ranks
        disagree about `size`.
        """
        if not 0 <= rank < size:
            raise ValueError(f"gather {key!r}: rank {rank} is not in range({size})")
        return self._gather(key, rank, size, bytes(value), self._wait_for(timeout))

    @abstractmethod
    def close(self) -> None:
        """Give back sockets, threads and files; idempotent."""

    def _wait_for(self, timeout: Timeout | None) -> float:
        return self._patience if timeout is None else as_seconds(timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
