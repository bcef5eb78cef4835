"""The books of references, explored: every order of messages of three workers and two references.

The world: worker 0 owns reference A, worker 1 owns B; or worker 2 has just made R on worker 0, and
that has not heard of it. Who holds one may pass it to anybody, and drop it; messages between two
workers keep their order. A bound on how often references are passed on makes the number of states
finite.
"""

from __future__ import annotations

import copy

import pytest

from dtrain.distributed.rpc.ledger import ADD, ASK, FREE, TOLD, Ledger, Name

A, B, R = Name(0, 0, 0), Name(1, 0, 1), Name(2, 0, 0)
WORKERS = range(3)


class World:
    """Three ledgers, the channels between them, and the credits of each worker's handle.

    `mortal`: a worker that may die at any moment; the others learn it one by one, behind what it
    sent.
    """

    def __init__(self, names, passes, mortal=None):
        self.mortal, self.dead = mortal, False
        self.ledgers = [Ledger(rank) for rank in WORKERS]
        self.channels = {(a, b): [] for a in WORKERS for b in WORKERS if a != b}
        self.handles = {}
        self.freed = set()
        self.passes = passes
        for name in names:
            self.handles[name.creator, name] = int(name.creator != name.owner)
            if name.creator == name.owner:
                self.ledgers[name.owner].create(name, name.owner)
            else:
                self.channels[name.creator, name.owner].append(["create", name, None])

    def key(self):
        books = tuple(
            (
                tuple(sorted((n, tuple(sorted(c.items()))) for n, c in ledger.credits.items())),
                (tuple(sorted(ledger.local)), tuple(sorted(ledger.early))),
                tuple(sorted((n, tuple(sorted(p.items()))) for n, p in ledger.pins.items())),
            )
            for ledger in self.ledgers
        )
        channels = tuple(tuple(map(repr, self.channels[pair])) for pair in sorted(self.channels))
        return books, channels, tuple(sorted(self.handles.items())), self.passes, self.dead

    def moves(self):
        if self.mortal is not None and not self.dead:
            yield "die", self.mortal, None
        for (worker, name), _ in self.handles.items():
            if not self.ledgers[worker].pinned(name):  # a pin holds the handle
                yield "drop", worker, name
            if self.passes:
                for other in WORKERS:
                    if other != worker:
                        yield "pass", (worker, other), name
        for pair, queue in self.channels.items():
            if queue:
                yield "deliver", pair, None

    def post(self, sender, letters):
        for to, letter in letters:
            self.channels[sender, to].append(letter)

    def after(self, move, where, name):
        world = copied(self)
        world.ledgers = [copied(ledger) for ledger in self.ledgers]
        if move == "die":
            world.die(where)
        elif move == "drop":
            credits = world.handles.pop((where, name))
            world.post(where, world.ledgers[where].drop(name, credits))
        elif move == "pass":
            world.passes -= 1
            world.ledgers[where[0]].give(name, where[1])
            world.channels[where].append(["reference", name, where[0]])
        else:
            kind, name, number = world.channels[where].pop(0)
            receiver = where[1]
            if world.dead and receiver == world.mortal:
                letters = []
            elif kind == "died":
                world.ledgers[receiver].lose(where[0])
                letters = []
            elif kind == "create":
                world.ledgers[receiver].create(name, where[0])
                letters = []
            elif kind == "reference":
                credits, letters = world.ledgers[receiver].take(Name(*name), number)
                held = world.handles.get((receiver, Name(*name)), 0)
                world.handles[receiver, Name(*name)] = held + credits
            else:
                letters = world.ledgers[receiver].hear(where[0], kind, Name(*name), number)
            world.post(receiver, letters)
        for rank in WORKERS:
            world.freed.update(world.ledgers[rank].sweep())
        return world

    def die(self, worker):
        """It holds nothing, hears nothing, and its death is the last that is heard of it."""
        self.dead = True
        self.handles = {(w, n): c for (w, n), c in self.handles.items() if w != worker}
        self.ledgers[worker] = Ledger(worker)
        for a, b in self.channels:
            if b == worker:
                self.channels[a, b].clear()
            if a == worker:
                self.channels[a, b].append(["died", None, None])

    def alive(self):
        """The references that somebody holds or will get."""
        under_way = {
            Name(*m[1]) for queue in self.channels.values() for m in queue if m[0] == "reference"
        }
        return under_way | {name for _, name in self.handles}


def blank(ledger):
    return not any((ledger.credits, ledger.local, ledger.pins, ledger.early))


