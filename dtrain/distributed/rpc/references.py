"""The references of one worker: its handles, the values it owns, and its books of both.

Owns: `References`, which joins the pure `Ledger` to handles that die when they like. Thread-safe.
Rules: 1. what is given away is in the books before it is sent (`give`). 2. A handle whose reference
is passed on is kept until the owner knows the receiver. 3. Values are let go of in the pool: what
users wrote into `__del__` does not belong into the I/O thread.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

from dtrain.comm.record import call_site
from dtrain.distributed.rpc.calls import RpcFuture
from dtrain.distributed.rpc.ledger import Ledger, Letter, Name
from dtrain.distributed.rpc.pool import Pool
from dtrain.distributed.rpc.rref import RRef
from dtrain.errors import DistError

__all__ = ["References"]


class References:
    """Those of worker `rank`. `post(to, letter)` sends what the books have to say to another."""

    def __init__(self, agent: Any, rank: int, pool: Pool, post: Callable[..., None]) -> None:
        self.rank = rank
        self.values: dict[Name, RpcFuture] = {}
        self._agent, self._pool, self._post = agent, pool, post
        self._lock = threading.RLock()
        self._ledger = Ledger(rank)
        self._numbers = itertools.count()
        self._handles: WeakValueDictionary[Name, RRef] = WeakValueDictionary()
        self._pinned: dict[Name, RRef] = {}
        self._dropped: deque[tuple[Name, int]] = deque()
        self._sites: dict[Name, str] = {}  # where those that live here were made
        self.told = 0  # letters to others
        self._freeing = 0  # how many tasks of the pool let go of values just now
        self._awaited: set[Name] = set()  # live here once their creator's call has come

    def new_name(self, owner: int) -> Name:
        """A name for a value that `owner` has or will have."""
        return Name(self.rank, next(self._numbers), owner)

    def adopt(self, handle: RRef, value: Any) -> None:
        """Keep `value` under the name of `handle`."""
        cell = RpcFuture(self._pool)
        cell.set_result(value)
        with self._lock:
            self._ledger.create(handle.name, self.rank)
            self.values[handle.name] = cell
            self._handles[handle.name] = handle
            self._sites[handle.name] = call_site()

    def expect(self, owner: int) -> RRef:
        """The handle of a value that `owner` is about to make."""
        with self._lock:
            handle = self.handle(self.new_name(owner))
            handle.credits = int(owner != self.rank)
        return handle

    def create(self, name: Name, holder: int, site: str) -> None:
        """Make room for a value that this worker is about to make for `holder`, at `site` there."""
        with self._lock:
            self._sites[name] = site
            self._ledger.create(name, holder)
            self.values.setdefault(name, RpcFuture(self._pool))  # others may wait for it already
            self._awaited.discard(name)

    def cell(self, name: Name) -> RpcFuture:
        """Where the value called `name` will be, or would be if somebody still held it."""
        with self._lock:
            found = self.values.get(name)
            return RpcFuture(self._pool) if found is None else found

    def handle(self, name: Name) -> RRef:
        """The handle of `name`, the one there is or a new one."""
        with self._lock:
            handle = self._handles.get(name)
            if handle is None:
                handle = self._handles[name] = RRef._of(self._agent, name)
            return handle

    def give(self, handles: Iterable[RRef], to: int) -> None:
        """A message with these references is about to be sent."""
        with self._lock:
            for handle in handles:
                self._ledger.give(handle.name, to)
                if self._ledger.pinned(handle.name):
                    self._pinned[handle.name] = handle

    def take(self, names: Iterable[Any], sender: int) -> list[RRef]:
        """A message with these references has come; their handles, to be kept until it is read."""
        held = []
        with self._lock:
            for parts in names:
                credits, letters = self._ledger.take(Name(*parts), sender)
                held.append(self.handle(Name(*parts)))
                held[-1].credits += credits
                self._mail(letters)
        return held

    def hear(self, sender: int, kind: str, name: list[int], number: int) -> None:
        """What the books of another worker say."""
        with self._lock:
            self._mail(self._ledger.hear(sender, kind, Name(*name), number))
            if not self._ledger.pinned(Name(*name)):
                self._pinned.pop(Name(*name), None)
            self._await_early()

    def _await_early(self) -> None:
        """Room for values that others hold already; those that will not come are errors."""
        early = self._ledger.early
        for name in early - self._awaited:
            self.values[name] = RpcFuture(self._pool)
        for name in self._awaited - early:
            self.values.pop(name).set_exception(gone(name))
        self._awaited = set(early)

    def _mail(self, letters: list[Letter]) -> None:
        for to, letter in letters:
            if to == self.rank:
                self.hear(self.rank, *letter)
            else:
                self.told += 1
                self._post(to, letter)

    def lose(self, worker: int) -> None:
        """`worker` is dead: it holds nothing, and nothing is kept for it."""
        with self._lock:
            self._ledger.lose(worker)
            self._await_early()
            for name in [n for n in self._pinned if not self._ledger.pinned(n)]:
                del self._pinned[name]

    def note_drop(self, name: Name, credits: int) -> None:
        """The last handle is gone: for finalizers, takes no lock."""
        self._dropped.append((name, credits))

    def collect(self) -> None:
        """Hand back dropped handles; let go of values that nobody holds."""
        freed = []
        with self._lock:
            while self._dropped:
                name, credits = self._dropped.popleft()
                if name.owner != self.rank or name not in self._handles:
                    self._mail(self._ledger.drop(name, credits))
            for name in self._ledger.sweep():
                freed.append(self.values.pop(name, None))
                self._sites.pop(name, None)
            self._freeing += bool(freed)
        if freed:
            self._pool.submit(partial(self._let_go, freed))

    def _let_go(self, values: list[Any]) -> None:
        values.clear()
        with self._lock:
            self._freeing -= 1

    def settled(self) -> bool:
        """Whether what was dropped is in the books, with all that it held itself.

        Asked again and again: letting go of one value may drop handles of others.
        """
        self.collect()
        with self._lock:
            return not self._freeing and not self._dropped

    def holds_others(self) -> bool:
        """Whether there are handles here of values of other workers."""
        with self._lock:
            return any(name.owner != self.rank for name in self._handles)

    def counts(self) -> dict[str, int]:
        """How many there are, as `rpc._get_debug_info` names them."""
        with self._lock:
            handles = list(self._handles.values())
            return {
                "num_owner_rrefs": len(self.values),
                "num_forks": sum(len(self._ledger.holders(name)) for name in self.values),
                "num_pending_futures": sum(not cell.done() for cell in self.values.values()),
                "num_pending_users": sum(not handle.confirmed_by_owner() for handle in handles),
            }

    def info(self) -> dict[str, Any]:
        """What lives here, who holds it, and what of others is held here."""
        with self._lock:
            names = self._agent.names
            owned, others = list(self.values), [n for n in self._handles if n.owner != self.rank]
            return {
                "owned": {shown(n): [names[h] for h in self._ledger.holders(n)] for n in owned},
                "held": {shown(n): names[n.owner] for n in others},
                "made_at": {shown(n): self._sites.get(n, "?") for n in owned},
                "pinned": len(self._pinned),
            }


def gone(name: Name) -> DistError:
    """What there is to say of a value that does not live here any more."""
    return DistError(
        f"the value of {shown(name)} is gone: the worker that passed on this reference died before "
        "its owner knew of it"
    )


def shown(name: Name) -> str:
    """A name as people read it: CREATOR.NUMBER."""
    return f"{name.creator}.{name.number}"
