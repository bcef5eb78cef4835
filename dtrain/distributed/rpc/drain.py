"""The end of a world of workers: everybody waits until nobody owes anybody anything.

Rules: 1. in rounds, each worker tells all others how many requests it has sent and served, and what
it has told of references; when two rounds are alike and the sums of requests are equal, nothing is
under way. 2. Who is dead owes nothing. 3. After the deadline it says who owes what.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from functools import partial

from dtrain.distributed.rpc.agent import Agent
from dtrain.errors import DistError

__all__ = ["drain"]


def drain(agent: Agent, deadline: float) -> None:
    """Rounds of telling each other [sent, served, told], until nothing moved between two."""
    before = None
    for turn in itertools.count():
        _wait(agent, agent.idle, deadline, partial(_owed, agent))
        if agent.names.board is not None:  # of an open world: the others go on
            return
        mine = agent.tell_drain(turn)
        others = [worker for worker in agent.names.ranks() if worker != agent.rank]

        who = (agent, turn, others)
        _wait(agent, partial(_all_told, *who), deadline, partial(_late, *who))
        told = [agent.drains.pop((turn, worker), None) for worker in others]
        counts = [mine, *(count for count in told if count is not None)]
        whole = None in told or sum(c[0] for c in counts) == sum(c[1] for c in counts)
        if whole and counts == before:
            return
        before = counts


def _missing(agent: Agent, turn: int, others: list[int]) -> list[str]:
    """The workers that live and have not told their counts in this round."""
    late = [w for w in others if (turn, w) not in agent.drains and w not in agent.lost]
    return [agent.names[w] for w in late]


def _all_told(agent: Agent, turn: int, others: list[int]) -> bool:
    return not _missing(agent, turn, others)


def _late(agent: Agent, turn: int, others: list[int]) -> str:
    return f"others have not called shutdown: {_missing(agent, turn, others)}"


def _owed(agent: Agent) -> str:
    return f"it {'; '.join(agent.owes())}"


def _wait(agent: Agent, done: Callable[[], bool], deadline: float, why: Callable[[], str]) -> None:
    with agent.moved:
        while not done():
            if agent.failed is not None:
                raise agent.failed
            left = deadline - time.monotonic()
            if left <= 0:
                raise DistError(
                    f"shutdown of worker {agent.names[agent.rank]!r} is not complete in time: "
                    f"{why()}"
                )
            agent.moved.wait(min(left, 0.01))