def copied(thing):
    """A copy with its own containers and those inside of them: deepcopy takes most of the time."""
    made = copy.copy(thing)
    for name, part in vars(thing).items():
        inner = isinstance(part, dict)
        setattr(
            made, name, {k: copy.copy(v) for k, v in part.items()} if inner else copy.copy(part)
        )
    return made


def explore(*world):
    """Every reachable state, each once."""
    first = World(*world)
    seen, todo = {first.key()}, [first]
    while todo:
        world = todo.pop()
        yield world
        for move in list(world.moves()):
            following = world.after(*move)
            key = following.key()
            if key not in seen:
                seen.add(key)
                todo.append(following)


@pytest.mark.parametrize(("names", "passes"), [((A, B), 3), ((R,), 3)])
def test_nothing_is_freed_too_early_and_nothing_leaks(names, passes):
    states = 0
    for world in explore(names, passes):
        states += 1
        assert not world.freed & world.alive()
        if not any(True for _ in world.moves()):  # all dropped, all delivered
            assert world.freed == set(names)
            for ledger in world.ledgers:
                assert blank(ledger)
    assert states > 1000


@pytest.mark.parametrize(
    ("names", "passes", "mortal"), [((A, B), 2, 2), ((R,), 3, 2), ((R,), 2, 1)]
)
def test_nothing_leaks_when_a_worker_dies_at_any_moment(names, passes, mortal):
    """One that owns nothing; what only it had passed on may be gone too early."""
    ends = 0
    for world in explore(names, passes, mortal):
        if world.dead and not any(True for _ in world.moves()):
            ends += 1
            for ledger in world.ledgers:
                assert blank(ledger)
    assert ends > 0


def test_the_exploration_catches_a_ledger_that_does_not_pin(monkeypatch):
    def careless(self, name, receiver):
        if name.owner == self.rank:
            self.credits[name][receiver] += 1

    monkeypatch.setattr(Ledger, "give", careless)
    monkeypatch.setattr(Ledger, "take", lambda self, name, giver: (0, []))
    with pytest.raises(AssertionError):
        test_nothing_is_freed_too_early_and_nothing_leaks((A, B), 3)


def test_the_exploration_catches_a_ledger_that_forgets_who_comes_early(monkeypatch):
    add = Ledger._add

    def careless(self, holder, name, giver):
        return add(self, holder, name, giver) if name in self.credits else []

    monkeypatch.setattr(Ledger, "_add", careless)
    with pytest.raises(AssertionError):
        test_nothing_is_freed_too_early_and_nothing_leaks((R,), 3)


def test_what_a_dead_worker_held_is_handed_back():
    ledger = Ledger(0)
    ledger.create(A, 0)
    ledger.give(A, 1)
    ledger.give(A, 2)
    ledger.drop(A, 0)
    assert ledger.sweep() == []
    ledger.lose(1)
    assert ledger.holders(A) == [2]
    ledger.lose(2)
    assert ledger.sweep() == [A]


def test_a_pin_towards_a_dead_worker_is_let_go():
    ledger = Ledger(2)
    ledger.give(A, 1)
    assert ledger.pinned(A)
    ledger.lose(1)
    assert not ledger.pinned(A)


def test_an_add_for_what_is_gone_lets_the_giver_go():
    ledger = Ledger(0)
    assert ledger.hear(1, ADD, A, 2) == [(2, [FREE, [0, 0, 0], 1])]
    assert not ledger.credits


def test_an_add_that_comes_before_the_value_is_counted_and_the_creator_is_asked():
    ledger = Ledger(0)
    letters = ledger.hear(1, ADD, R, 2)
    assert letters == [(2, [FREE, [2, 0, 0], 1]), (2, [ASK, [2, 0, 0], 0])]
    assert Ledger(2).hear(0, ASK, R, 0) == [(0, [TOLD, [2, 0, 0], 0])]
    assert ledger.holders(R) == [1]
    ledger.create(R, 2)
    ledger.hear(2, TOLD, R, 0)
    assert ledger.holders(R) == [1, 2]


def test_what_its_creator_has_not_told_of_never_comes():
    ledger = Ledger(0)
    ledger.hear(1, ADD, R, 2)
    ledger.hear(2, TOLD, R, 0)
    assert not ledger.credits
    assert not ledger.early


def test_an_unknown_message_is_an_error():
    with pytest.raises(ValueError, match="unknown message 'steal'"):
        Ledger(0).hear(1, "steal", A, 2)
