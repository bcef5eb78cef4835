"""Who takes part in a job of several nodes, decided by its head: a state machine without a clock.

The head hears messages of nodes (`heard`) and that time passes (`tick`); both return what to tell
whom, as (node, message) pairs. Nothing is sent, waited for or started here.

    GATHERING --enough nodes--> RUNNING --a rank fails, a node comes or goes--> STOPPING
        ^                          |                                               |
        +--------------------------|---- every node has reported its end ----------+
                                   +--> OVER  (all ranks succeeded, or no restart is left)

Rules: 1. a node is a member of one epoch at a time, and each epoch has a secret of its own: whoever
belongs to another one is not let in. 2. A failure uses up a restart, a change of members does not;
where the number of nodes is fixed, losing one is a failure. 3. The head is node 0; the others keep
their order from epoch to epoch, newcomers come last. 4. No two hosts' clocks are compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

GATHERING, RUNNING, STOPPING, OVER = "gathering", "running", "stopping", "over"
TRY_AGAIN = 75  # exit code: EX_TEMPFAIL of sysexits.h
LOST_NODE = 1  # exit code of a job that ends because a node is lost, or did not come

Message = dict[str, Any]
Told = list[tuple[str, Message]]


class Terms(NamedTuple):
    """What all nodes must agree on, and how long the head waits, in seconds."""

    least: int = 1
    most: int = 1
    max_restarts: int = 0
    static: bool = False  # nodes say which number they have
    join_timeout: float = 600.0
    last_call: float = 5.0
    alive_every: float = 1.0
    dead_after: float = 5.0


@dataclass(slots=True)
class Node:
    """One node that is there: what it said when it joined, and when it was heard last."""

    name: str
    host: str
    nproc: int
    addr: str
    port: int
    wanted: int
    head: bool
    arrival: int
    last_heard: float
    rank: int | None = None  # in the last epoch that it was a member of

    def __str__(self) -> str:
        return f"node {self.host}" if self.rank is None else f"node {self.rank} ({self.host})"


@dataclass(slots=True)
class Epoch:
    """One start of all ranks. `reports`: what failed on each member, in the order they came."""

    members: tuple[str, ...] = ()
    reports: dict[str, list[Message]] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)  # who they were, in words

    @property
    def waiting_for(self) -> set[str]:
        return set(self.members) - self.reports.keys()


class Meeting:
    """The head's view of the job; `draw` gives a new secret each time."""

    def __init__(self, terms: Terms, draw: Callable[[], str], now: float) -> None:
        self.terms = terms
        self.state = GATHERING
        self.nodes: dict[str, Node] = {}
        self.epoch = Epoch()
        self.number = -1  # of the epoch
        self.restarts = 0
        self.deadline: float | None = now + terms.join_timeout  # of GATHERING
        self._draw = draw
        self._arrivals = 0
        # {newcomer: what it said}: who asks for the --node-rank of a node that was not heard since.
        self._rivals: dict[str, Mapping[str, Any]] = {}
        self._told: Told = []

    def heard(self, node: str, message: Mapping[str, Any], now: float) -> Told:
        """A node said something; what is now to be told to whom."""
        if message["say"] == "join":
            self._joined(node, message, now)
        elif message["say"] == "gone":
            self._gone(node, now)
        elif node in self.nodes:
            self.nodes[node].last_heard = now
            if message["say"] != "leave":
                self._refuse_rivals(self.nodes[node])
            if message["say"] == "ended":
                self._ended(node, message, now)
            elif message["say"] == "leave":
                self._left(node, message, now)
                self._admit_rivals(now)
        elif message["say"] == "leave":
            self._rivals.pop(node, None)
        elif node not in self._rivals:
            silent = f"it was silent for {self.terms.dead_after:g} s"
            why = f"the head took this node for lost: the connection to it broke, or {silent}"
            self._tell(node, say="over", code=TRY_AGAIN, why=f"{why}. Start dtrun again here")
        return self._take()

    def tick(self, now: float) -> Told:
        """Time has passed: nodes that were silent too long are lost, deadlines come."""
        for node in list(self.nodes.values()):
            if now - node.last_heard >= self.terms.dead_after:
                self._lose(node, f"{node} is lost: silent for {self.terms.dead_after:g} s", now)
        self._admit_rivals(now)
        if self.state == GATHERING and self.deadline is not None and now >= self.deadline:
            if len(self.nodes) >= self.terms.least:
                self._form()
            else:
                here = f"{len(self.nodes)} of {self.terms.least} nodes"
                self._finish(LOST_NODE, f"only {here} came within {self.terms.join_timeout:g} s")
        return self._take()

    def next_tick(self) -> float:
        """When `tick` is to be called at the latest; infinity when nothing is awaited."""
        due = [node.last_heard + self.terms.dead_after for node in self.nodes.values()]
        if self.state == GATHERING and self.deadline is not None:
            due.append(self.deadline)
        return min(due, default=math.inf)

    # ---- who is there

    def _joined(self, name: str, message: Mapping[str, Any], now: float) -> None:
        why = self._why_not(message)
        if why or self.state == OVER:
            self._tell(name, say="over", code=2, why=why or "the job is over")
            return
        if self._rival_of(message) is not None:
            # A node that was killed comes back before its silence is long enough: to be seen.
            self._rivals[name] = message
            return
        self._arrivals += 1
        fields = {key: message[key] for key in ("host", "nproc", "addr", "port", "wanted", "head")}
        node = Node(name, **fields, arrival=self._arrivals, last_heard=now)
        self.nodes[name] = node
        if self.state == GATHERING:
            self._gather(now)
        elif self.state == RUNNING and not self._has_room():
            why = "all places are taken" if not self.epoch.reports else "the job is about to end"
            self._tell(name, say="notice", why=f"{why}: this node waits in reserve")
        elif self.state == RUNNING:
            self._stop(f"{node} joins", grace=False)

    def _why_not(self, message: Mapping[str, Any]) -> str:
        own, its = list(self.terms[:4]), list(message["terms"])
        if own != its:
            names = ("least nodes", "most nodes", "--max-restarts", "static")
            different = [
                f"{name} {theirs} here, {ours} at the head"
                for name, ours, theirs in zip(names, own, its, strict=True)
                if ours != theirs
            ]
            return f"the nodes were started differently: {', '.join(different)}"
        return ""

    def _rival_of(self, message: Mapping[str, Any]) -> Node | None:
        """The node that has the --node-rank which a newcomer wants."""
        same = (node for node in self.nodes.values() if node.wanted == message["wanted"])
        return next(same, None) if self.terms.static else None

    def _refuse_rivals(self, node: Node) -> None:
        """It lives: whoever wants its place is a mistake."""
        for name, message in list(self._rivals.items()):
            if message["wanted"] == node.wanted:
                why = f"--node-rank {node.wanted} is taken by {node.host}"
                self._tell(name, say="over", code=2, why=why)
                del self._rivals[name]

    def _admit_rivals(self, now: float) -> None:
        """Those whose place has become free; the first of several."""
        for name, message in list(self._rivals.items()):
            if self._rival_of(message) is None:
                self._joined(name, self._rivals.pop(name), now)

    def _has_room(self) -> bool:
        return len(self.epoch.members) < self.terms.most and not self.epoch.reports

    def _left(self, name: str, message: Mapping[str, Any], now: float) -> None:
        node, why = self.nodes[name], message["why"]
        if self.state == OVER:
            del self.nodes[name]
        elif message.get("clean") and self.terms.least == self.terms.most:
            # All ranks have stopped together, in order: the job is done for now.
            del self.nodes[name]
            self.epoch.reports[name] = []
            self._settle(now)
        elif node.head:
            del self.nodes[name]
            self._finish(message["code"], f"{node}, the head, has left: {why}")
        else:
            self._lose(node, f"{node} has left: {why}", now)

    def _gone(self, name: str, now: float) -> None:
        """Its connection broke: the process has ended, or its host is out of reach."""
        self._rivals.pop(name, None)
        node = self.nodes.get(name)
        if node is None:
            return
        if self.state == OVER:
            del self.nodes[name]
        else:
            self._lose(node, f"{node} is lost: the connection to it broke", now)
        self._admit_rivals(now)

    def _lose(self, node: Node, why: str, now: float) -> None:
        del self.nodes[node.name]
        if self.state == GATHERING:
            self._gather(now)
        elif node.name in self.epoch.waiting_for:
            self.epoch.reports[node.name] = []
            self.epoch.lost.append(why)
            if self.state == RUNNING:
                self._stop(why)
            else:  # the members know that something is wrong, but not what
                for name in self.nodes.keys() & set(self.epoch.members):
                    self._tell(name, say="notice", why=why)
            self._settle(now)

    # ---- epochs

    def _gather(self, now: float) -> None:
        """Start when all are there; when enough are, after a last call to the others."""
        if len(self.nodes) >= self.terms.most:
            self._form()
        elif len(self.nodes) < self.terms.least:
            self.deadline = now + self.terms.join_timeout
        elif self.number >= 0:  # who comes later can join later
            self._form()
        else:
            self.deadline = now + self.terms.last_call

    def _form(self) -> None:
        members = sorted(self.nodes.values(), key=self._place)[: self.terms.most]
        self.epoch = Epoch(tuple(node.name for node in members))
        self.number += 1
        self.state = RUNNING
        secret, first = self._draw(), 0
        size = sum(node.nproc for node in members)
        for rank, node in enumerate(members):
            node.rank = rank
            start = {"epoch": self.number, "restarts": self.restarts, "secret": secret}
            place = {"node_rank": rank, "nnodes": len(members), "first": first, "size": size}
            meeting = {"addr": members[0].addr, "port": members[0].port}
            self._tell(node.name, say="start", **start, **place, **meeting)
            first += node.nproc

    def _place(self, node: Node) -> tuple[bool, float, int]:
        if self.terms.static:
            return False, node.wanted, 0
        return not node.head, math.inf if node.rank is None else node.rank, node.arrival

    def _stop(self, why: str, *, grace: bool = True) -> None:
        """End the epoch; with `grace` ranks have time to find out and raise by themselves."""
        self.state = STOPPING
        for name in self.epoch.members:
            if name in self.nodes and name in self.epoch.waiting_for:
                self._tell(name, say="stop", epoch=self.number, why=why, grace=grace)

    def _ended(self, name: str, message: Mapping[str, Any], now: float) -> None:
        if message["epoch"] != self.number or name not in self.epoch.waiting_for:
            return
        self.epoch.reports[name] = message["failures"]
        if message["failures"] and self.state == RUNNING:
            self._stop(f"a rank of {self.nodes[name]} has failed")
        self._settle(now)

    def _settle(self, now: float) -> None:
        """All members have ended: was it a success, a failure, or a change of members?"""
        if self.epoch.waiting_for or self.state not in (RUNNING, STOPPING):
            return
        if self.state == RUNNING:
            self._finish(0, "")
            return
        root = self._root_cause()
        if root is not None or (self.epoch.lost and self.terms.least == self.terms.most):
            self._failed(root, now)
        else:
            self._gather_again(now)

    def _root_cause(self) -> Message | None:
        """The first failure that no other explains; a lost node explains all of them."""
        if self.epoch.lost:
            return None
        found = [failure for failures in self.epoch.reports.values() for failure in failures]
        own = [failure for failure in found if not failure["consequence"]]
        lost = [failure for failure in found if failure["stopped_by"] is None]
        return next(iter(own + lost), None)

    def _failed(self, root: Message | None, now: float) -> None:
        why = self.epoch.lost[0] if root is None else ""
        code = LOST_NODE if root is None else root["code"]
        left = self.restarts < self.terms.max_restarts
        self.restarts += left
        again = f"restart {self.restarts} of {self.terms.max_restarts}" if left else ""
        for name in self.nodes:
            self._tell(name, say="failed", root=root, why=why, again=again)
        if left:
            self._gather_again(now)
        else:
            self._finish(code, "")

    def _gather_again(self, now: float) -> None:
        self.state = GATHERING
        self._gather(now)

    def _finish(self, code: int, why: str) -> None:
        self.state, self.deadline = OVER, None
        for name in (*self.nodes, *self._rivals):
            self._tell(name, say="over", code=code, why=why)
        self._rivals.clear()

    def _tell(self, name: str, **message: Any) -> None:
        self._told.append((name, message))

    def _take(self) -> Told:
        told, self._told = self._told, []
        return told
