"""Workers that are killed at each kind of message: who called them gets an error, at once.

One world: worker k dies (SIGKILL) when it hears the first message of kind k, or, of replies, when
it is about to send one. Worker 0 calls all of them, and a worker that lives.
"""

from __future__ import annotations

import os
import signal
import time

import dtrain as torch
from dtrain.comm.transports.unix import UnixTransport
from dtrain.distributed import rpc
from dtrain.distributed.rpc import agent as agents, line
from dtrain.errors import PeerLost
from dtrain.testing.distributed import joined
from dtrain.testing.world import run_ranks
from tests.distributed.rpc.worlds import add, echo, messages

KINDS = [agents.CALL, agents.FETCH, agents.REPLY, agents.CANCEL, agents.BOOKS, agents.DRAIN]
LIVES = 1 + len(KINDS)


def die_at(kind):
    """Have this process killed when it meets a message of that kind."""
    take, tell = line.Line._take, UnixTransport._tell

    def met(body):
        if any(number > 0 and about[0] == kind for number, *about in messages(body)):
            os.kill(os.getpid(), signal.SIGKILL)

    def taking(self, sender, body):
        if kind != agents.REPLY:
            met(body)
        take(self, sender, body)

    def telling(self, dst, body):
        if kind == agents.REPLY:
            met(body)
        tell(self, dst, body)

    line.Line._take, UnixTransport._tell = taking, telling


def nap():
    time.sleep(0.7)  # longer than its caller may take to give it up


def give_up(to):
    rpc.rpc_async(to, nap, timeout=30).cancel()
    return 3


def program(to):
    """All kinds of messages; whether the worker was lost on the way."""
    outcomes = []
    for step in (
        lambda: rpc.rpc_sync(to, add, (1, 2), timeout=30),
        lambda: rpc.remote(to, echo, (3,), timeout=30).to_here(timeout=30),
        lambda: give_up(to),
        lambda: rpc.rpc_sync(to, add, (1, 2), timeout=30),
    ):
        try:
            outcomes.append(step())
        except PeerLost:
            outcomes.append(None)
    return outcomes


def scene(group):
    with joined(group):
        rank = torch.distributed.get_rank()
        if 0 < rank < LIVES:
            die_at(KINDS[rank - 1])
        rpc.init_rpc(f"w{rank}")
        if rank == 0:
            begun = time.monotonic()
            lost = [program(f"w{other}") for other in range(1, LIVES + 1)]
            rpc.shutdown(timeout=30)
            return lost, time.monotonic() - begun
        rpc.shutdown(timeout=40)
        return None


def test_callers_of_killed_workers_get_errors_and_go_on():
    outcomes = run_ranks(LIVES + 1, scene, transport="zmq", processes=True, timeout=50)
    assert outcomes[0].error is None, outcomes[0].error
    lost, seconds = outcomes[0].value
    for kind, steps in zip(KINDS, lost, strict=False):
        assert set(steps) <= {3, None}, kind
    dead = [rank for rank, outcome in enumerate(outcomes) if outcome.status == -signal.SIGKILL]
    assert dead == list(range(1, LIVES))
    assert lost[-1] == [3, 3, 3, 3]
    assert seconds < 10
