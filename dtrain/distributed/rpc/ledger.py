"""Who holds which remote reference: the counting, as a state machine without I/O.

Owns: `Ledger`, one worker's books. A reference is named (creator, number) and lives at its owner.
The owner keeps credits: how often each worker was given the reference, less what it has handed
back. A worker that drops its last handle hands back all that it was given, in one message. Rules:
1. channels are ordered from one worker to another, and nothing more is assumed. 2. Who passes on a
reference that it does not own keeps it pinned until the owner has written down the receiver, so
that the owner never counts zero while a copy is under way. 3. A worker that dies gives back
whatever it held, and is no reason to keep anything pinned.

The messages: ADD (receiver to owner: "I have this from `giver`"), FREE (owner to giver: "`receiver`
is in the books, let go of your pin"), DROP (holder to owner: "here are my credits back"). Passing
on costs two messages, giving and handing back by the owner one, at the end. Who makes a reference
to a value of another may pass it on before the owner has heard of it: an ADD that comes too early
is written down, and ASK (owner to creator) with TOLD (back) says whether the name is still to come,
since TOLD comes behind all that the creator has said of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

ADD, FREE, DROP, ASK, TOLD = "add", "free", "drop", "ask", "told"


class Name(NamedTuple):
    """Which reference: the worker that thought up the name, its number there, and the owner."""

    creator: int
    number: int
    owner: int


# (to whom, what to say: [kind, name, worker or amount])
Letter = tuple[int, list[Any]]


class Ledger:
    """The books of worker `rank`. Every method returns the messages to send; not thread-safe."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.credits: dict[Name, Counter[int]] = {}  # as the owner: what each worker has been given
        self.local: set[Name] = set()  # as the owner: what this worker itself has handles of
        # What was passed on, and to whom, of whom the owner does not know yet.
        self.pins: dict[Name, Counter[int]] = {}
        self.touched: set[Name] = set()  # as the owner: what may have become nobody's
        self.early: set[Name] = set()  # as the owner: held already, and not yet created
        self.lost: set[int] = set()

    def create(self, name: Name, holder: int) -> None:
        """As the owner: `holder` (perhaps this worker itself) begins to hold `name`."""
        credits = self.credits.setdefault(name, Counter())
        self.early.discard(name)
        self.touched.add(name)  # its holder may be dead
        if holder == self.rank:
            self.local.add(name)
        elif holder not in self.lost:
            credits[holder] += 1

    def give(self, name: Name, receiver: int) -> None:
        """This worker is about to send `name` to `receiver`; before the message is sent."""
        if receiver in (self.rank, name.owner) or receiver in self.lost:
            return
        if name.owner == self.rank:
            if name in self.credits:  # else: its value is gone, and nobody is counted
                self.credits[name][receiver] += 1
        else:
            self.pins.setdefault(name, Counter())[receiver] += 1

    def take(self, name: Name, giver: int) -> tuple[int, list[Letter]]:
        """`name` came in a message of `giver`: (credits that the handle now has, messages)."""
        if name.owner == self.rank:
            self.local.add(name)
            return 0, []
        if giver == self.rank:
            return 0, []
        if giver == name.owner:
            return 1, []
        return 1, [(name.owner, [ADD, list(name), giver])]

    def drop(self, name: Name, credits: int) -> list[Letter]:
        """The last handle of `name` in this worker is gone; it had so many credits."""
        if name.owner == self.rank:
            self.local.discard(name)
            self.touched.add(name)
            return []
        if credits == 0 or name.owner in self.lost:
            return []
        return [(name.owner, [DROP, list(name), credits])]

    def hear(self, sender: int, kind: str, name: Name, number: int) -> list[Letter]:
        """A message of another worker's ledger. ValueError for one that makes no sense here."""
        if kind == ADD:
            return self._add(sender, name, number)
        if kind == DROP:
            credits = self.credits.get(name, Counter())
            credits[sender] -= number
            self.touched.add(name)
        elif kind == FREE:
            self._unpin(name, number, 1)
        elif kind == ASK:
            return [] if sender in self.lost else [(sender, [TOLD, list(name), 0])]
        elif kind == TOLD:
            self._forget_early([name])
        else:
            raise ValueError(f"unknown message {kind!r} about a reference")
        return []

    def _add(self, holder: int, name: Name, giver: int) -> list[Letter]:
        letters: list[Letter] = []
        if giver not in self.lost:
            letters.append((giver, [FREE, list(name), holder]))
        if name not in self.credits and name.creator not in (self.rank, *self.lost):
            self.early.add(name)
            self.credits[name] = Counter()
            letters.append((name.creator, [ASK, list(name), 0]))
        if name in self.credits and holder not in self.lost:  # else: it died with a giver
            self.credits[name][holder] += 1
        return letters

    def _forget_early(self, names: Iterable[Name]) -> None:
        """What has not been created by now never will be: it is gone already, or its creator is."""
        for name in self.early.intersection(names):
            self.early.discard(name)
            self.credits.pop(name, None)

    def _unpin(self, name: Name, receiver: int, by: int | None = None) -> None:
        """Let go of one pin, or all; of none if `receiver` has died since."""
        pins = self.pins.get(name)
        if pins is None or receiver not in pins:
            return
        pins[receiver] -= pins[receiver] if by is None else by
        if not pins[receiver]:
            del pins[receiver]
        if not pins:
            del self.pins[name]

    def lose(self, worker: int) -> None:
        """`worker` is dead: what it held is handed back, what was on its way to it is let go."""
        self.lost.add(worker)
        for credits in self.credits.values():
            credits.pop(worker, None)
        self._forget_early([name for name in self.early if name.creator == worker])
        self.touched.update(self.credits)
        for name in list(self.pins):
            self._unpin(name, worker)

    def holders(self, name: Name) -> list[int]:
        """As the owner: the other workers that hold `name`."""
        return sorted(worker for worker, n in self.credits.get(name, {}).items() if n)

    def pinned(self, name: Name) -> bool:
        """Whether this worker has passed on `name` to one of whom the owner does not know yet."""
        return name in self.pins

    def dead(self, name: Name) -> bool:
        """As the owner: whether nobody holds `name` any more."""
        held = name in self.local or name in self.early or any(self.credits[name].values())
        return not held

    def sweep(self) -> list[Name]:
        """As the owner: forget, and return, what nobody holds any more."""
        gone = [name for name in self.touched if name in self.credits and self.dead(name)]
        self.touched.clear()
        for name in gone:
            del self.credits[name]
        return gone
