"""The agent of this rank: `agent()`. A process has one; ranks that are threads have one each.

Rules: 1. an agent belongs to a `World`, like process groups. 2. One that has shut down is nobody's
agent any more. 3. Threads of an agent run in the context in which it was made.
"""

from __future__ import annotations

import atexit
import functools
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

from dtrain.distributed.world import World, current_world, is_own_world

_agents: WeakKeyDictionary[World, Any] = WeakKeyDictionary()

# Makes the calls of this thread in the agent's place: a distributed autograd context does.
recorder: ContextVar[Any] = ContextVar("recorder", default=None)


def agent() -> Any:
    """The agent; RuntimeError, in torch's words, before `init_rpc`."""
    found = _agents.get(current_world())
    if found is None:
        raise RuntimeError(
            "RPC has not been initialized. Call torch.distributed.rpc.init_rpc first. "
            "(After rpc.shutdown this worker is none any more.)"
        )
    return found


def install(made: Any) -> None:
    """Make `made` the agent of this rank; None: it has none any more."""
    if made is None:
        _agents.pop(current_world(), None)
    else:
        _agents[current_world()] = made


def at_end(leave: Callable[[], None]) -> None:
    """Call `leave` once when this rank ends, a process or a thread."""
    if is_own_world():
        ends = current_world().at_end
        if leave not in ends:
            ends.append(leave)
    else:
        _at_exit(leave)


@functools.cache
def _at_exit(leave: Callable[[], None]) -> None:
    atexit.register(leave)


def installed() -> Any:
    """The agent, or None."""
    return _agents.get(current_world())


def caller() -> Any:
    """Who makes the calls of this thread: a recorder, else the agent."""
    return recorder.get() or agent()
